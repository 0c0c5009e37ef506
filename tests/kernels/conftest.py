"""Which backends the kernels' tests run, and where: Triton on a CUDA device or interpreted on the
CPU, the CPU library in each of its instruction sets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from erq_kernels import _cpu, dispatch, explain

HAS_GPU = torch.cuda.is_available()


BACKENDS = ("triton", *(f"cpu-{name}" for name in _cpu.VARIANTS))


def _skip_unless_usable(backend: str, reason: str) -> None:
    """Skip the test for a reason that is not "usable"; fail if ERQ_TEST_REQUIRE, names by commas,
    has the backend."""
    if reason == "usable":
        return
    if backend in os.environ.get("ERQ_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{backend} is required but {reason}")
    pytest.skip(f"{backend}: {reason}")


@contextmanager
def _forced(name: str, patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device of one of BACKENDS, which runs every op meanwhile."""
    backend, _, variant = name.partition("-")
    device = torch.device("cuda" if HAS_GPU and backend == "triton" else "cpu")
    if backend == "triton" and not HAS_GPU:
        patch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, device=device)
    zero_point = torch.zeros((), dtype=torch.int32, device=device)
    _skip_unless_usable(backend, explain("quantize", x, x[0], zero_point, 4)[backend])
    if not variant:
        with dispatch.use(backend):
            yield device
        return
    if variant not in _cpu.supported_variants():
        pytest.skip(f"this processor has no {variant}")
    with dispatch.use(backend), _cpu.use_variant(variant):
        yield device


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Device of a test's tensors, once per backend, which runs every op of the test."""
    with _forced(request.param, monkeypatch) as device:
        yield device


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Device of a test of Triton's kernels alone, which run every op of the test."""
    with _forced("triton", monkeypatch) as device:
        yield device


@pytest.fixture(params=_cpu.VARIANTS)
def cpu_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The name of an instruction set of the CPU library, which runs every op of the test."""
    with _forced(f"cpu-{request.param}", monkeypatch):
        yield request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kind return, so that an element left unwritten shows."""

    def fill(t: Tensor) -> Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else 85)

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: fill(function(*args, **kwargs))

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

"""Where the kernels' tests run: on a CUDA device, or the Triton ones interpreted on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erq_kernels import explain

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device of the tensors of Triton tests. Skips where Triton cannot run, or fails if
    ERQ_TEST_REQUIRE, names by commas, has triton."""
    device = torch.device("cuda" if HAS_GPU else "cpu")
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = explain("pack", torch.zeros(1, dtype=torch.uint8, device=device), 4)["triton"]
    if reason != "usable":
        if "triton" in os.environ.get("ERQ_TEST_REQUIRE", "").split(","):
            pytest.fail(f"triton is required but {reason}")
        pytest.skip(f"triton: {reason}")
    return device


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

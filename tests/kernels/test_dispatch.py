"""Which backend runs: the table, the order, forcing, and the reasons given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import erq_kernels
from erq_kernels import BACKENDS, BackendError, dispatch, explain, ops, use

Add = Callable[..., None]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], dispatch.Kernel]:
    """An empty table and no force from outside."""
    table: dict[tuple[str, str], dispatch.Kernel] = {}
    monkeypatch.setattr(dispatch, "_kernels", table)
    monkeypatch.delenv("ERQ_BACKEND", raising=False)
    return table


@pytest.fixture
def add() -> Add:
    """Register a kernel of `op` that tells its backend, refusing with `reason` if there is one."""

    def register(backend: str, reason: str | None = None, op: str = "op") -> None:
        dispatch.register(op, backend, lambda *args: (backend, args), lambda *_, **__: reason)

    return register


def ran(backend: str = "auto") -> str:
    return str(dispatch.call("op", backend, 1, 2)[0])


def test_order_is_from_fastest_to_the_definition() -> None:
    assert dispatch.ORDER == ("cuda", "triton", "cpu", "reference")
    assert ("auto", *dispatch.ORDER) == BACKENDS


def test_auto_takes_the_first_backend_that_can(add: Add) -> None:
    add("reference")
    assert ran() == "reference"
    add("triton", "no GPU")
    assert ran() == "reference"
    add("cpu")
    assert ran() == "cpu"
    add("cuda")
    assert ran() == "cuda"


def test_kernel_gets_the_arguments_and_so_does_its_reason() -> None:
    seen: list[Any] = []

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        seen.append((args, kwargs))
        return None if args[0] < 3 else "too large"

    dispatch.register("op", "cpu", lambda *args: sum(args), why_not)
    assert dispatch.call("op", "auto", 1, 2) == 3
    assert dispatch.why_not("op", "cpu", 5, flag=True) == "too large"
    assert seen == [((1, 2), {}), ((5,), {"flag": True})]
    with pytest.raises(BackendError, match="cpu: too large"):
        dispatch.call("op", "cpu", 4)


def test_explain_refuses_an_unknown_op(add: Add) -> None:
    add("reference")
    assert explain("op")["reference"] == "usable"
    with pytest.raises(ValueError, match=r"unknown op 'oops'; choose one of op$"):
        explain("oops")


def test_forced_backend_runs_or_says_why_not(add: Add) -> None:
    add("reference")
    add("triton", "the tensor is on cpu")
    assert ran("reference") == "reference"
    with pytest.raises(BackendError) as caught:
        ran("triton")
    assert str(caught.value) == "no backend can run op as asked (triton: the tensor is on cpu)"
    with pytest.raises(BackendError, match=r"\(cuda: this build has no such kernel\)"):
        ran("cuda")


def test_nothing_can_run(add: Add) -> None:
    add("cpu", "no AVX2")
    with pytest.raises(BackendError) as caught:
        ran()
    assert str(caught.value) == (
        "no backend can run op as asked (cuda: this build has no such kernel; triton: this build "
        "has no such kernel; cpu: no AVX2; reference: this build has no such kernel)"
    )


def test_explain_gives_each_backend_its_answer(add: Add) -> None:
    add("reference")
    add("cpu", "K is odd")
    answers = {
        "cuda": "this build has no such kernel",
        "triton": "this build has no such kernel",
        "cpu": "K is odd",
        "reference": "usable",
    }
    assert explain("op", 1, flag=2) == answers
    with use("cpu"):  # a force changes what runs, not what could
        assert explain("op", 1) == answers


def test_use_nests(add: Add) -> None:
    for backend in ("reference", "cpu", "cuda"):
        add(backend)
    assert ran() == "cuda"
    with use("cpu"):
        assert ran() == "cpu"
        with use("reference"):
            assert ran() == "reference"
            assert ran("cuda") == "cuda"  # the argument is nearest to the call
        assert ran() == "cpu"
        with use("auto"):
            assert ran() == "cuda"
        assert ran() == "cpu"
    assert ran() == "cuda"


def test_use_ends_with_an_error(add: Add) -> None:
    add("reference")
    add("cpu")
    with pytest.raises(ZeroDivisionError), use("reference"):
        assert ran() == "reference"
        raise ZeroDivisionError
    assert ran() == "cpu"


def test_use_stays_in_its_thread(add: Add) -> None:
    add("reference")
    add("cpu")
    seen: list[str] = []
    with use("reference"):
        thread = threading.Thread(target=lambda: seen.append(ran()))
        thread.start()
        thread.join()
        assert ran() == "reference"
    assert seen == ["cpu"]


def test_environment_forces_a_process(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("reference", "cpu", "cuda"):
        add(backend)
    monkeypatch.setenv("ERQ_BACKEND", "cpu")
    assert ran() == "cpu"
    assert ran("cuda") == "cuda"
    with use("reference"):
        assert ran() == "reference"
    with use("auto"):
        assert ran() == "cuda"
    monkeypatch.setenv("ERQ_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"\(triton: this build has no such kernel\)"):
        ran()
    monkeypatch.setenv("ERQ_BACKEND", "")
    assert ran() == "cuda"


def test_unknown_names_are_refused(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    add("reference")
    message = "unknown backend 'gpu'; choose one of auto, cuda, triton, cpu, reference"
    with pytest.raises(ValueError, match=message):
        ran("gpu")
    with pytest.raises(ValueError, match=message), use("gpu"):
        pass
    assert ran() == "reference"
    monkeypatch.setenv("ERQ_BACKEND", "gpu")
    with pytest.raises(ValueError, match=message):
        ran()


def test_ops_go_through_the_table(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public names on a real op: forced by argument, context and environment."""
    calls: list[str] = []

    def kernel(backend: str) -> Any:
        def run(x: torch.Tensor, *_: Any) -> torch.Tensor:
            calls.append(backend)
            return torch.zeros(x.shape, dtype=torch.int8)

        return run

    for backend in ("reference", "triton"):
        dispatch.register("quantize", backend, kernel(backend), lambda *_: None)
    add("cuda", "no such device", op="quantize")
    args = (torch.randn(3), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), 4)
    ops.quantize(*args)
    ops.quantize(*args, backend="reference")
    with erq_kernels.use("reference"):
        ops.quantize(*args)
        ops.quantize(*args, backend="triton")
    monkeypatch.setenv("ERQ_BACKEND", "reference")
    ops.quantize(*args)
    assert calls == ["triton", "reference", "reference", "triton", "reference"]
    with pytest.raises(BackendError, match=r"no backend can run quantize .*cuda: no such device"):
        ops.quantize(*args, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        ops.quantize(*args, backend="gpu")
    assert erq_kernels.explain("quantize", *args) == {
        "cuda": "no such device",
        "triton": "usable",
        "cpu": "this build has no such kernel",
        "reference": "usable",
    }

"""What is timed, how often, and what becomes of the times; never how long it took."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import erq
from erq import timing
from erq.timing import (
    MAX_RUNS,
    MIN_RUNS,
    WARM_UP_RUNS,
    Timing,
    benchmark,
    compare,
    interleave,
    kernels,
)


class Counter(nn.Module):
    """Counts its calls and keeps the inputs' shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        self.modes.add(self.training or torch.is_grad_enabled())
        return x


def test_runs_and_shapes() -> None:
    net = Counter().train()
    found = benchmark(net, (4, 1), seconds=1e-9, input_shape=(3, 8, 8), name="counter")
    assert [(t.name, t.batch, t.runs) for t in found] == [
        ("counter", 4, MIN_RUNS),
        ("counter", 1, MIN_RUNS),
    ]
    each = WARM_UP_RUNS + MIN_RUNS
    assert net.shapes == [(4, 3, 8, 8)] * each + [(1, 3, 8, 8)] * each
    assert net.modes == {False} and net.training


def test_runs_stop_at_the_most_whatever_the_budget() -> None:
    [found] = benchmark(Counter(), (1,), seconds=1e9, input_shape=(3, 1, 1))
    assert found.runs == MAX_RUNS


def test_figures_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [float(ms) for ms in range(101, 0, -1)]
    monkeypatch.setattr(timing, "interleave", lambda calls, *_: dict.fromkeys(calls, times))
    [found] = benchmark(Counter(), (8,), input_shape=(3, 1, 1))
    assert (found.median_ms, found.p95_ms, found.min_ms, found.runs) == (51.0, 96.0, 1.0, 101)
    assert found.images_per_s == pytest.approx(8000 / 51)


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    times = interleave(calls, torch.device("cpu"), seconds=1e-9)
    assert {name: len(ms) for name, ms in times.items()} == dict.fromkeys("abc", MIN_RUNS)
    assert "".join(order) == "aaabbbccc" + "abc" + "bca" + "cab" + "abc" + "bca"


def test_compared_engines_come_first_and_those_that_cannot_run_are_named(
    tiny_vit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vit()
    net = erq.deploy(erq.quantize(model, torch.randn(4, 3, 16, 16)), backend="reference")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engines = ("torch", "openvino", "torch-bf16")
    timings, notes = compare(net, model, engines, (2, 1), seconds=1e-9, name="packed")
    names = ("torch", "torch-bf16", "packed")
    assert [(t.batch, t.name) for t in timings] == [(b, n) for b in (2, 1) for n in names]
    assert [t.kernel for t in timings[:3]] == ["torch", "torch-bf16", "reference"]
    assert [note.split(":")[0] for note in notes] == [
        f"batch {b}, openvino, nncf not installed" for b in (2, 1)
    ]
    with pytest.raises(ValueError, match="unknown engine 'tvm'"):
        compare(net, model, ("tvm",), (1,))


def test_names_device_and_kernel_of_a_plain_model(tiny_vit: Callable[..., nn.Module]) -> None:
    [found] = benchmark(tiny_vit(), (1,), seconds=1e-9)
    assert found == Timing(**found.to_dict())
    assert (found.device, found.kernel, found.name) == ("cpu", "torch", "VisionTransformer")
    assert found.threads == torch.get_num_threads() and found.hardware
    assert found.min_ms <= found.median_ms <= found.p95_ms


def test_deployed_model_says_which_kernel_ran(tiny_vit: Callable[..., nn.Module]) -> None:
    net = erq.deploy(erq.quantize(tiny_vit(), torch.randn(4, 3, 16, 16)), backend="reference")
    assert kernels(net) == ["reference"]
    [found] = benchmark(net, (1,), seconds=1e-9)
    assert found.kernel == "reference"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (0,)}, "batch sizes must be integers >= 1, got 0"),
        ({"batch_sizes": (1.5,)}, "got 1.5"),
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"seconds": 0}, "seconds must be > 0"),
        ({"input_shape": None}, "give input_shape"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(Counter(), **{"input_shape": (3, 1, 1), **arguments})


@pytest.mark.gpu
def test_gpu_is_timed_by_events(tiny_vit: Callable[..., nn.Module]) -> None:
    [found] = benchmark(tiny_vit().cuda(), (2,), seconds=0.05)
    assert found.device == "cuda:0" and found.threads is None
    assert 0 < found.min_ms <= found.median_ms

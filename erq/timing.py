"""How fast a network is: whole forward passes, timed on the device it lives on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from erq.deployment.modules import QuantLinear, QuantPatchEmbed
from erq.engines import EngineError, start
from erq.inputs import data_config, image_shape, inference, placement, preprocessing
from erq.system import hardware_name

WARM_UP_RUNS = 3
MIN_RUNS = 5
MAX_RUNS = 500

_FLUSH_BYTES = 256 * 2**20
"""More than the L2 of any GPU."""


@dataclass(frozen=True)
class Timing:
    """Forward passes of one network at one batch size.

    Args:
        name: the network's. batch: images of one pass.
        device: torch's name of it. hardware: its model name. threads: of torch on a CPU, else None.
        kernel: the backends that run the quantized layers, or `torch` for a network without any.
        runs: timed passes, after a warm-up. median_ms, p95_ms, min_ms: of one pass.
        images_per_s: at the median.
    """

    name: str
    batch: int
    device: str
    hardware: str
    threads: int | None
    kernel: str
    runs: int
    median_ms: float
    p95_ms: float
    min_ms: float
    images_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


def benchmark(
    net: nn.Module,
    batch_sizes: Sequence[int] = (1, 8),
    *,
    seconds: float = 2.0,
    input_shape: tuple[int, int, int] | None = None,
    name: str | None = None,
) -> list[Timing]:
    """Time forward passes on random images, where the network is and as it is.

    Each batch size is warmed up, then run until `seconds` have passed, at least 5 and at most 500
    times. On a GPU passes are timed by events around each, so launch gaps inside a pass count.

    Args:
        net: images → anything.
        batch_sizes: images of one pass.
        seconds: time budget for each batch size.
        input_shape: (channels, height, width); by default what the network says of itself.
        name: what to call it; by default its architecture.

    Returns:
        One Timing per batch size, in order.

    Raises:
        ValueError: a batch size below 1, no time, or a network that does not say what it takes.
    """
    sizes = _checked(batch_sizes, seconds)
    shape = _shape(net) if input_shape is None else tuple(input_shape)
    device, dtype = placement(net)
    label, kernel = name or _name(net), ", ".join(kernels(net)) or "torch"
    timings = []
    with inference(net), torch.inference_mode():
        for size in sizes:
            x = _images(size, shape).to(device, dtype)
            times = interleave({label: partial(net, x)}, device, seconds)
            timings.append(_timing(label, kernel, size, device, times[label]))
    return timings


def compare(
    net: nn.Module,
    twin: nn.Module,
    engines: Sequence[str],
    batch_sizes: Sequence[int] = (1, 8),
    *,
    seconds: float = 2.0,
    name: str | None = None,
) -> tuple[list[Timing], list[str]]:
    """Time a network and other engines in turns, so that all meet the same machine.

    Args:
        net: images → anything. twin: the full-precision model that the engines run, on net's
            device.
        engines: as `erq.engines.start` names them.
        batch_sizes: images of one pass. seconds: for each batch size and engine.
        name: what to call net; by default its architecture.

    Returns:
        Timings by batch size, engines first, net last; and a line for each engine that cannot run.

    Raises:
        ValueError: an unknown engine, a batch size below 1, or no time.
    """
    device, dtype = placement(net)
    label, kernel = name or _name(net), ", ".join(kernels(net)) or "torch"
    timings, notes = [], []
    for size in _checked(batch_sizes, seconds):
        x = _images(size, _shape(net)).to(device)
        calls: dict[str, Callable[[], object]] = {}
        for engine in engines:
            try:
                calls[engine] = start(engine, twin, x)
            except EngineError as error:
                notes.append(f"batch {size}, {error}")
        found = list(calls)
        with inference(net), torch.inference_mode():
            calls[label] = partial(net, x.to(dtype))
            times = interleave(calls, device, seconds * len(calls))
        rows = [(engine, engine) for engine in found] + [(label, kernel)]
        timings += [_timing(who, what, size, device, times[who]) for who, what in rows]
    return timings, notes


def _checked(batch_sizes: Sequence[int], seconds: float) -> list[int]:
    sizes = list(batch_sizes)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"batch sizes must be integers >= 1, got {size!r}")
    if not sizes:
        raise ValueError("batch_sizes is empty: name at least one, such as (1, 8)")
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds!r}")
    return sizes


def _images(size: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))


def _timing(
    name: str, kernel: str, size: int, device: torch.device, times: Sequence[float]
) -> Timing:
    ms = torch.tensor(times, dtype=torch.float64)
    median = float(ms.quantile(0.5))
    return Timing(
        name=name,
        batch=size,
        device=str(device),
        hardware=hardware_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        kernel=kernel,
        runs=len(ms),
        median_ms=median,
        p95_ms=float(ms.quantile(0.95)),
        min_ms=float(ms.min()),
        images_per_s=1000.0 * size / median,
    )


def kernels(net: nn.Module) -> list[str]:
    """The backends that run the deployed layers of a network, sorted; empty if it has none."""
    layers = [m for m in net.modules() if isinstance(m, QuantLinear | QuantPatchEmbed)]
    return sorted({layer.kernel() for layer in layers})


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    cold: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each call, timed once a round in an order that moves on every round.

    Args:
        calls: by name; each is first run three times untimed.
        device: where they run; on a GPU they are timed by events around each.
        seconds: of all rounds, which are at least 5 and at most 500.
        cold: on a GPU, overwrite its L2 before each call; that also hides the launch.
    """
    names = list(calls)
    gpu = device.type == "cuda"
    for name in names:
        for _ in range(WARM_UP_RUNS):
            calls[name]()
    flush = torch.empty(_FLUSH_BYTES if gpu and cold else 0, dtype=torch.int8, device=device)
    if gpu:
        torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(MAX_RUNS):
        if done >= MIN_RUNS and time.perf_counter() - start >= seconds:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            if gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if cold:
                    flush.zero_()
                begin.record()
                calls[name]()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
            else:
                before = time.perf_counter()
                calls[name]()
                times[name].append(1000.0 * (time.perf_counter() - before))
    return times


def _shape(net: nn.Module) -> tuple[int, int, int]:
    if image_shape(net) is None:
        raise ValueError(
            f"a {type(net).__name__} does not say which images it takes: give input_shape, such as "
            "(3, 224, 224)"
        )
    return preprocessing(net).shape


def _name(net: nn.Module) -> str:
    info = getattr(net, "erq_info", None)
    if info is not None:
        return str(info.architecture)
    return str(data_config(net).get("architecture") or type(net).__name__)

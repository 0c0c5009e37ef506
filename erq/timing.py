"""How fast a network is: whole forward passes, timed on the device it lives on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erq.deployment.modules import QuantLinear, QuantPatchEmbed
from erq.inputs import data_config, image_shape, inference, placement, preprocessing
from erq.system import hardware_name

WARM_UP_RUNS = 3
MIN_RUNS = 5
MAX_RUNS = 500


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
    sizes = list(batch_sizes)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"batch sizes must be integers >= 1, got {size!r}")
    if not sizes:
        raise ValueError("batch_sizes is empty: name at least one, such as (1, 8)")
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds!r}")
    shape = _shape(net) if input_shape is None else tuple(input_shape)
    device, dtype = placement(net)
    kernel = ", ".join(kernels(net)) or "torch"
    timings = []
    with inference(net), torch.inference_mode():
        for size in sizes:
            rng = torch.Generator().manual_seed(size)
            x = torch.randn(size, *shape, generator=rng).to(device, dtype)
            ms = torch.tensor(_passes(net, x, seconds), dtype=torch.float64)
            median = float(ms.quantile(0.5))
            timings.append(
                Timing(
                    name=name or _name(net),
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
            )
    return timings


def kernels(net: nn.Module) -> list[str]:
    """The backends that run the deployed layers of a network, sorted; empty if it has none."""
    layers = [m for m in net.modules() if isinstance(m, QuantLinear | QuantPatchEmbed)]
    return sorted({layer.kernel() for layer in layers})


def _passes(net: nn.Module, x: Tensor, seconds: float) -> list[float]:
    """Milliseconds of every timed pass."""
    gpu = x.device.type == "cuda"
    for _ in range(WARM_UP_RUNS):
        net(x)
    if gpu:
        torch.cuda.synchronize(x.device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < MIN_RUNS or (
        len(times) < MAX_RUNS and time.perf_counter() - start < seconds
    ):
        if gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            net(x)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            before = time.perf_counter()
            net(x)
            times.append(1000.0 * (time.perf_counter() - before))
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

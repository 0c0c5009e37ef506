"""Several ways to do one thing, timed in turns, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = (5, 200)
"""Fewest and most timed rounds."""

_FLUSH_BYTES = 256 * 2**20
"""More than the L2 of any GPU; written between the calls of a micro-benchmark."""


@dataclass(frozen=True)
class Spread:
    """Times of one way, in ms: median, and the quarters below and above it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """The spread of measured times."""
        low, median, high = torch.tensor(times, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(float(median), float(low), float(high), len(times))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 1.0,
    cold: bool = False,
) -> dict[str, Spread]:
    """Time each call once a round, in an order that moves on every round.

    Args:
        calls: by name; each is run twice before.
        seconds: of all rounds together, which are at least 5.
        cold: on a GPU, flush its L2 before each call; the flush also hides the launch.
    """
    names = list(calls)
    gpu = device.type == "cuda"
    for name in names:
        for _ in range(2):
            calls[name]()
    flush = torch.empty(_FLUSH_BYTES if gpu and cold else 0, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - start > seconds:
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
                times[name].append(1000 * (time.perf_counter() - before))
    return {name: Spread.of(measured) for name, measured in times.items()}

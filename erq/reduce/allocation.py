"""Bits per layer under an average, from the errors that error reduction measured at every layer.

A layer's error at b bits is modelled as what activations cost it, which no weight width changes,
plus the cost of rounding its weights: measured for round to nearest at every width on the layer's
own Gram matrix, times the share of that cost which the method left at the width that was tried
(the median share where the method left less error than there was before rounding: no share then).
Widths then go, one bit at a time, to the layer that gains most per stored bit: the greedy optimum
of a separable convex problem, so far as the curves are convex; where they are not, steps are taken
together (the lower hull).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from erq.reduce.site import SiteReport

WIDTHS = tuple(range(2, 9))


@dataclass(frozen=True)
class SiteBits:
    """The width of one layer, and why.

    Args:
        name: the site. weights: how many it has.
        w_bits: its width. errors: width → relative squared output error from its weights alone.
        floor: the error that stays at any width, from quantized activations.
        gain: error saved by the last step up to w_bits, per million stored bits; None at the lowest
            width. next_gain: what the next step would save; None at the highest width.
    """

    name: str
    weights: int
    w_bits: int
    errors: Mapping[int, float]
    floor: float
    gain: float | None
    next_gain: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return asdict(self)


def weight_errors(reports: Sequence[SiteReport]) -> dict[str, dict[int, float]]:
    """Layer → width → relative squared output error that its weights cause at that width.

    Args:
        reports: of layers solved with their `nearest` errors recorded.
    """
    shares = {}
    for r in reports:
        rounded, left = r.error_nearest - r.error_aqer, r.error_final - r.error_aqer
        shares[r.name] = min(left / rounded, 1.0) if rounded > 0 else 0.0
    known = [share for share in shares.values() if share > 0]
    usual = median(known) if known else 1.0
    return {
        r.name: {
            bits: (shares[r.name] if shares[r.name] > 0 else usual) * max(error - r.error_aqer, 0.0)
            for bits, error in r.nearest.items()
        }
        for r in reports
    }


def allocate(
    reports: Sequence[SiteReport], sizes: Mapping[str, int], target_bits: float
) -> list[SiteBits]:
    """Widths of least summed error whose average over all weights is at most `target_bits`.

    Args:
        reports: of the layers to decide on, with their `nearest` errors.
        sizes: weights of every layer.

    Raises:
        ValueError: a target below the lowest or above the highest width.
    """
    if not WIDTHS[0] <= target_bits <= WIDTHS[-1]:
        raise ValueError(
            f"target_bits must be from {WIDTHS[0]} to {WIDTHS[-1]}, the average width of a weight, "
            f"got {target_bits!r}"
        )
    curves = weight_errors(reports)
    steps = {name: _hull_steps(curve, sizes[name]) for name, curve in curves.items()}
    chosen = dict.fromkeys(curves, WIDTHS[0])
    taken: dict[str, float] = {}
    budget = target_bits * sum(sizes[name] for name in curves)
    used = sum(WIDTHS[0] * sizes[name] for name in curves)
    queue = [(-steps[name][0][1], name, 0) for name in curves if steps[name]]
    heapq.heapify(queue)
    waiting: dict[str, float] = {}
    while queue:
        gain, name, index = heapq.heappop(queue)
        width, _ = steps[name][index]
        cost = (width - chosen[name]) * sizes[name]
        if used + cost > budget:
            waiting[name] = -gain  # smaller layers may still fit
            continue
        used += cost
        chosen[name], taken[name] = width, -gain
        if index + 1 < len(steps[name]):
            heapq.heappush(queue, (-steps[name][index + 1][1], name, index + 1))
    return [
        SiteBits(
            r.name,
            sizes[r.name],
            chosen[r.name],
            curves[r.name],
            r.error_aqer,
            taken.get(r.name),
            waiting.get(r.name),
        )
        for r in reports
    ]


def _hull_steps(curve: Mapping[int, float], size: int) -> list[tuple[int, float]]:
    """(width, gain per million stored bits) of every step up the lower convex hull of a curve."""
    hull = [WIDTHS[0]]
    while hull[-1] < WIDTHS[-1]:
        here = hull[-1]
        slope, width = max(((curve[here] - curve[w]) / (w - here), w) for w in WIDTHS if w > here)
        if slope <= 0:
            break
        hull.append(width)
    return [(b, (curve[a] - curve[b]) / ((b - a) * size) * 1e6) for a, b in pairwise(hull)]


def average_bits(sites: Sequence[SiteBits]) -> float:
    """The average width of a weight."""
    return sum(s.w_bits * s.weights for s in sites) / sum(s.weights for s in sites)

"""Widths per layer: optimal against brute force, inside the budget, and explained."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from erq.reduce.allocation import WIDTHS, allocate, average_bits, weight_errors
from erq.reduce.site import SiteReport


def report(
    name: str, first: float, rate: float = 4.0, floor: float = 0.01, share: float = 0.25
) -> Any:
    """A layer whose rounding costs `first` at 2 bits and `rate` times less with every bit."""
    nearest = {b: floor + first / rate ** (b - 2) for b in WIDTHS}
    cost = nearest[4] - floor
    return SiteReport(
        name, "linear", 4, 4, "affine", floor, floor, nearest[4], floor + share * cost, nearest
    )


def test_errors_are_the_share_that_the_method_left() -> None:
    [curve] = weight_errors([report("a", 0.16, share=0.5)]).values()
    assert curve == pytest.approx({b: 0.08 / 4 ** (b - 2) for b in WIDTHS})


def test_a_layer_that_gained_by_rounding_takes_the_median_share() -> None:
    odd = report("odd", 0.16, share=-0.3)
    others = [report("a", 0.16, share=0.2), report("b", 0.16, share=0.4), report("c", 1, share=0.3)]
    assert weight_errors([odd, *others])["odd"][2] == pytest.approx(0.3 * 0.16)
    assert weight_errors([odd])["odd"][2] == pytest.approx(0.16)


@pytest.mark.parametrize("target", [2.5, 3.0, 3.7, 5.0])
def test_no_other_choice_of_the_same_size_has_less_error(target: float) -> None:
    reports = [report("a", 0.3), report("b", 0.02), report("c", 0.1, rate=2.0), report("d", 0.004)]
    sizes = dict.fromkeys("abcd", 1000)
    sites = allocate(reports, sizes, target)
    curves = weight_errors(reports)
    total = sum(s.w_bits for s in sites)
    assert average_bits(sites) <= target and total > target * 4 - 1
    error = sum(curves[s.name][s.w_bits] for s in sites)
    for widths in product(WIDTHS, repeat=4):
        if sum(widths) == total:
            other = sum(curves[n][b] for n, b in zip("abcd", widths, strict=True))
            assert error <= other * (1 + 1e-9)


def test_large_layers_pay_for_their_size() -> None:
    reports = [report("small", 0.1), report("large", 0.1)]
    small, large = allocate(reports, {"small": 100, "large": 10_000}, 3.0)
    assert small.w_bits > large.w_bits
    assert average_bits([small, large]) <= 3.0


def test_gains_say_why() -> None:
    reports = [report("a", 0.3), report("b", 0.02), report("c", 0.1)]
    sites = allocate(reports, {"a": 1000, "b": 1000, "c": 1000}, 3.4)
    worst_taken = min(s.gain for s in sites if s.gain is not None)
    assert all(s.next_gain is None or s.next_gain <= worst_taken for s in sites)
    for s in sites:
        assert (s.gain is None) == (s.w_bits == 2)
        if s.gain is not None:
            saved = s.errors[s.w_bits - 1] - s.errors[s.w_bits]
            assert s.gain == pytest.approx(saved / 1000 * 1e6)


def test_steps_where_one_bit_alone_gains_nothing_are_taken_together() -> None:
    cliff = report("cliff", 0.3)
    curve = {**cliff.nearest, 3: cliff.nearest[2]}  # 3 bits are no better than 2
    stuck = SiteReport(**{**cliff.to_dict(), "nearest": curve})
    [site] = allocate([stuck], {"cliff": 10}, 4.0)
    assert site.w_bits == 4
    [site] = allocate([stuck], {"cliff": 10}, 3.0)
    assert site.w_bits == 2


def test_more_bits_than_any_layer_needs_stay_unused() -> None:
    flat = SiteReport(**{**report("flat", 0.1).to_dict(), "nearest": dict.fromkeys(WIDTHS, 0.02)})
    [site] = allocate([flat], {"flat": 10}, 8.0)
    assert (site.w_bits, site.gain, site.next_gain) == (2, None, None)
    [best] = allocate([report("a", 0.3)], {"a": 10}, 8.0)
    assert best.w_bits == 8


@pytest.mark.parametrize("target", [1.9, 8.1, float("nan")])
def test_a_target_out_of_range_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_bits must be from 2 to 8"):
        allocate([report("a", 0.3)], {"a": 10}, target)

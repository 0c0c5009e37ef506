"""The one solver against least squares on the augmented system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erq.reduce.ridge import factor, ridge_strength, solve


def test_strength_is_the_value_or_a_share_of_the_mean_squared_row(
    layer: Callable[..., Any],
) -> None:
    it = layer(d=6, n=1, rows=50)
    assert ridge_strength(it.gram, 0.5, "sum") == 0.5
    row = float(it.a.square().sum(dim=1).mean())
    assert ridge_strength(it.gram, 0.5, "relative") == pytest.approx(0.5 * row)


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 10.0, 1e6])
@pytest.mark.parametrize("rows", [3, 60])
def test_solution_is_that_of_the_augmented_least_squares(strength: float, rows: int) -> None:
    a, y = torch.randn(rows, 12).double(), torch.randn(rows, 5).double()
    augmented = torch.cat([a, strength**0.5 * torch.eye(12).double()])
    target = torch.cat([y, torch.zeros(12, 5).double()])
    expected = torch.linalg.lstsq(augmented, target, driver="gelsd").solution
    torch.testing.assert_close(solve(factor(a.t() @ a, strength), a.t() @ y), expected)


@pytest.mark.parametrize("rank", [0, 1, 11])
def test_a_singular_matrix_is_handled_without_ridge(rank: int) -> None:
    a = torch.randn(rank, 12).double()
    g = a.t() @ a
    lower = factor(g, 0.0)
    assert bool(torch.isfinite(lower).all())
    torch.testing.assert_close(lower @ lower.t(), g, rtol=0, atol=1e-8)
    # A right-hand side within the range of g is still solved.
    b = g @ torch.randn(12, 3).double()
    torch.testing.assert_close(g @ solve(lower, b), b, rtol=1e-5, atol=1e-5)


def test_a_regular_matrix_is_not_disturbed() -> None:
    a = torch.randn(30, 8).double()
    g = a.t() @ a
    assert torch.equal(factor(g, 0.0), torch.linalg.cholesky(g))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_statistics_are_refused(bad: float) -> None:
    g = torch.eye(4).double()
    g[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        factor(g, 1.0)

"""The one solver against least squares on the augmented system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erq.reduce.ridge import Ridge, factor, ridge_strength


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
    found = torch.cholesky_solve(a.t() @ y, factor(a.t() @ a, strength))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_trailing_blocks_are_solved_and_leave_their_schur_complement(
    layer: Callable[..., Any], has_bias: bool, start: int
) -> None:
    it = layer(d=8, n=3)
    n = 9 if has_bias else 8
    ridge = Ridge(it.gram, 0.5, has_bias)
    assert ridge.size == n
    full = it.gram.g[:n, :n] + 0.5 * torch.eye(n).double()
    b = torch.randn(n - start, 2).double()
    rest = full[start:, start:]
    torch.testing.assert_close(ridge.solve(b, start), torch.linalg.solve(rest, b))
    cross = full[:start, start:]
    left = full[:start, :start] - cross @ torch.linalg.solve(rest, cross.t())
    torch.testing.assert_close(ridge.remaining(slice(0, start)), left)


@pytest.mark.parametrize("rank", [0, 1, 11])
def test_a_singular_matrix_is_handled_without_ridge(rank: int) -> None:
    a = torch.randn(rank, 12).double()
    g = a.t() @ a
    lower = factor(g, 0.0)
    assert bool(torch.isfinite(lower).all())
    torch.testing.assert_close(lower @ lower.t(), g, rtol=0, atol=1e-8)
    # A right-hand side within the range of g is still solved.
    b = g @ torch.randn(12, 3).double()
    torch.testing.assert_close(g @ torch.cholesky_solve(b, lower), b, rtol=1e-5, atol=1e-5)


def test_a_regular_matrix_is_not_disturbed() -> None:
    a = torch.randn(30, 8).double()
    g = a.t() @ a
    assert torch.equal(factor(g, 0.0), torch.linalg.cholesky(g))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_statistics_are_refused(bad: float) -> None:
    for place in ((1, 1), (3, 0)):
        g = torch.eye(4).double()
        g[place] = g[place[::-1]] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            factor(g, 1.0)
    g = torch.eye(4).double()
    g[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        factor(g, 1.0)

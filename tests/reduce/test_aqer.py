"""Aqer against least squares on the rows themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erq.reduce.aqer import aqer
from erq.reduce.gram import Gram
from erq.reduce.ridge import Ridge

Build = Callable[..., Any]


def ridge_of_rows(a: torch.Tensor, residual: torch.Tensor, strength: float) -> torch.Tensor:
    """argmin over δ of ‖residual − A δᵀ‖² + λ‖δ‖²."""
    n, m = a.shape[1], residual.shape[1]
    augmented = torch.cat([a, strength**0.5 * torch.eye(n).double()])
    target = torch.cat([residual, torch.zeros(n, m).double()])
    return torch.linalg.lstsq(augmented, target, driver="gelsd").solution.t()


def update(
    gram: Gram, weight: torch.Tensor, strength: float, has_bias: bool = True
) -> torch.Tensor:
    return aqer(Ridge(gram, strength, has_bias), weight, gram.cross(weight[:, :-1]))


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("has_bias", [True, False])
def test_update_is_the_ridge_solution(layer: Build, strength: float, has_bias: bool) -> None:
    it = layer(d=12, n=7)
    weight = it.weight.clone()
    if not has_bias:
        weight[:, -1] = 0
    y = torch.cat([it.x, torch.ones(len(it.x), 1)], dim=1) @ weight.t()
    a = it.a if has_bias else it.a[:, :-1]
    expected = weight.clone()
    expected[:, : a.shape[1]] += ridge_of_rows(a, y - it.a @ weight.t(), strength)
    got = update(it.gram, weight, strength, has_bias)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    if not has_bias:
        assert not got[:, -1].any()


def test_error_falls_and_a_huge_ridge_changes_nothing(layer: Build) -> None:
    it = layer(d=20, n=9)
    y = torch.cat([it.x, torch.ones(len(it.x), 1)], dim=1) @ it.weight.t()

    def error(weight: torch.Tensor) -> float:
        return float((y - it.a @ weight.t()).square().sum())

    errors = [error(update(it.gram, it.weight, s)) for s in (0.0, 1.0, 100.0, 1e15)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * error(it.weight)
    torch.testing.assert_close(update(it.gram, it.weight, 1e15), it.weight)


def test_fewer_rows_than_channels(layer: Build) -> None:
    it = layer(d=30, n=4, rows=10)
    for strength in (0.0, 1e-3):
        assert bool(torch.isfinite(update(it.gram, it.weight, strength)).all())

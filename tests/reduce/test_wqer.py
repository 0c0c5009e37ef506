"""Wqer against its rounds written out one solve at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erq.quant import AffineParams, WeightParams, dequantize, fake_quantize, quantize
from erq.quant.fit import fit_dual_weight, fit_weight
from erq.reduce.ridge import Ridge
from erq.reduce.rounding import refine_greedy, refine_official
from erq.reduce.wqer import neighbours, wqer

Build = Callable[..., Any]
REFINES = ("off", "official", "greedy")


def fit(weight: Tensor, bits: int, dual: bool = False) -> WeightParams:
    w = weight[:, :-1].float()
    columns = torch.tensor([0, w.shape[1] // 2])
    return fit_dual_weight(w, bits, columns) if dual else fit_weight(w, bits)


def value(codes: Tensor, params: WeightParams, bias: Tensor) -> Tensor:
    return torch.cat([dequantize(codes, params).double(), bias[:, None]], dim=1)


def straightforward(
    a: Tensor, weight: Tensor, params: WeightParams, strength: float, refine: str
) -> tuple[Tensor, Tensor]:
    """Halve the free columns, round the first half, solve for the others; from the rows A.

    Weight columns of A come first; a further one, if there is any, is the bias.
    """
    d, n = weight.shape[1] - 1, a.shape[1]
    current = weight[:, :n].clone()
    free = list(range(n))
    while free and free[0] < d:
        half = len(free) // 2 if len(free) > 1 else 1
        chosen, rest = free[:half], free[half:]
        grid = current.float()
        grid[:, :d] = fake_quantize(grid[:, :d].contiguous(), params)
        a_s, a_r = a[:, chosen], a[:, rest]
        inverse = torch.linalg.inv(a_r.t() @ a_r + strength * torch.eye(len(rest)).double())
        if refine != "off":
            # The neighbour on the other side of the weight, by asking the quantizer itself.
            step = torch.zeros_like(grid)
            for sign in (-1.0, 1.0):
                beyond = grid[:, :d].clone()
                side = torch.sign(current[:, :d].float() - beyond) == sign
                scale = steps(params, beyond)
                moved = fake_quantize((beyond + sign * scale).contiguous(), params)
                inside = (current[:, :d].float() - beyond).abs() <= 0.501 * scale
                step[:, :d] = torch.where(side & inside, moved - beyond, step[:, :d])
            if refine == "official":
                mean = a_s.mean(dim=0)
                cov = torch.cov(a_s.t()).reshape(half, half)
                moment, refiner = mean[:, None] * mean + cov, refine_official
            else:
                cross = a_s.t() @ a_r
                g = a_s.t() @ a_s + strength * torch.eye(half).double()
                moment, refiner = (g - cross @ inverse @ cross.t()) / len(a), refine_greedy
            error = (grid.double() - current)[:, chosen].float()
            flip = refiner(error, step[:, chosen], moment.float())
            grid[:, chosen] = torch.where(flip, grid[:, chosen] + step[:, chosen], grid[:, chosen])
        delta = grid[:, chosen].double() - current[:, chosen]
        current[:, rest] -= delta @ (a_s.t() @ a_r) @ inverse
        current[:, chosen] = grid[:, chosen].double()
        free = rest
    bias = current[:, d] if n > d else weight[:, d]
    return quantize(current[:, :d].float(), params), bias


def steps(params: WeightParams, like: Tensor) -> Tensor:
    """Step of every element: the change of value of one code."""
    codes = quantize(like.contiguous(), params)
    return (dequantize(codes + 1, params) - dequantize(codes, params)).abs()


@pytest.mark.parametrize("refine", REFINES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("d", "dual"), [(1, False), (2, False), (13, False), (32, True)])
def test_rounds_equal_the_straightforward_ones(
    layer: Build, refine: str, has_bias: bool, d: int, dual: bool
) -> None:
    it = layer(d=d, n=24)
    params = fit(it.weight, 3, dual)
    a = it.a if has_bias else it.a[:, :-1]
    codes, bias = wqer(it.gram, it.weight, params, Ridge(it.gram, 0.7, has_bias), refine)
    expected_codes, expected_bias = straightforward(a, it.weight, params, 0.7, refine)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(bias, expected_bias)


def test_refinements_differ_on_this_data(layer: Build) -> None:
    """Guards the test above: each refinement does something there."""
    it = layer(d=32, n=24)
    params = fit(it.weight, 3, dual=True)
    results = [
        wqer(it.gram, it.weight, params, Ridge(it.gram, 0.7, True), refine)[0] for refine in REFINES
    ]
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("refine", REFINES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_no_more_than_that_of_rounding_to_nearest(
    layer: Build, refine: str, bits: int, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    it = layer(d=24, n=40)
    params = fit(it.weight, bits)
    codes, bias = wqer(it.gram, it.weight, params, Ridge(it.gram, 1e-3, has_bias), refine)
    nearest = value(quantize(it.weight[:, :-1].float(), params), params, it.weight[:, -1])
    reduced = value(codes, params, bias)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**bits
    assert float(it.error(reduced).sum()) < float(it.error(nearest).sum())
    if not has_bias:
        assert torch.equal(bias, it.weight[:, -1])


def test_greedy_beats_no_refinement_in_the_mean(layer: Build) -> None:
    totals = dict.fromkeys(REFINES, 0.0)
    for _ in range(5):
        it = layer(d=24, n=40)
        params = fit(it.weight, 3)
        for refine in REFINES:
            codes, bias = wqer(it.gram, it.weight, params, Ridge(it.gram, 1e-3, True), refine)
            totals[refine] += float(it.error(value(codes, params, bias)).sum())
    assert totals["greedy"] < totals["off"]
    assert totals["greedy"] < totals["official"]


@pytest.mark.parametrize("refine", REFINES)
def test_weights_on_the_grid_stay(layer: Build, refine: str) -> None:
    it = layer(d=16, n=10)
    params = fit(it.weight, 4)
    codes = quantize(it.weight[:, :-1].float(), params)
    exact = value(codes, params, it.weight[:, -1])
    got, bias = wqer(it.gram, exact, params, Ridge(it.gram, 0.1, True), refine)
    assert torch.equal(got, codes)
    torch.testing.assert_close(bias, it.weight[:, -1])


@pytest.mark.parametrize("refine", REFINES)
def test_singular_statistics_without_ridge(layer: Build, refine: str) -> None:
    it = layer(d=20, n=6, rows=50, rank=4)
    codes, bias = wqer(it.gram, it.weight, fit(it.weight, 4), Ridge(it.gram, 0.0, True), refine)
    assert bool(torch.isfinite(bias).all())
    assert int(codes.max()) < 16


def test_neighbours_by_hand() -> None:
    weight = torch.tensor([[0.3, 0.7, 1.0, -0.2, 7.4, -1.0, 99.0]])
    one, two = neighbours(weight, torch.tensor(1.0), torch.tensor(0.0), 7)
    assert one.tolist() == [[0, 1, 1, 0, 7, 0, 7]]
    # Towards the weight's other side; none for a weight on the grid, below 0 or above the top.
    assert two.tolist() == [[1, 0, 1, 0, 7, 0, 7]]


def test_neighbours_enclose_every_weight_inside_the_range() -> None:
    params = AffineParams(torch.tensor([0.1, 3.0]), torch.tensor([3, -9], dtype=torch.int32), 4)
    weight = torch.randn(2, 500) * torch.tensor([[0.5], [20.0]])
    scale, zero_point = params.scale[:, None], params.zero_point[:, None]
    one, two = neighbours(weight, scale, zero_point, 15)
    assert torch.equal(one.int(), quantize(weight, params))
    low, high = ((c(one, two) - zero_point) * scale for c in (torch.minimum, torch.maximum))
    inside = (weight / scale + zero_point > 0) & (weight / scale + zero_point < 15)
    assert bool(inside.any())
    assert bool((low <= weight + 1e-5)[inside].all())
    assert bool((high >= weight - 1e-5)[inside].all())
    assert torch.equal((one - two).abs()[inside], torch.ones(int(inside.sum())))
    assert torch.equal(one[~inside], two[~inside])

"""Rounding refinement against every assignment there is, and against the published loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from erq.reduce.rounding import refine_greedy, refine_official


def problem(n: int, rows: int, seed: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rounding errors, steps to the other neighbour, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + 0.5 * torch.randn(n, n, generator=generator) / n**0.5
    x = torch.randn(4 * n, n, generator=generator) @ mix + torch.randn(n, generator=generator)
    moment = x.t() @ x / len(x) * (size / n)
    scale = torch.rand(rows, 1, generator=generator) + 0.1
    error = (torch.rand(rows, n, generator=generator) - 0.5) * scale
    return error, torch.where(error > 0, -scale, scale), moment


def proxy(error: Tensor, moment: Tensor) -> Tensor:
    e = error.double()
    return ((e @ moment.double()) * e).sum(dim=-1)


def apply(error: Tensor, step: Tensor, flipped: Tensor) -> Tensor:
    return torch.where(flipped, error + step, error)


def test_greedy_is_near_the_best_of_all_assignments() -> None:
    error, step, moment = problem(n=8, rows=60, seed=1)
    choices = torch.tensor(list(itertools.product([False, True], repeat=8)))
    every = torch.where(choices[:, None], error + step, error)  # [256, rows, 8]
    best = proxy(every, moment).amin(dim=0)
    greedy = proxy(apply(error, step, refine_greedy(error, step, moment)), moment)
    nearest = proxy(error, moment)
    assert bool((greedy >= best * (1 - 1e-5)).all())
    found = greedy <= best * (1 + 1e-4)
    assert float(found.float().mean()) > 0.6
    assert float((nearest <= best * (1 + 1e-4)).float().mean()) < 0.4  # there was something to find


@pytest.mark.parametrize("n", [1, 2, 8, 40])
def test_greedy_ends_in_a_local_optimum_no_worse_than_nearest(n: int) -> None:
    error, step, moment = problem(n, rows=30, seed=n)
    flipped = refine_greedy(error, step, moment)
    final = apply(error, step, flipped)
    now, before = proxy(final, moment), proxy(error, moment)
    assert bool((now <= before).all())
    tolerance = 1e-5 * (error.double().square() @ moment.diagonal().double())
    for j in range(n):
        one = final.clone()
        one[:, j] += torch.where(flipped[:, j], -step[:, j], step[:, j])
        assert bool((proxy(one, moment) >= now - tolerance).all())


def test_greedy_takes_flips_back_where_that_pays() -> None:
    """Some optimum is out of reach of a search that never undoes a flip."""
    undone = 0
    for seed in range(40):
        error, step, moment = problem(n=12, rows=20, seed=seed)
        first_only = torch.zeros_like(error, dtype=torch.bool)
        current = error.clone()
        for _ in range(12):
            change = step * 2 * (current @ moment) + step.square() * moment.diagonal()
            change[first_only] = 0
            gain, j = change.min(dim=1)
            rows = (gain < 0).nonzero()[:, 0]
            current[rows, j[rows]] += step[rows, j[rows]]
            first_only[rows, j[rows]] = True
        greedy = apply(error, step, refine_greedy(error, step, moment))
        undone += int((proxy(greedy, moment) < proxy(current, moment) * (1 - 1e-4)).sum())
    assert undone > 0


@pytest.mark.parametrize("refine", [refine_greedy, refine_official])
def test_a_weight_without_another_neighbour_never_flips(refine: object) -> None:
    error, step, moment = problem(n=10, rows=20, seed=3, size=30.0)
    assert bool(refine(error, step, moment).any())  # type: ignore[operator]
    fixed = torch.rand(20, 10) < 0.5
    flipped = refine(error, step.masked_fill(fixed, 0.0), moment)  # type: ignore[operator]
    assert not flipped[fixed].any()
    assert not refine(error, torch.zeros_like(step), moment).any()  # type: ignore[operator]


@pytest.mark.parametrize("refine", [refine_greedy, refine_official])
def test_inputs_stay_and_empty_is_fine(refine: object) -> None:
    error, step, moment = problem(n=6, rows=5, seed=0, size=30.0)
    copies = error.clone(), step.clone(), moment.clone()
    refine(error, step, moment)  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip((error, step, moment), copies, strict=True))
    assert refine(error[:0], step[:0], moment).shape == (0, 6)  # type: ignore[operator]
    assert not refine(error, step, torch.zeros(6, 6)).any()  # type: ignore[operator]


def published_refinement(d: Tensor, floor: Tensor, ceil: Tensor, c: Tensor) -> Tensor:
    """The published loop for one row, all hundred steps of it; returns the final errors."""
    d = d.clone()
    for _ in range(100):
        g = 2 * d @ c
        g[torch.sign(d) != torch.sign(g)] = 0
        j = int(g.abs().argmax())
        to_ceil, to_floor = abs(d[j] - g[j] - ceil[j]), abs(d[j] - g[j] - floor[j])
        candidate = d.clone()
        candidate[j] = ceil[j] if to_ceil <= to_floor else floor[j]
        if candidate @ c @ candidate <= d @ c @ d:
            d = candidate
    return d


@pytest.mark.parametrize("size", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("n", [1, 7, 20])
def test_official_rule_equals_the_published_loop(n: int, size: float) -> None:
    error, step, moment = problem(n, rows=40, seed=n, size=size)
    flipped = refine_official(error, step, moment)
    got = apply(error, step, flipped).double()
    other = error + step
    floor, ceil = torch.minimum(error, other).double(), torch.maximum(error, other).double()
    for row in range(40):
        expected = published_refinement(error[row].double(), floor[row], ceil[row], moment.double())
        torch.testing.assert_close(got[row], expected)
    if size == 50.0 and n > 1:
        assert flipped.float().mean() > 0.02


def test_official_rule_makes_no_more_flips_than_asked() -> None:
    error, step, moment = problem(n=20, rows=30, seed=5, size=50.0)
    one = refine_official(error, step, moment, flips=1)
    assert int(one.sum(dim=1).max()) == 1
    assert int(refine_official(error, step, moment).sum(dim=1).max()) > 1

"""Rounding refinement: flip roundings of a row so that the error of its output shrinks.

For a row with rounding errors d, the output error over the data is d C dᵀ with C the second moments
of the inputs. Moving weight j to its other neighbour changes it by 2 t g_j + t² C_jj, g = dC, t the
step.
Source: method.md §7.2 (the paper's proxy), docs/math.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refine_greedy(error: Tensor, step: Tensor, moment: Tensor) -> Tensor:
    """Take the best flip of every row until none helps; a flip can be taken back.

    Args:
        error: fp32 [N, n], value of the rounded weight minus the weight.
        step: fp32 [N, n], change of value when a weight goes to its other neighbour, 0 if it has
            none.
        moment: fp32 [n, n], second moments of the inputs, positive semi-definite.

    Returns:
        bool [N, n]: which weights end on their other neighbour.
    """
    gradient = 2 * (error @ moment)
    curvature = step.square() * moment.diagonal()
    # Changes below rounding noise of the proxy are no gain.
    tiny = torch.finfo(error.dtype).tiny
    floor = -1e-6 * (error.square() @ moment.diagonal()).clamp(min=tiny)
    step = step.clone()
    flipped = torch.zeros_like(error, dtype=torch.bool)
    active = torch.arange(len(error), device=error.device)
    # Every accepted flip lowers a sum that is bounded below, so the loop ends; the bound guards
    # against rounding noise.
    for _ in range(10 * error.shape[1]):
        best, index = torch.addcmul(curvature, step, gradient).min(dim=1)
        going = best < floor
        count = int(going.sum())
        if not count:
            break
        if 4 * count < 3 * len(active):  # finished rows are carried along until they are many
            active, floor, index = active[going], floor[going], index[going]
            step, gradient, curvature = step[going], gradient[going], curvature[going]
            going = going[going]
        place = index[:, None]
        old = step.gather(1, place)
        taken = torch.where(going[:, None], old, 0.0)
        gradient.addcmul_(2 * taken, moment[index])
        step.scatter_(1, place, old - 2 * taken)
        flipped[active, index] ^= going
    return flipped


def refine_official(error: Tensor, step: Tensor, moment: Tensor, flips: int = 100) -> Tensor:
    """The published rule: per step the weight of largest |gradient| moves, if |gradient| > step/2.

    A row stops at its first rejected or empty move.

    Args:
        error, step, moment: as in `refine_greedy`; moment is μμᵀ + Cov.
        flips: moves a row makes at most.

    Returns:
        bool [N, n]: which weights end on their other neighbour.
    """
    flipped = torch.zeros_like(error, dtype=torch.bool)
    active = torch.arange(error.shape[0], device=error.device)
    error, step = error.clone(), step.clone()
    for _ in range(flips):
        gradient = 2 * (error @ moment)
        gradient[torch.sign(error) != torch.sign(gradient)] = 0
        index = gradient.abs().argmax(dim=1)
        rows = torch.arange(len(active), device=error.device)
        d, t, g = error[rows, index], step[rows, index], gradient[rows, index]
        # The rule moves to whichever of floor and ceil is nearer to d − g.
        target = d - g
        other = d + t
        moves = (target - other).abs() < (target - d).abs()
        # At equal distance it takes ceil: the neighbour of larger value.
        moves |= ((target - other).abs() == (target - d).abs()) & (t > 0)
        change = t * g + t.square() * moment.diagonal()[index]
        accepted = moves & (change <= 0) & (t != 0)
        keep = accepted.nonzero()[:, 0]
        if not len(keep):
            break
        active, error, step, index = active[keep], error[keep], step[keep], index[keep]
        rows = rows[: len(keep)]
        taken = step[rows, index]
        error[rows, index] += taken
        step[rows, index] = -taken
        flipped[active, index] ^= True
    return flipped

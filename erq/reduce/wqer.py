"""Wqer, weight quantization error reduction: quantize half of the columns, let the rest make up for
it.

Source: the paper's second step; method.md §7. Each round rounds the first half of the free columns
(with rounding refinement), then updates the remaining columns and the bias by ridge regression:
W_r ← W_r − δ_s G_sr (G_rr + λI)⁻¹. One Cholesky factor serves all rounds (`Ridge`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from erq.quant import WeightParams
from erq.quant.functional import element_params
from erq.reduce.gram import Gram
from erq.reduce.ridge import Ridge
from erq.reduce.rounding import refine_greedy, refine_official


def neighbours(
    weight: Tensor, scale: Tensor, zero_point: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """The nearest code of every weight and the next nearest one on the other side.

    Args:
        weight: float [N, n]. scale, zero_point: broadcastable to it. top: largest code.

    Returns:
        fp32 codes [N, n] twice; both are equal where the weight is clipped.
    """
    exact = weight.float() * scale.reciprocal() + zero_point
    nearest = exact.round().clamp_(0, top)
    other = (nearest + torch.sign(exact - nearest)).clamp_(0, top)
    inside = (exact >= 0) & (exact <= top)
    return nearest, torch.where(inside, other, nearest)


def wqer(
    gram: Gram,
    weight: Tensor,
    params: WeightParams,
    ridge: Ridge,
    refine: str,
) -> tuple[Tensor, Tensor]:
    """Codes and bias of least output error.

    Args:
        gram: statistics of the layer.
        weight: fp64 [N, D + 1], bias last.
        params: the weight's quantizer.
        ridge: of these statistics; without the constant input the bias stays.
        refine: greedy, official or off.

    Returns:
        int32 codes [N, D] and the fp64 bias [N].
    """
    d = gram.columns
    n = ridge.size
    current = weight[:, :n].clone()
    shape = weight[:, :d].shape
    scale, zero_point = (p.expand(shape) for p in element_params(params, shape))
    codes = torch.empty(weight.shape[0], d, dtype=torch.int32, device=weight.device)
    start = 0
    while start < d:
        free = n - start
        stop = d if free == 1 else start + free // 2
        columns = slice(start, stop)
        value, s, z = current[:, columns], scale[:, columns], zero_point[:, columns]
        code, other = neighbours(value, s, z, 2**params.bits - 1)
        grid = (code - z).double() * s
        if refine != "off":
            moment = _moment(gram, columns, ridge, refine)
            refiner = refine_official if refine == "official" else refine_greedy
            flip = refiner((grid - value).float(), (other - code) * s, moment)
            code = torch.where(flip, other, code)
            grid = (code - z).double() * s
        codes[:, columns] = code.to(torch.int32)
        if stop < n:
            rhs = gram.g[stop:n, columns] @ (grid - value).t()
            current[:, stop:] -= ridge.solve(rhs, stop).t()
        start = stop
    bias = current[:, d] if n > d else weight[:, d]
    return codes, bias


def _moment(gram: Gram, columns: slice, ridge: Ridge, refine: str) -> Tensor:
    """The quadratic form, fp32 [s, s], that the rounding of `columns` minimizes."""
    if refine == "greedy":
        return (ridge.remaining(columns) / gram.rows).float()
    # The published proxy: μμᵀ plus the unbiased covariance, remaining columns left out.
    moment = gram.g[columns, columns] / gram.rows
    mean = gram.g[-1, columns] / gram.rows
    outer = mean[:, None] * mean[None, :]
    return (outer + (moment - outer) * (gram.rows / max(gram.rows - 1, 1))).float()

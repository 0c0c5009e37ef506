"""GPTQ, the baseline: round column by column, later columns make up for earlier ones' errors."""

from __future__ import annotations

import torch
from torch import Tensor

from erq.quant import WeightParams
from erq.quant.functional import element_params
from erq.reduce.gram import Gram
from erq.reduce.ridge import factor


def gptq(
    gram: Gram, weight: Tensor, params: WeightParams, damp: float = 0.01, group: int = 64
) -> Tensor:
    """Codes by optimal brain surgeon, one column at a time: the GPTQ baseline.

    Args:
        gram: statistics of the layer's quantized inputs.
        weight: fp64 [N, D].
        damp: share of the mean diagonal added to it, as in the published method.
        group: columns whose updates are applied lazily together; a matter of speed only.

    Returns:
        int32 codes [N, D].

    Source: Frantar et al., GPTQ, arXiv 2210.17323.
    """
    d = gram.columns
    h = gram.g[:d, :d]
    lower = factor(h, damp * float(h.diagonal().mean()))
    inverse = torch.cholesky_inverse(lower)
    upper = torch.linalg.cholesky(inverse, upper=True)
    current = weight.clone()
    scale, zero_point = element_params(params, weight.shape)
    scale, zero_point = scale.expand_as(weight), zero_point.expand_as(weight)
    top = 2**params.bits - 1
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    for start in range(0, d, group):
        stop = min(start + group, d)
        errors = torch.empty(
            weight.shape[0], stop - start, dtype=weight.dtype, device=weight.device
        )
        for j in range(start, stop):
            exact = current[:, j].float() * scale[:, j].reciprocal()
            code = (exact.round() + zero_point[:, j]).clamp(0, top)
            codes[:, j] = code.to(torch.int32)
            value = (code - zero_point[:, j]).double() * scale[:, j].double()
            error = (current[:, j] - value) / upper[j, j]
            current[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            errors[:, j - start] = error
        current[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes

"""quantize, dequantize and fake_quantize over params, on integer codes.

`fake_quantize` is `dequantize(quantize(x))`, so a quantizer can never have more than 2**bits
values, and simulation and deployment cannot drift apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from erq.quant.params import AffineParams, DualAffineParams, LogParams, Params


def expand_dual(params: DualAffineParams, k: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element of a [N, k] weight matrix under a dual quantizer.

    Returns:
        scale fp32 [N, k] and zero_point int32 [N, k].
    """
    n = params.rest.scale.shape[0]
    scale = params.rest.scale[:, None].expand(n, k).clone()
    zero_point = params.rest.zero_point[:, None].expand(n, k).clone()
    scale[:, params.columns] = params.outlier.scale[:, None]
    zero_point[:, params.columns] = params.outlier.zero_point[:, None]
    return scale, zero_point


def element_params(
    params: AffineParams | DualAffineParams, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Scale and zero point broadcastable to a tensor of `shape`.

    A scale [N] belongs to the rows of a 2-d tensor [N, K].
    """
    if isinstance(params, DualAffineParams):
        return expand_dual(params, shape[1])
    if params.scale.dim() == 0:
        return params.scale, params.zero_point
    return params.scale[:, None], params.zero_point[:, None]


def quantize(x: Tensor, params: Params) -> Tensor:
    """Codes of `x`, every one in 0..2**bits − 1.

    Args:
        x: float, any shape for scalar params, [N, K] for params per row.

    Returns:
        int32 codes of x's shape. NaN has no code: callers check inputs (`erq.data`).
    """
    top = 2**params.bits - 1
    if isinstance(params, LogParams):
        # x = 0 gives +inf, which clamps to the last code; a negative input (impossible after a
        # softmax) would give NaN.
        exponent = (-2.0 * torch.log2(x.float() * params.scale.reciprocal())).round()
        return exponent.clamp(0, top).to(torch.int32)
    scale, zero_point = element_params(params, x.shape)
    code = (x.float() * scale.reciprocal()).round() + zero_point
    return code.clamp(0, top).to(torch.int32)


def dequantize(codes: Tensor, params: Params) -> Tensor:
    """Values of `codes` in fp32, same shape."""
    if isinstance(params, LogParams):
        value = params.scale * torch.exp2(-0.5 * codes.float())
        if params.zero_last:
            value = value.masked_fill(codes == 2**params.bits - 1, 0.0)
        return value
    scale, zero_point = element_params(params, codes.shape)
    return (codes - zero_point).float() * scale


def fake_quantize(x: Tensor, params: Params) -> Tensor:
    """The value that the code of `x` stands for: dequantize(quantize(x))."""
    return dequantize(quantize(x, params), params)

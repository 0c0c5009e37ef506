"""Reparameterization: a per-channel activation quantizer behind a LayerNorm becomes per-tensor, as
does one behind an activation function to the layer that reads its codes.

Source: RepQ-ViT's scale reparameterization as used by ERQ (method.md §4; docs/math.md). The mean
zero point is rounded first: the folded quantizer then equals the per-channel one and has 2**bits
levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erq.calib.simulate import SimLinear
from erq.quant import AffineParams


@dataclass(frozen=True)
class Fold:
    """x' = x / ratio − shift: what folding does to the output of a LayerNorm.

    Args:
        ratio: fp32 [C], > 0. shift: fp32 [C].
        params: the per-tensor quantizer of x'.
    """

    ratio: Tensor
    shift: Tensor
    params: AffineParams

    def apply(self, x: Tensor) -> Tensor:
        """The folded network's value of an unfolded activation [..., C]."""
        return x / self.ratio - self.shift

    @property
    def channels(self) -> AffineParams:
        """The per-channel quantizer [C] of an unfolded activation, with the folded one's codes."""
        zero_point = self.params.zero_point - (self.shift / self.params.scale).round().int()
        return AffineParams(self.ratio * self.params.scale, zero_point, self.params.bits)


def plan_fold(channels: AffineParams) -> Fold:
    """The fold that turns per-channel params [C] into per-tensor ones."""
    scale, zero_point = channels.scale, channels.zero_point
    mean_scale = scale.mean()
    mean_zero = zero_point.float().mean().round()
    ratio = scale / mean_scale
    # The lower ends of the ranges, −z_c s_c / r_c = −z_c s~ and −z~ s~, must coincide.
    shift = (mean_zero - zero_point.float()) * mean_scale
    params = AffineParams(mean_scale, mean_zero.to(torch.int32), channels.bits)
    return Fold(ratio, shift, params)


@torch.no_grad()
def apply_fold(fold: Fold, norm: nn.LayerNorm, linears: list[SimLinear]) -> None:
    """Fold into the norm's affine parameters and the weights of the layers it feeds, in place."""
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    norm.weight = nn.Parameter(norm.weight / fold.ratio, requires_grad=False)
    norm.bias = nn.Parameter(bias / fold.ratio - fold.shift, requires_grad=False)
    for linear in linears:
        _take_folded(fold, linear)


@torch.no_grad()
def fold_input(fold: Fold, linear: SimLinear) -> None:
    """Fold into the layer alone, in place: its input stays and is quantized channel by channel."""
    _take_folded(fold, linear)
    linear.x_channels = fold.channels


def _take_folded(fold: Fold, linear: SimLinear) -> None:
    weight = linear.weight * fold.ratio
    shift = weight @ fold.shift
    linear.set_weight(weight, shift if linear.bias is None else linear.bias + shift)
    linear.x_params = fold.params

"""Simulated modules: they hold quantizers and compute what the deployed kernels will compute.

Before its weights are solved a module fake-quantizes only what has params. `freeze` makes a linear
layer run on integer codes through the reference kernels, the same arithmetic as deployment, so that
a simulated and a deployed model give the same codes at every site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erq.models.attention import ScaledScores
from erq.models.patches import patches
from erq.quant import (
    AffineParams,
    DualAffineParams,
    LogParams,
    WeightParams,
    dequantize,
    quantize,
)
from erq_kernels import reference
from erq_kernels.formats import GemmOperands, center, code_offset, gemm_operands

T = TypeVar("T")


def _move_tensors(value: T, fn: Callable[[Tensor], Tensor]) -> T:
    """The dataclass `value` with every tensor in it on the device that `fn` moves it to.

    Its dtype and so its value stay: a quantizer whose scale went through half precision is another.
    """
    if isinstance(value, Tensor):
        return value.to(fn(value).device)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _move_tensors(getattr(value, f.name), fn) for f in fields(value)}
        )
    return value


class _Simulated(nn.Module):
    """A module whose quantizer values follow it to other devices."""

    _values: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._values:
            setattr(self, name, _move_tensors(getattr(self, name), fn))
        return self


def outlier_split(
    params: WeightParams,
) -> tuple[AffineParams, AffineParams | None, Tensor | None]:
    """(params of all or of the remaining columns, params of the outlier columns, the columns)."""
    if isinstance(params, DualAffineParams):
        return params.rest, params.outlier, params.columns
    return params, None, None


class _SimWeight(_Simulated):
    """A module with a weight matrix [N, K], a bias, and quantizers of its weight and its input.

    Attributes:
        x_params: per-tensor activation quantizer, or None for float activations.
        x_channels: per-channel quantizer [K] whose codes mean, with x_params, the input that the
            weight was folded for (`Fold`); None where x_params itself makes the codes.
        w_params: weight quantizer, or None while the weight is in full precision.
        operands: GEMM operands once frozen, else None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x_params: AffineParams | None
    x_channels: AffineParams | None
    w_params: WeightParams | None
    operands: GemmOperands | None

    _values = ("x_params", "x_channels", "w_params", "operands")

    def _set_float(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )
        self.x_params = self.x_channels = self.w_params = self.operands = None

    def set_weight(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replace weight [N, K] and bias; a bias may come into being."""
        self.weight.data = weight.to(self.weight.dtype)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)

    def freeze(self) -> None:
        """Run on integer codes from now on (float activations stay on the float path).

        Raises:
            ValueError: a weight that is not on the grid of w_params.
        """
        assert self.w_params is not None
        codes = quantize(self.weight, self.w_params)
        check_on_grid(self.weight, codes, self.w_params)
        if self.x_params is None:
            return
        plain, outlier, columns = outlier_split(self.w_params)
        weight = center(
            codes.to(torch.uint8),
            self.w_params.bits,
            plain.zero_point,
            None if outlier is None else outlier.zero_point,
            columns,
        )
        self.operands = gemm_operands(
            weight,
            codes.shape[1],
            plain.scale,
            self.bias,
            self.x_params.scale,
            self.x_params.zero_point,
            self.x_params.bits,
            None if outlier is None else outlier.scale,
            columns,
        )

    def product(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N], on codes once frozen."""
        encode, decode = self.x_channels or self.x_params, self.x_params
        if encode is None or decode is None:
            return F.linear(x, self.weight, self.bias)
        if self.operands is not None:
            return run_gemm(x, encode, self.operands)
        codes = reference.quantize(x, encode.inv_scale, encode.zero_point, encode.bits)
        values = (codes.float() - (decode.zero_point - code_offset(decode.bits))) * decode.scale
        return F.linear(values, self.weight, self.bias)


class SimLinear(_SimWeight):
    """A linear layer with an activation quantizer and a weight quantizer.

    Args:
        weight: fp32 [N, K]; bias: fp32 [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._set_float(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return self.product(x)


def run_gemm(x: Tensor, encode: AffineParams, operands: GemmOperands) -> Tensor:
    """Quantize [..., K] and multiply by frozen operands with the reference kernels: [..., N]."""
    flat = x.reshape(-1, x.shape[-1])
    codes = reference.quantize(flat, encode.inv_scale, encode.zero_point, encode.bits)
    if operands.order is not None:
        codes = codes.index_select(1, operands.order)
    y = reference.qlinear(
        codes, operands.weight, operands.scale, operands.scale2, operands.split, operands.bias
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def check_on_grid(weight: Tensor, codes: Tensor, params: WeightParams) -> None:
    """Raise ValueError unless weight equals the value of its codes exactly."""
    if not torch.equal(dequantize(codes, params), weight):
        raise ValueError("weight is not on the grid of its quantizer: solve the site first")


class SimConv2d(_SimWeight):
    """A patch embedding (stride = kernel, no padding) as a linear layer [N, C·kh·kw] on patches."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
        self.in_channels = conv.in_channels
        self._set_float(conv.weight.reshape(conv.out_channels, -1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, N, H/kh, W/kw]."""
        y = self.product(patches(x, self.kernel_size))
        grid = (x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1])
        return y.transpose(1, 2).reshape(x.shape[0], -1, *grid)


class SimScores(_Simulated):
    """q·kᵀ with quantized operands: the site `qk`. Float until it has params."""

    _values = ("q_params", "k_params")

    def __init__(self, source: ScaledScores) -> None:
        super().__init__()
        self.temperature = source.temperature
        self.q_params: AffineParams | None = None
        self.k_params: AffineParams | None = None

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, T, D] twice → [B, H, T, T]."""
        if self.q_params is None or self.k_params is None:
            return (q @ k.transpose(-2, -1)) * self.temperature
        a, b = self.q_params, self.k_params
        return reference.attention_scores(
            reference.quantize(q, a.inv_scale, a.zero_point, a.bits),
            reference.quantize(k, b.inv_scale, b.zero_point, b.bits),
            a.zero_point,
            b.zero_point,
            (a.bits, b.bits),
            score_scale(a, b, self.temperature),
        )


def score_scale(q: AffineParams, k: AffineParams, temperature: float) -> Tensor:
    """fp32 []: s_q · s_k · temperature, the factor of integer scores."""
    return q.scale * k.scale * temperature


class SimValues(_Simulated):
    """softmax·v with log-√2 codes and quantized v: the site `av`. Float until it has params."""

    _values = ("p_params", "v_params")

    def __init__(self) -> None:
        super().__init__()
        self.p_params: LogParams | None = None
        self.v_params: AffineParams | None = None

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, T], [B, H, T, D] → [B, H, T, D]."""
        if self.p_params is None or self.v_params is None:
            return p @ v
        a, b = self.p_params, self.v_params
        return reference.attention_values(
            reference.quantize_softmax(p, a.scale.reciprocal(), a.bits),
            reference.quantize(v, b.inv_scale, b.zero_point, b.bits),
            b.zero_point,
            a.bits,
            b.bits,
            a.zero_last,
            a.scale * b.scale,
        )

"""Deployed modules: packed codes and scales as buffers, kernels to run them.

Persistent buffers are what a checkpoint holds, under the names of api "Checkpoint". Layouts that
kernels read are made from them by `repack` when a module is created or loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from erq.config import FLOAT_BITS, QuantConfig, as_config
from erq.models.attention import Attention
from erq.models.patches import patches
from erq.quant import AffineParams, DualAffineParams, LogParams, WeightParams, quantize
from erq.quant.fit import fit_weight
from erq_kernels import dispatch, ops
from erq_kernels.formats import (
    GemmOperands,
    check_centered,
    gemm_operands,
    order_packed,
    pack,
    pack_weight,
    packed_size,
    unpack,
)
from erq_kernels.reference import dequantize_weight

LAYOUTS = ("int8", "packed")
"""How an integer GEMM's weight is kept: unpacked once, or packed and unpacked in the kernel."""

# fp32 adds a zero point of smaller magnitude to a rounded value without rounding again.
_ZERO_POINT_LIMIT = 1 << 24
# Sums of attention's products stay inside int32 up to 4,096 tokens and heads of 113 channels.
_ATTENTION_ZERO_POINT_LIMIT = 1 << 12

_NO_OPERANDS = (
    "no integer operands: a layer with float activations (a_bits=16) has none, an empty one gets "
    "them from from_params, from_linear or a state dict"
)


def check_layout(layout: str) -> str:
    """Return `layout` if it is one of LAYOUTS; raise ValueError otherwise."""
    if layout not in LAYOUTS:
        raise ValueError(f"weights are kept as one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


def move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` on the device that `fn` puts it, its dtype and values kept."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def _check_scale(name: str, scale: Tensor | None) -> None:
    if scale is None:
        return
    # Values are multiplied by 1 / scale, which overflows for the smallest numbers of fp32.
    good = torch.isfinite(scale) & (scale > 0) & torch.isfinite(scale.reciprocal())
    if not bool(good.all()):
        bad = float(scale.reshape(-1)[~good.reshape(-1)][0])
        raise ValueError(f"{name} must be finite and > 0, and so must its reciprocal, got {bad}")


def _check_zero_point(name: str, zero_point: Tensor | None, limit: int = _ZERO_POINT_LIMIT) -> None:
    if zero_point is not None and bool((zero_point.long().abs() >= limit).any()):
        worst = int(zero_point.long().abs().max())
        raise ValueError(
            f"{name} must be below 2**{limit.bit_length() - 1} in magnitude, got one of {worst:,}"
        )


def not_finite(x: Tensor, dim: int | list[int]) -> Tensor:
    """What a result of `x` is marked with: fp32, 0, or NaN where `x` holds NaN or infinity.

    Codes have no NaN: without this mark a plausible result would come of it. It costs no more than
    reading `x` and waits for no device.

    Args:
        dim: dimensions that share one result; they are kept, with size 1.
    """
    # Infinity, and a sum beyond fp32, times 0 is NaN.
    values = x.detach() if x.requires_grad else x
    return values.sum(dim, keepdim=True, dtype=torch.float32) * 0.0


class _Deployed(nn.Module):
    """A module with a backend, whose buffers keep their dtype under `.half()` and the like."""

    backend: str = "auto"

    def repack(self) -> None:
        """Check the buffers and make what the kernels read from them.

        Raises:
            ValueError: a value that no quantizer has; the text starts with the buffer's name.
        """
        raise NotImplementedError

    def _derive(self, **tensors: Tensor | None) -> None:
        """Keep what is made of the buffers: it moves with them and is never saved."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Scales rounded to fp16 would be others: only the device follows.
        return super()._apply(lambda t: move(t, fn), recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        before = len(missing_keys) + len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(missing_keys) + len(error_msgs) == before:
            try:
                self.repack()
            except ValueError as error:
                raise ValueError(f"{prefix}{error}") from error


class _PackedWeight(_Deployed):
    """Packed weight codes [out_features, in_features] with their scales.

    Buffers:
        packed: uint8 dense bit stream. scale, zero_point: fp32 / int32 [N].
        scale2, zero_point2, dual_columns: fp32 / int32 [N] of the outlier columns int64 [S], dual
            scheme only. bias: fp32 [N] or None.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    scale2: Tensor | None
    zero_point2: Tensor | None
    dual_columns: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, w_bits: int, dual: int, bias: bool
    ) -> None:
        """Allocate empty buffers; `dual` is the number of outlier columns, 0 for a plain scheme."""
        super().__init__()
        self.in_features, self.out_features, self.w_bits = in_features, out_features, w_bits
        n = out_features
        size = packed_size(n * in_features, w_bits)
        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(n))
        self.register_buffer("zero_point", torch.zeros(n, dtype=torch.int32))
        columns = torch.arange(dual)
        self.register_buffer("scale2", torch.ones(n) if dual else None)
        self.register_buffer("zero_point2", torch.zeros(n, dtype=torch.int32) if dual else None)
        self.register_buffer("dual_columns", columns if dual else None)
        self.register_buffer("bias", torch.zeros(n) if bias else None)

    def set_weight(self, weight: Tensor, params: WeightParams, bias: Tensor | None) -> None:
        """Fill the buffers from a weight [N, K] that lies on the grid of `params`, and its bias."""
        plain = params.rest if isinstance(params, DualAffineParams) else params
        self.packed = pack(quantize(weight, params), self.w_bits)
        self.scale, self.zero_point = plain.scale.clone(), plain.zero_point.clone()
        if isinstance(params, DualAffineParams):
            self.scale2 = params.outlier.scale.clone()
            self.zero_point2 = params.outlier.zero_point.clone()
            self.dual_columns = params.columns.clone()
        self.bias = None if bias is None else bias.detach().clone().float()

    @property
    def scheme(self) -> str:
        """`dual` or `affine`."""
        return "affine" if self.dual_columns is None else "dual"

    def weight_codes(self) -> Tensor:
        """uint8 codes [N, K]."""
        return unpack(self.packed, self.w_bits, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """fp32 [N, K], the values of the codes, for models that read a weight themselves."""
        return dequantize_weight(
            self.packed,
            self.w_bits,
            (self.out_features, self.in_features),
            self.scale,
            self.zero_point,
            self.scale2,
            self.zero_point2,
            self.dual_columns,
        )

    def repack(self) -> None:
        """Check the buffers; the packed codes themselves are what the kernels read.

        Raises:
            ValueError: a value that no quantizer has; the text starts with the buffer's name.
        """
        _check_scale("scale", self.scale)
        _check_scale("scale2", self.scale2)
        columns = self.dual_columns
        if columns is not None:
            inside = bool((columns >= 0).all()) and bool((columns < self.in_features).all())
            if not inside or not bool((columns.diff() > 0).all()):
                shown = ", ".join(str(int(c)) for c in columns[:8])
                raise ValueError(
                    f"dual_columns must be sorted, distinct and inside 0..{self.in_features - 1}, "
                    f"got {shown}{', …' if len(columns) > 8 else ''}"
                )
        if self.bias is not None and not bool(torch.isfinite(self.bias).all()):
            raise ValueError("bias must be finite, got NaN or infinite values")
        check_centered(self.weight_codes, self.w_bits, self.zero_point, self.zero_point2, columns)

    def _rows(self, x: Tensor) -> Tensor:
        """[..., K] → [M, K].

        Raises:
            ValueError: another last dimension.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the layer takes [..., {self.in_features}], got a tensor {list(x.shape)}"
            )
        if x.layout is not torch.strided:
            raise ValueError(f"the layer takes a dense tensor, got one of {x.layout}")
        return x.reshape(-1, self.in_features)

    def _linear(self, x: Tensor) -> Tensor:
        """Weight-only product for float rows [..., K]."""
        y = ops.dequant_linear(
            self._rows(x),
            self.packed,
            self.w_bits,
            self.scale,
            self.zero_point,
            self.scale2,
            self.zero_point2,
            self.dual_columns,
            self.bias,
            self.backend,
        )
        return y.reshape(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def kernel(self) -> str:
        """The backend that runs this layer's product on its device.

        Raises:
            BackendError: a forced backend cannot run the layer.
        """
        x = torch.empty(1, self.in_features, device=self.packed.device)
        args = (
            x, self.packed, self.w_bits, self.scale, self.zero_point, self.scale2,
            self.zero_point2, self.dual_columns, self.bias,
        )  # fmt: skip
        return dispatch.select("dequant_linear", self.backend, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, w_bits={self.w_bits}, "
            f"scheme={self.scheme}, bias={self.bias is not None}, backend={self.backend}"
        )


class QuantLinear(_PackedWeight):
    """A linear layer on packed low-bit weights and b-bit (or float, a_bits=16) activations.

    Buffers besides those of the weight:
        x_scale, x_zero_point: fp32 / int32 [], what the activation's codes mean; None if a_bits is
            16.
        x_channel_scale, x_channel_zero_point: fp32 / int32 [K], the quantizer that makes the codes
            of inputs that the weight was folded for channel by channel; None where x_scale and
            x_zero_point make them.
    """

    x_scale: Tensor | None
    x_zero_point: Tensor | None
    x_channel_scale: Tensor | None
    x_channel_zero_point: Tensor | None
    x_inv_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        w_bits: int,
        a_bits: int = FLOAT_BITS,
        dual: int = 0,
        bias: bool = True,
        channels: bool = False,
    ) -> None:
        """Allocate an empty layer; `dual` is the number of outlier input channels, `channels` says
        whether the codes of its input are made channel by channel."""
        super().__init__(in_features, out_features, w_bits, dual, bias)
        self.a_bits = a_bits
        floating = a_bits == FLOAT_BITS
        self.register_buffer("x_scale", None if floating else torch.tensor(1.0))
        zero = torch.tensor(0, dtype=torch.int32)
        self.register_buffer("x_zero_point", None if floating else zero)
        scales, zeros = torch.ones(in_features), torch.zeros(in_features, dtype=torch.int32)
        self.register_buffer("x_channel_scale", scales if channels else None)
        self.register_buffer("x_channel_zero_point", zeros if channels else None)
        self._derive(x_inv_scale=None)
        self._operands: GemmOperands | None = None
        # The weight of `pack_weight` where the 4-bit kernel runs the layer, else None.
        self._nibbles: tuple[Tensor, Tensor | None] | None = None
        self._layout = "int8"

    @classmethod
    def from_params(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        w_params: WeightParams,
        x_params: AffineParams | None,
        x_channels: AffineParams | None = None,
    ) -> QuantLinear:
        """The layer of a weight [N, K] that lies on the grid of `w_params`.

        Args:
            x_params: per-tensor activation quantizer, or None for float activations.
            x_channels: quantizer [K] that makes the codes in its place, where the weight is folded.
        """
        dual = len(w_params.columns) if isinstance(w_params, DualAffineParams) else 0
        a_bits = FLOAT_BITS if x_params is None else x_params.bits
        n, k = weight.shape
        channels = x_channels is not None
        layer = cls(k, n, w_params.bits, a_bits, dual, bias is not None, channels)
        layer.to(weight.device).set_weight(weight, w_params, bias)
        layer.set_input(x_params, x_channels)
        layer.repack()
        return layer

    def set_input(
        self, x_params: AffineParams | None, x_channels: AffineParams | None = None
    ) -> None:
        """Fill the buffers of the activation quantizer."""
        if x_params is not None:
            # Layers behind one norm share their params, but not their buffers.
            self.x_scale = x_params.scale.clone()
            self.x_zero_point = x_params.zero_point.clone()
        if x_channels is not None:
            self.x_channel_scale = x_channels.scale.clone()
            self.x_channel_zero_point = x_channels.zero_point.clone()

    @property
    def code_zero_point(self) -> Tensor | None:
        """Zero point [] or [K] of the quantizer that makes the codes, beside `x_inv_scale`."""
        channels = self.x_channel_zero_point
        return self.x_zero_point if channels is None else channels

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: QuantConfig | str | Mapping[str, Any],
        x_params: AffineParams | None = None,
    ) -> QuantLinear:
        """One layer by hand: weights rounded to nearest, no data needed for a_bits=16.

        Args:
            linear: the full-precision layer, unchanged.
            config: a QuantConfig, a preset's name or a dict; its w_bits and a_bits count.
            x_params: the activation quantizer, per tensor, required if a_bits < 16.

        Raises:
            ValueError: not a linear layer; x_params missing, of another width than a_bits, or per
                channel.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"from_linear takes an nn.Linear, got a {type(linear).__name__}")
        settings = as_config(config)
        if settings.a_bits == FLOAT_BITS and x_params is not None:
            raise ValueError("a_bits=16 keeps activations float: leave x_params out")
        if settings.a_bits != FLOAT_BITS and (x_params is None or x_params.bits != settings.a_bits):
            got = "none" if x_params is None else f"{x_params.bits} bits"
            raise ValueError(
                f"a_bits={settings.a_bits} needs x_params of that width, got {got}: calibrate the "
                "model with erq.quantize, fit params with erq.quant.fit, or use a_bits=16"
            )
        if x_params is not None and x_params.scale.dim() != 0:
            raise ValueError(
                "x_params must be one scale and one zero point for the whole tensor, got "
                f"{list(x_params.scale.shape)}: fit them with erq.quant.fit.fit_tensor"
            )
        params = fit_weight(linear.weight.detach().float(), settings.w_bits)
        return cls.from_params(linear.weight.detach().float(), linear.bias, params, x_params)

    def repack(self) -> None:
        """Check the buffers and make the layout that the integer GEMM reads from them.

        Raises:
            ValueError: a value that no quantizer has; the text starts with the buffer's name.
        """
        super().repack()
        _check_scale("x_scale", self.x_scale)
        _check_zero_point("x_zero_point", self.x_zero_point)
        _check_scale("x_channel_scale", self.x_channel_scale)
        _check_zero_point("x_channel_zero_point", self.x_channel_zero_point)
        if self.x_scale is None or self.x_zero_point is None:
            return
        weight = ops.repack(
            self.packed,
            self.w_bits,
            self.in_features,
            self.zero_point,
            self.zero_point2,
            self.dual_columns,
            self.backend,
        )
        operands = gemm_operands(
            weight,
            self.in_features,
            self.scale,
            self.bias,
            self.x_scale,
            self.x_zero_point,
            self.a_bits,
            self.scale2,
            self.dual_columns,
        )
        for factor in (operands.scale, operands.scale2, operands.bias):
            if factor is not None and not bool(torch.isfinite(factor).all()):
                raise ValueError("x_scale · scale, or the bias folded with it, overflows fp32")
        if self._layout == "packed":
            n, k = self.out_features, self.in_features
            kept = order_packed(self.packed, self.w_bits, n, k, self.dual_columns)
            operands = replace(operands, weight=kept)
        self._operands = operands
        encode = self.x_scale if self.x_channel_scale is None else self.x_channel_scale
        self._derive(x_inv_scale=encode.reciprocal())
        self._choose_packing()

    @property
    def layout(self) -> str:
        """How the integer GEMM's weight is kept, one of LAYOUTS; results do not depend on it."""
        return self._layout

    @layout.setter
    def layout(self, layout: str) -> None:
        self._layout = check_layout(layout)
        if self._operands is not None:
            self.repack()

    @property
    def gemm(self) -> str:
        """The op that multiplies this layer's codes."""
        return "qlinear_packed" if self._layout == "packed" else "qlinear"

    def _gemm_arguments(self, codes: Tensor) -> tuple[Any, ...]:
        """What that op takes before the epilogue."""
        o = self.operands
        if self._layout == "int8":
            weight = self._nibbles[0] if codes.dtype == torch.uint8 and self._nibbles else o.weight
            return codes, weight, o.scale, o.scale2, o.split, o.bias
        zero_points: tuple[Tensor | None, Tensor | None] = (self.zero_point, None)
        outliers = 0
        if self.dual_columns is not None:
            outliers = self.dual_columns.shape[0]
            zero_points = (self.zero_point2, self.zero_point)
        return (
            codes, o.weight, self.w_bits, self.in_features, outliers, *zero_points, o.scale,
            o.scale2, o.bias,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N], in x's dtype; a row with NaN or infinity gives NaN."""
        if self.x_scale is None:
            return self._linear(x)
        rows = self._rows(x)
        codes = self.quantize(rows)
        y = self.multiply(self.in_gemm_order(codes), out_dtype=x.dtype)
        y += not_finite(rows, -1)
        return y.reshape(*x.shape[:-1], self.out_features)

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of float inputs [..., K], natural order.

        Raises:
            ValueError: an empty layer.
        """
        if self.x_inv_scale is None or self.code_zero_point is None:
            raise ValueError(_NO_OPERANDS)
        return ops.quantize(  # type: ignore[no-any-return]
            x, self.x_inv_scale, self.code_zero_point, self.a_bits, backend=self.backend
        )

    def input_quantizer(self, packed: bool = False) -> dict[str, Any]:
        """The output quantizer of the op that feeds this layer, as its arguments.

        Args:
            packed: codes are to come packed (`packs_codes`).
        """
        quantizer = {
            "out_inv_scale": self.x_inv_scale,
            "out_zero_point": self.code_zero_point,
            "out_bits": self.a_bits,
        }
        return quantizer | {"out_packed": True} if packed else quantizer

    def packs_codes(self) -> bool:
        """Whether a kernel for packed 4-bit codes [M, K' / 2] runs this layer on its device."""
        return self._nibbles is not None and dispatch.chosen(self.backend) in ("auto", "cuda")

    def _choose_packing(self) -> None:
        """Pack the weight for the 4-bit kernel if that runs the layer: once, not on every call."""
        self._nibbles = None
        narrow = max(self.w_bits, self.a_bits) <= 4 and self._layout == "int8"
        if self._operands is None or not narrow:
            return
        if dispatch.chosen(self.backend) not in ("auto", "cuda"):
            return
        # Asked of int8 operands first: where the library cannot run, no weight is packed for it.
        arguments = self._gemm_arguments(self._operands.weight[:1])
        if dispatch.why_not("qlinear", "cuda", *arguments) is not None:
            return
        nibbles = pack_weight(self._operands.weight, self._operands.split)
        if nibbles is None:
            return
        weight, offset = nibbles
        arguments = (weight[:1], weight, *arguments[2:])
        if dispatch.why_not("qlinear", "cuda", *arguments, weight_offset=offset) is not None:
            return
        chosen = dispatch.select("qlinear", self.backend, *arguments, weight_offset=offset)
        self._nibbles = nibbles if chosen == "cuda" else None

    @property
    def operands(self) -> GemmOperands:
        """What the integer GEMM reads.

        Raises:
            ValueError: a layer with float activations has none, nor has an empty one.
        """
        if self._operands is None:
            raise ValueError(_NO_OPERANDS)
        return self._operands

    def in_gemm_order(self, codes: Tensor) -> Tensor:
        """Codes [M, K] in natural order → [M, K'] as the GEMM reads them."""
        order = self.operands.order
        return codes if order is None else codes.index_select(1, order)

    def multiply(self, codes: Tensor, **epilogue: Any) -> Tensor:
        """`ops.qlinear` of codes [M, K'] in GEMM order with this layer's weight: [M, N].

        Args:
            codes: int8, or packed where the layer `packs_codes`.
        """
        if codes.dtype == torch.uint8 and self._nibbles:
            epilogue["weight_offset"] = self._nibbles[1]
        op = ops.qlinear_packed if self._layout == "packed" else ops.qlinear
        arguments = self._gemm_arguments(codes)
        return op(*arguments, backend=self.backend, **epilogue)  # type: ignore[no-any-return]

    def kernel(self) -> str:
        """The backend that runs this layer's product on its device.

        Raises:
            BackendError: a forced backend cannot run the layer, or quantize its input.
        """
        if self.x_scale is None:
            return super().kernel()
        x = torch.empty(1, self.in_features, device=self.packed.device)
        quantizer = (self.x_inv_scale, self.code_zero_point, self.a_bits)
        dispatch.select("quantize", self.backend, x, *quantizer)
        self._choose_packing()  # for the backend that is asked now
        if self.packs_codes():
            return "cuda"
        codes = self.in_gemm_order(torch.empty_like(x, dtype=torch.int8))
        return dispatch.select(self.gemm, self.backend, *self._gemm_arguments(codes))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        o = self._operands
        if o is not None:
            moved: dict[str, Any] = {
                f.name: move(v, fn) if isinstance(v, Tensor) else v
                for f in fields(o)
                for v in [getattr(o, f.name)]
            }
            self._operands = GemmOperands(**moved)
        self._choose_packing()
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, a_bits={self.a_bits}"


class QuantPatchEmbed(QuantLinear):
    """A patch embedding (stride = kernel, no padding): a `QuantLinear` on patches."""

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        kernel: tuple[int, int],
        w_bits: int,
        bias: bool,
        a_bits: int = FLOAT_BITS,
    ) -> None:
        """Allocate an empty layer for patches of kernel[0] × kernel[1] pixels.

        Args:
            a_bits: of the pixels; 16: they stay float.
        """
        columns = in_channels * kernel[0] * kernel[1]
        super().__init__(columns, out_features, w_bits, a_bits, bias=bias)
        self.in_channels, self.kernel_size = in_channels, kernel

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, N, H/kh, W/kw]."""
        y = super().forward(patches(x, self.kernel_size))
        grid = (x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1])
        return y.transpose(1, 2).reshape(x.shape[0], self.out_features, *grid)


class _Operands(_Deployed):
    """Two activation quantizers of one attention matmul."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def repack(self) -> None:
        """Check the buffers; the kernels read them as they are.

        Raises:
            ValueError: a value that no quantizer has; the text starts with the buffer's name.
        """
        for name, value in self.named_buffers(recurse=False):
            if name.endswith("scale"):
                _check_scale(name, value)
            else:
                _check_zero_point(name, value, _ATTENTION_ZERO_POINT_LIMIT)


class QuantScores(_Operands):
    """Quantizers of q and k: the site `qk`; `QuantAttention` runs it.

    Buffers: q_scale, k_scale: fp32 []. q_zero_point, k_zero_point: int32 [].
    """

    q_scale: Tensor
    q_zero_point: Tensor
    k_scale: Tensor
    k_zero_point: Tensor
    q_inv_scale: Tensor
    k_inv_scale: Tensor
    factor: Tensor

    def __init__(self, bits: int, temperature: float) -> None:
        """Allocate empty quantizers; `temperature` multiplies the scores."""
        super().__init__(bits)
        self.temperature = temperature
        for name in ("q", "k"):
            self.register_buffer(f"{name}_scale", torch.tensor(1.0))
            self.register_buffer(f"{name}_zero_point", torch.tensor(0, dtype=torch.int32))

    def repack(self) -> None:
        """Check the buffers, as `_Operands.repack`, and make `factor`, what a score stands for."""
        super().repack()
        factor = self.q_scale * self.k_scale * self.temperature
        _check_scale("q_scale · k_scale · temperature", factor)
        self._derive(
            q_inv_scale=self.q_scale.reciprocal(),
            k_inv_scale=self.k_scale.reciprocal(),
            factor=factor,
        )

    def set_params(self, q: AffineParams, k: AffineParams) -> None:
        """Take over calibrated quantizers."""
        self.q_scale, self.q_zero_point = q.scale.clone(), q.zero_point.clone()
        self.k_scale, self.k_zero_point = k.scale.clone(), k.zero_point.clone()
        self.repack()


class QuantValues(_Operands):
    """Quantizers of the softmax output and v: the site `av`; `QuantAttention` runs it.

    Buffers: p_scale, v_scale: fp32 []. v_zero_point: int32 [].
    """

    p_scale: Tensor
    v_scale: Tensor
    v_zero_point: Tensor
    p_inv_scale: Tensor
    v_inv_scale: Tensor
    factor: Tensor

    def __init__(self, bits: int, zero_last: bool) -> None:
        """Allocate empty quantizers; zero_last: the last log-√2 code means 0."""
        super().__init__(bits)
        self.zero_last = zero_last
        self.register_buffer("p_scale", torch.tensor(1.0))
        self.register_buffer("v_scale", torch.tensor(1.0))
        self.register_buffer("v_zero_point", torch.tensor(0, dtype=torch.int32))

    def repack(self) -> None:
        """Check the buffers, as `_Operands.repack`, and make `factor`, what a value stands for."""
        super().repack()
        factor = self.p_scale * self.v_scale
        _check_scale("p_scale · v_scale", factor)
        self._derive(
            p_inv_scale=self.p_scale.reciprocal(),
            v_inv_scale=self.v_scale.reciprocal(),
            factor=factor,
        )

    def set_params(self, p: LogParams, v: AffineParams) -> None:
        """Take over calibrated quantizers."""
        self.p_scale = p.scale.clone()
        self.v_scale, self.v_zero_point = v.scale.clone(), v.zero_point.clone()
        self.repack()


class QuantAttention(Attention):
    """Attention whose core runs on codes: its `qk` and `av` hold quantizers."""

    qk: QuantScores
    av: QuantValues

    @classmethod
    def from_attention(cls, source: Attention, qk: QuantScores, av: QuantValues) -> QuantAttention:
        """`source` with its matmuls on codes; the other submodules are shared."""
        return cls(
            source.num_heads, source.head_dim, source.qkv, source.q_norm, source.k_norm,
            qk, av, source.norm, source.proj, source.windows,
        )  # fmt: skip

    def core(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ · temperature + bias) v for float [B, H, T, D] each: [B, H, T, D].

        An entry of the batch with NaN or infinity gives NaN in all its tokens.
        """
        y = self.multiply(*self.quantize(q, k, v), bias=bias)
        for x in (q, k, v):
            y += not_finite(x, [1, 2, 3])
        return y.transpose(1, 2).to(q.dtype)

    def quantize(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Codes of float q, k and v."""
        return [
            ops.quantize(x, *quantizer, backend=self.qk.backend)
            for x, quantizer in zip((q, k, v), self.quantizers(), strict=True)
        ]

    def multiply(self, q: Tensor, k: Tensor, v: Tensor, **epilogue: Any) -> Tensor:
        """`ops.qattention` of codes [B, H, T, D]: [B, T, H, D]."""
        return ops.qattention(  # type: ignore[no-any-return]
            q, k, v, *self.factors(), backend=self.qk.backend, **epilogue
        )

    def kernel(self) -> str:
        """The backend that runs the attention core on its device.

        Raises:
            BackendError: a forced backend cannot run it, or quantize q, k and v.
        """
        backend, shape = self.qk.backend, (1, self.num_heads, 1, self.head_dim)
        x = torch.empty(shape, device=self.qk.q_scale.device)
        for quantizer in self.quantizers():
            dispatch.select("quantize", backend, x, *quantizer)
        codes = x.to(torch.int8)
        # Whether a kernel takes a bias, one of the smallest size tells.
        bias = None if self.windows is None else self.windows.bias[:1, :, :1, :1]
        args = (codes, codes, codes, *self.factors(), bias)
        return dispatch.select("qattention", backend, *args)

    def quantizers(self) -> tuple[tuple[Tensor, Tensor, int], ...]:
        """(1 / scale, zero point, bits) of q, k and v."""
        qk, av = self.qk, self.av
        return (
            (qk.q_inv_scale, qk.q_zero_point, qk.bits),
            (qk.k_inv_scale, qk.k_zero_point, qk.bits),
            (av.v_inv_scale, av.v_zero_point, av.bits),
        )

    def factors(self) -> tuple[Any, ...]:
        """What `ops.qattention` takes after the codes."""
        qk, av = self.qk, self.av
        return (
            qk.q_zero_point,
            qk.k_zero_point,
            av.v_zero_point,
            qk.factor,
            av.p_inv_scale,
            av.factor,
            qk.bits,
            av.bits,
            av.zero_last,
        )

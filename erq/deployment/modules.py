"""Deployed modules: packed codes and scales as buffers, kernels to run them.

Persistent buffers are what a checkpoint holds, under the names of api "Checkpoint". Layouts that
kernels read are made from them by `repack` when a module is created, loaded or moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from erq.config import FLOAT_BITS, QuantConfig, as_config
from erq.models.attention import Attention
from erq.models.patches import patches
from erq.quant import AffineParams, DualAffineParams, LogParams, WeightParams, quantize
from erq.quant.fit import fit_weight
from erq_kernels import dispatch, ops
from erq_kernels.formats import GemmOperands, gemm_operands, pack, packed_size, unpack


class _Deployed(nn.Module):
    """A module with a backend."""

    backend: str = "auto"


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

    def check_values(self) -> None:
        """Raise ValueError, naming the buffer, if a value cannot be a quantizer's."""
        for name in ("scale", "scale2"):
            value = getattr(self, name)
            if value is not None and not bool((torch.isfinite(value) & (value > 0)).all()):
                raise ValueError(f"{name} must be finite and > 0")
        columns = self.dual_columns
        if columns is not None:
            inside = bool((columns >= 0).all()) and bool((columns < self.in_features).all())
            if not inside or not bool((columns.diff() > 0).all()):
                raise ValueError(
                    f"dual_columns must be sorted, distinct and inside 0..{self.in_features - 1}"
                )
        if self.bias is not None and not bool(torch.isfinite(self.bias).all()):
            raise ValueError("bias must be finite")

    def _linear(self, x: Tensor) -> Tensor:
        """Weight-only product for float rows [..., K]."""
        y = ops.dequant_linear(
            x.reshape(-1, self.in_features),
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
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, w_bits={self.w_bits}, "
            f"scheme={self.scheme}, bias={self.bias is not None}, backend={self.backend}"
        )


class QuantLinear(_PackedWeight):
    """A linear layer on packed low-bit weights and b-bit (or float, a_bits=16) activations.

    Buffers besides those of the weight:
        x_scale, x_zero_point: fp32 / int32 [], the activation quantizer; None if a_bits is 16.
    """

    x_scale: Tensor | None
    x_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        w_bits: int,
        a_bits: int = FLOAT_BITS,
        dual: int = 0,
        bias: bool = True,
    ) -> None:
        """Allocate an empty layer; `dual` is the number of outlier input channels."""
        super().__init__(in_features, out_features, w_bits, dual, bias)
        self.a_bits = a_bits
        floating = a_bits == FLOAT_BITS
        self.register_buffer("x_scale", None if floating else torch.tensor(1.0))
        zero = torch.tensor(0, dtype=torch.int32)
        self.register_buffer("x_zero_point", None if floating else zero)
        self._operands: GemmOperands | None = None

    @classmethod
    def from_params(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        w_params: WeightParams,
        x_params: AffineParams | None,
    ) -> QuantLinear:
        """The layer of a weight [N, K] that lies on the grid of `w_params`.

        Args:
            x_params: per-tensor activation quantizer, or None for float activations.
        """
        dual = len(w_params.columns) if isinstance(w_params, DualAffineParams) else 0
        a_bits = FLOAT_BITS if x_params is None else x_params.bits
        n, k = weight.shape
        layer = cls(k, n, w_params.bits, a_bits, dual, bias is not None).to(weight.device)
        layer.set_weight(weight, w_params, bias)
        if x_params is not None:
            layer.x_scale, layer.x_zero_point = x_params.scale, x_params.zero_point
        layer.repack()
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: QuantConfig | str | dict[str, Any],
        x_params: AffineParams | None = None,
    ) -> QuantLinear:
        """One layer by hand: weights rounded to nearest, no data needed for a_bits=16.

        Args:
            linear: the full-precision layer, unchanged.
            config: a QuantConfig, a preset's name or a dict; its w_bits and a_bits count.
            x_params: the activation quantizer, required if a_bits < 16.

        Raises:
            ValueError: x_params missing, or of another width than a_bits.
        """
        settings = as_config(config)
        if settings.a_bits == FLOAT_BITS and x_params is not None:
            raise ValueError("a_bits=16 keeps activations float: leave x_params out")
        if settings.a_bits != FLOAT_BITS and (x_params is None or x_params.bits != settings.a_bits):
            got = "none" if x_params is None else f"{x_params.bits} bits"
            raise ValueError(
                f"a_bits={settings.a_bits} needs x_params of that width, got {got}: calibrate the "
                "model with erq.quantize, fit params with erq.quant.fit, or use a_bits=16"
            )
        params = fit_weight(linear.weight.detach().float(), settings.w_bits)
        return cls.from_params(linear.weight.detach().float(), linear.bias, params, x_params)

    def repack(self) -> None:
        """Make the layout that the integer GEMM reads from the persistent buffers.

        Raises:
            ValueError: values that no quantizer has.
        """
        self.check_values()
        if self.x_scale is None or self.x_zero_point is None:
            return
        self._operands = gemm_operands(
            self.weight_codes(),
            self.scale,
            self.zero_point,
            self.bias,
            self.x_scale,
            self.x_zero_point,
            self.a_bits,
            self.scale2,
            self.zero_point2,
            self.dual_columns,
        )

    def check_values(self) -> None:
        """Raise ValueError, naming the buffer, if a value cannot be a quantizer's."""
        super().check_values()
        x = self.x_scale
        if x is not None and not (bool(torch.isfinite(x)) and bool(x > 0)):
            raise ValueError("x_scale must be finite and > 0")

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N], in x's dtype."""
        operands = self._operands
        if operands is None or self.x_scale is None or self.x_zero_point is None:
            return self._linear(x)
        codes = ops.quantize(
            x.reshape(-1, self.in_features),
            self.x_scale.reciprocal(),
            self.x_zero_point,
            self.a_bits,
            self.backend,
        )
        if operands.order is not None:
            codes = codes.index_select(1, operands.order)
        y = ops.qlinear(
            codes,
            operands.weight,
            operands.scale,
            operands.scale2,
            operands.split,
            operands.bias,
            out_dtype=x.dtype,
            backend=self.backend,
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def kernel(self) -> str:
        """The backend that runs this layer's product on its device."""
        if self._operands is None:
            probe = torch.empty(1, self.in_features, device=self.packed.device)
            args: tuple[Any, ...] = (
                probe, self.packed, self.w_bits, self.scale, self.zero_point, self.scale2,
                self.zero_point2, self.dual_columns, self.bias,
            )  # fmt: skip
            return dispatch.select("dequant_linear", self.backend, *args)
        o = self._operands
        codes = torch.empty(1, self.in_features, dtype=torch.int8, device=o.weight.device)
        args = (codes, o.weight, o.scale, o.scale2, o.split, o.bias)
        return dispatch.select("qlinear", self.backend, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Scales stay fp32 under .half(): only the device follows.
        super()._apply(lambda t: fn(t).to(t.dtype), recurse)  # type: ignore[no-untyped-call]
        o = self._operands
        if o is not None:
            moved: dict[str, Any] = {
                f.name: fn(v).to(v.dtype) if isinstance(v, Tensor) else v
                for f in fields(o)
                for v in [getattr(o, f.name)]
            }
            self._operands = GemmOperands(**moved)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, a_bits={self.a_bits}"


class QuantPatchEmbed(_PackedWeight):
    """A patch embedding (stride = kernel, no padding) on packed weights; the image stays float."""

    def __init__(
        self, in_channels: int, out_features: int, kernel: tuple[int, int], w_bits: int, bias: bool
    ) -> None:
        """Allocate an empty layer for patches of kernel[0] × kernel[1] pixels."""
        super().__init__(in_channels * kernel[0] * kernel[1], out_features, w_bits, 0, bias)
        self.in_channels, self.kernel_size = in_channels, kernel

    def repack(self) -> None:
        """Check the buffers; the packed codes themselves are what the kernel reads."""
        self.check_values()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, N, H/kh, W/kw]."""
        y = self._linear(patches(x, self.kernel_size))
        grid = (x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1])
        return y.transpose(1, 2).reshape(x.shape[0], -1, *grid)

    def kernel(self) -> str:
        """The backend that runs this layer's product on its device."""
        probe = torch.empty(1, self.in_features, device=self.packed.device)
        args = (probe, self.packed, self.w_bits, self.scale, self.zero_point)
        return dispatch.select("dequant_linear", self.backend, *args)


class _Operands(_Deployed):
    """Two activation quantizers of one attention matmul."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def check_values(self) -> None:
        """Raise ValueError, naming the buffer, if a value cannot be a quantizer's."""
        for name, value in self.named_buffers(recurse=False):
            if name.endswith("scale") and not (bool(torch.isfinite(value)) and bool(value > 0)):
                raise ValueError(f"{name} must be finite and > 0")

    def repack(self) -> None:
        """Check the buffers."""
        self.check_values()


class QuantScores(_Operands):
    """Quantizers of q and k: the site `qk`; `QuantAttention` runs it.

    Buffers: q_scale, k_scale: fp32 []. q_zero_point, k_zero_point: int32 [].
    """

    q_scale: Tensor
    q_zero_point: Tensor
    k_scale: Tensor
    k_zero_point: Tensor

    def __init__(self, bits: int, temperature: float) -> None:
        """Allocate empty quantizers; `temperature` multiplies the scores."""
        super().__init__(bits)
        self.temperature = temperature
        for name in ("q", "k"):
            self.register_buffer(f"{name}_scale", torch.tensor(1.0))
            self.register_buffer(f"{name}_zero_point", torch.tensor(0, dtype=torch.int32))

    def set_params(self, q: AffineParams, k: AffineParams) -> None:
        """Take over calibrated quantizers."""
        self.q_scale, self.q_zero_point = q.scale, q.zero_point
        self.k_scale, self.k_zero_point = k.scale, k.zero_point


class QuantValues(_Operands):
    """Quantizers of the softmax output and v: the site `av`; `QuantAttention` runs it.

    Buffers: p_scale, v_scale: fp32 []. v_zero_point: int32 [].
    """

    p_scale: Tensor
    v_scale: Tensor
    v_zero_point: Tensor

    def __init__(self, bits: int, zero_last: bool) -> None:
        """Allocate empty quantizers; zero_last: the last log-√2 code means 0."""
        super().__init__(bits)
        self.zero_last = zero_last
        self.register_buffer("p_scale", torch.tensor(1.0))
        self.register_buffer("v_scale", torch.tensor(1.0))
        self.register_buffer("v_zero_point", torch.tensor(0, dtype=torch.int32))

    def set_params(self, p: LogParams, v: AffineParams) -> None:
        """Take over calibrated quantizers."""
        self.p_scale = p.scale
        self.v_scale, self.v_zero_point = v.scale, v.zero_point


class QuantAttention(Attention):
    """Attention whose core runs on codes: its `qk` and `av` hold quantizers."""

    qk: QuantScores
    av: QuantValues

    @classmethod
    def from_attention(cls, source: Attention, qk: QuantScores, av: QuantValues) -> QuantAttention:
        """`source` with its matmuls on codes; the other submodules are shared."""
        return cls(
            source.num_heads, source.head_dim, source.qkv, source.q_norm, source.k_norm,
            qk, av, source.norm, source.proj,
        )  # fmt: skip

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ · temperature) v for float [B, H, T, D] each."""
        qk, av = self.qk, self.av
        backend = qk.backend
        y = ops.qattention(
            ops.quantize(q, qk.q_scale.reciprocal(), qk.q_zero_point, qk.bits, backend),
            ops.quantize(k, qk.k_scale.reciprocal(), qk.k_zero_point, qk.bits, backend),
            ops.quantize(v, av.v_scale.reciprocal(), av.v_zero_point, av.bits, backend),
            qk.q_zero_point,
            qk.k_zero_point,
            av.v_zero_point,
            qk.q_scale * qk.k_scale * qk.temperature,
            av.p_scale.reciprocal(),
            av.p_scale * av.v_scale,
            qk.bits,
            av.bits,
            av.zero_last,
            backend=backend,
        )
        return y.to(q.dtype)

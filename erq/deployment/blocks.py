"""A transformer block on codes: seven kernels, nothing dequantized to memory between them.

LayerNorm + quantize → qkv GEMM, codes out → attention, codes out → proj GEMM + residual →
LayerNorm + quantize → fc1 GEMM + GELU, codes out → fc2 GEMM + residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erq.deployment.modules import QuantAttention, QuantLinear, move
from erq.models.attention import Attention, ScaledScores
from erq_kernels import dispatch, ops


@dataclass(frozen=True)
class Half:
    """How one residual half of a block runs.

    Args:
        kernels: the ops in order, empty if the half's modules run one by one.
        reason: why they do, or why there are more kernels than the fewest; "" if neither.
    """

    kernels: tuple[str, ...]
    reason: str = ""


_ATTENTION = ("layer_norm_quantize", "qlinear", "qattention", "qlinear")
_UNEQUAL_ATTENTION = (
    "layer_norm_quantize", "qlinear", "quantize", "quantize", "quantize", "qattention", "qlinear",
)  # fmt: skip
_FLOAT_ATTENTION = ("layer_norm_quantize", "qlinear", "sdpa", "quantize", "qlinear")
_MLP = ("layer_norm_quantize", "qlinear", "qlinear")


def _is_integer(layer: Any) -> bool:
    return isinstance(layer, QuantLinear) and layer.x_scale is not None


def _is_identity(owner: Any, name: str) -> bool:
    return isinstance(getattr(owner, name, nn.Identity()), nn.Identity)


def _norm_reason(norm: Any, name: str) -> str:
    """Why `layer_norm_quantize` cannot stand for a norm, or ""."""
    if not isinstance(norm, nn.LayerNorm):
        return f"{name} is a {type(norm).__name__}, not a LayerNorm"
    if norm.weight is None or norm.bias is None:
        return f"{name} has no weight or no bias"
    return ""


def plan_attention(norm: Any, attn: Any) -> Half:
    """How the attention half x + ls1(attn(norm1(x))) runs."""
    reason = _norm_reason(norm, "norm1")
    for name in ("q_norm", "k_norm", "norm"):
        if not reason and not _is_identity(attn, name):
            reason = f"attn.{name} works on floats"
    for name in ("qkv", "proj"):
        if not reason and not _is_integer(getattr(attn, name)):
            reason = f"attn.{name} has float activations"
    if reason:
        return Half((), reason)
    if isinstance(attn, QuantAttention):
        if attn.qk.bits == attn.av.bits:
            return _reordered(_ATTENTION, attn.proj, "attn.proj")
        half = _reordered(_UNEQUAL_ATTENTION, attn.proj, "attn.proj")
        reason = f"q and k have {attn.qk.bits} bits, v has {attn.av.bits}"
        return Half(half.kernels, f"{reason}; {half.reason}" if half.reason else reason)
    if isinstance(attn.qk, ScaledScores):
        return _reordered(_FLOAT_ATTENTION, attn.proj, "attn.proj")
    return Half((), f"attn.qk is a {type(attn.qk).__name__}")


def plan_mlp(norm: Any, mlp: Any) -> Half:
    """How the MLP half x + ls2(mlp(norm2(x))) runs."""
    reason = _norm_reason(norm, "norm2")
    if not reason and (not hasattr(mlp, "fc1") or mlp.fc1.out_features != mlp.fc2.in_features):
        reason = f"mlp is a {type(mlp).__name__}"
    for name in ("fc1", "fc2"):
        if not reason and not _is_integer(getattr(mlp, name)):
            reason = f"mlp.{name} has float activations"
    if not reason and activation_name(mlp.act) is None:
        reason = f"mlp.act is a {type(mlp.act).__name__}"
    if not reason and not _is_identity(mlp, "norm"):
        reason = "mlp.norm works on floats"
    return Half((), reason) if reason else _reordered(_MLP, mlp.fc2, "mlp.fc2")


def _reordered(kernels: tuple[str, ...], layer: Any, name: str) -> Half:
    """The half, with a gather before its last GEMM if that reads its columns in another order."""
    if layer.operands.order is None:
        return Half(kernels)
    return Half(
        (*kernels[:-1], "gather", kernels[-1]), f"{name} reads its columns in its own order"
    )


def activation_name(act: nn.Module) -> str | None:
    """The epilogue of `ops.qlinear` that computes an activation module, or None."""
    if isinstance(act, nn.Identity):
        return "none"
    if type(act).__name__ == "GELUTanh":
        return "gelu_tanh"
    if isinstance(act, nn.GELU) or type(act).__name__ == "GELU":
        return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    return None


class QuantBlock(nn.Module):
    """A pre-norm transformer block whose halves run on codes; submodules keep their names.

    Norms and LayerScale of a half on codes stay fp32, whatever dtype the model is cast to.
    """

    qkv_inv_scale: Tensor | None
    qkv_zero_point: Tensor | None

    def __init__(self, source: nn.Module) -> None:
        """Take over the submodules of a deployed block x + ls1(attn(norm1 x)), + ls2(mlp(norm2 x)).

        Args:
            source: a block with the submodules norm1, attn, ls1, norm2, mlp, ls2.
        """
        super().__init__()
        block: Any = source
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.attention_half = plan_attention(self.norm1, self.attn)
        self.mlp_half = plan_mlp(self.norm2, self.mlp)
        self.act = activation_name(self.mlp.act) or "none"
        for name in self._float32_parts():
            getattr(self, name).float()
        self.refresh()
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Make again what the kernels read of the submodules, after these were given new values."""
        attn: Any = self.attn
        inv_scale = zero_point = None
        if self.attention_half.kernels[:3] == _ATTENTION[:3]:
            quantizers = attn.quantizers()
            width = attn.num_heads * attn.head_dim
            inv_scale, zero_point = (
                torch.stack([q[i] for q in quantizers]).repeat_interleave(width) for i in (0, 1)
            )
        self.register_buffer("qkv_inv_scale", inv_scale, persistent=False)
        self.register_buffer("qkv_zero_point", zero_point, persistent=False)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, T, C] → [B, T, C]. Masks are refused: no calibrated model has one."""
        if attn_mask is not None or is_causal:
            raise ValueError("a quantized attention takes no mask; call the model without one")
        if self.attention_half.kernels:
            x = self._attend(x)
        else:
            x = x + self.ls1(self.attn(self.norm1(x)))
        if self.mlp_half.kernels:
            return self._feed_forward(x)
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        attn: Any = self.attn
        rows = x.reshape(-1, c)
        qkv, proj = attn.qkv, attn.proj
        codes = ops.layer_norm_quantize(*_norm_arguments(rows, self.norm1, qkv), qkv.backend)
        if self.qkv_inv_scale is not None:
            y = qkv.multiply(
                codes,
                out_inv_scale=self.qkv_inv_scale,
                out_zero_point=self.qkv_zero_point,
                out_bits=attn.qk.bits,
            )
            codes = attn.multiply(*attn.split_heads(y, b, t), **proj.input_quantizer())
        else:
            heads = attn.split_heads(qkv.multiply(codes, out_dtype=x.dtype), b, t)
            if isinstance(attn, QuantAttention):
                codes = attn.multiply(*attn.quantize(*heads), **proj.input_quantizer())
            else:
                codes = proj.quantize(_attention(attn, *heads))
        codes = codes.reshape(b * t, proj.in_features)
        return self._project(proj, codes, self.ls1, rows).reshape(b, t, c)

    def _feed_forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        rows = x.reshape(-1, x.shape[-1])
        fc1, fc2 = mlp.fc1, mlp.fc2
        codes = ops.layer_norm_quantize(*_norm_arguments(rows, self.norm2, fc1), fc1.backend)
        codes = fc1.multiply(codes, act=self.act, **fc2.input_quantizer())
        return self._project(fc2, codes, self.ls2, rows).reshape(x.shape)

    @staticmethod
    def _project(layer: QuantLinear, codes: Tensor, layer_scale: Any, rows: Tensor) -> Tensor:
        """rows + layer_scale(layer(codes)), in the dtype of rows."""
        return layer.multiply(
            layer.in_gemm_order(codes),
            layer_scale=getattr(layer_scale, "gamma", None),
            residual=rows,
            out_dtype=rows.dtype,
        )

    def _float32_parts(self) -> tuple[str, ...]:
        """Submodules whose parameters the kernels read."""
        first = ("norm1", "ls1") if self.attention_half.kernels else ()
        return first + (("norm2", "ls2") if self.mlp_half.kernels else ())

    def kernels(self) -> list[tuple[str, str]]:
        """(op, what runs it) of the halves on codes, in order.

        Raises:
            BackendError: a forced backend cannot run one of them.
        """
        attn, mlp = self.attn, self.mlp
        layers = {1: attn.qkv, 2: getattr(mlp, "fc1", None)}
        run = []
        for i, half in ((1, self.attention_half), (2, self.mlp_half)):
            for op in half.kernels:
                if op == "layer_norm_quantize":
                    layer: Any = layers[i]
                    row = torch.empty(1, layer.in_features, device=layer.packed.device)
                    args = _norm_arguments(row, getattr(self, f"norm{i}"), layer)
                    run.append((op, dispatch.select(op, layer.backend, *args)))
                elif op == "qattention":
                    run.append((op, attn.kernel()))
                elif op in ("sdpa", "gather"):
                    run.append((op, "torch"))
                else:
                    layer = attn.proj if i == 1 else mlp.fc2
                    run.append((layer.gemm if op == "qlinear" else op, layer.kernel()))
        return run

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            return move(tensor, fn)  # only the device follows

        kept = self._float32_parts()
        for name, child in self.named_children() if recurse else ():
            child._apply(keep if name in kept else fn)
        return super()._apply(keep, recurse=False)  # type: ignore[no-untyped-call]


def _refresh(block: nn.Module, _: Any) -> None:
    assert isinstance(block, QuantBlock)
    block.refresh()


def _norm_arguments(rows: Tensor, norm: Any, layer: QuantLinear) -> tuple[Any, ...]:
    """What `ops.layer_norm_quantize` takes to give the codes that `layer` reads."""
    return (
        rows, norm.weight, norm.bias, norm.eps, layer.x_inv_scale, layer.x_zero_point,
        layer.a_bits, layer.operands.order,
    )  # fmt: skip


def _attention(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in floating point, [B, H, T, D] each → [B, T, H, D]."""
    if not q.is_cuda:  # the arithmetic of the simulated model, bit by bit
        return attn.core(q, k, v).transpose(1, 2)
    scale = attn.qk.temperature
    assert isinstance(scale, float)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def fuse_blocks(net: nn.Module, paths: list[str]) -> None:
    """Put a `QuantBlock` in place of each block at `paths` that has a half to run on codes."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        block = QuantBlock(net.get_submodule(path))
        if block.attention_half.kernels or block.mlp_half.kernels:
            setattr(net.get_submodule(parent), leaf, block)

"""A transformer block on codes: seven kernels, nothing dequantized to memory between them.

LayerNorm + quantize → qkv GEMM, codes out → attention, codes out → proj GEMM + residual →
LayerNorm + quantize → fc1 GEMM + GELU, codes out → fc2 GEMM + residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erq.deployment.modules import QuantAttention, QuantLinear, move, not_finite
from erq.models.attention import Attention, ScaledScores
from erq_kernels import dispatch, ops
from erq_kernels._cpu import BlockArguments


@dataclass(frozen=True)
class Half:
    """How one residual half of a block runs.

    Args:
        kernels: the ops in order, empty if the half's modules run one by one.
        reason: why they do, or why there are more kernels than the fewest; "" if neither.
    """

    kernels: tuple[str, ...]
    reason: str = ""


# What stands between the GEMMs of qkv and of proj.
_ATTENTION = ("qattention",)
_UNEQUAL_ATTENTION = ("quantize", "quantize", "quantize", "qattention")
_FLOAT_ATTENTION = ("sdpa", "quantize")
_MLP = ("layer_norm_quantize", "qlinear", "qlinear")
_FEWEST = ("layer_norm_quantize", "qlinear", *_ATTENTION, "qlinear")


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
    reasons = []
    if isinstance(attn, QuantAttention):
        between: tuple[str, ...] = _ATTENTION
        if attn.qk.bits != attn.av.bits:
            between = _UNEQUAL_ATTENTION
            reasons.append(f"q and k have {attn.qk.bits} bits, v has {attn.av.bits}")
    elif isinstance(attn.qk, ScaledScores):
        between = _FLOAT_ATTENTION
    else:
        return Half((), f"attn.qk is a {type(attn.qk).__name__}")
    if attn.windows is None:
        middle = ("qlinear", *between)
    else:
        middle = ("gather", "qlinear", *between, "gather")
        reasons.append("rows of codes are gathered into windows and back")
    kernels = ("layer_norm_quantize", *middle, "qlinear")
    return _reordered(kernels, attn.proj, "attn.proj", reasons)


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
    return Half((), reason) if reason else _reordered(_MLP, mlp.fc2, "mlp.fc2", [])


def _reordered(kernels: tuple[str, ...], layer: Any, name: str, reasons: list[str]) -> Half:
    """The half, with a gather before its last GEMM if that reads its columns in another order.

    Args:
        reasons: why `kernels` are already more than the fewest.
    """
    if layer.operands.order is not None:
        kernels = (*kernels[:-1], "gather", kernels[-1])
        reasons = [*reasons, f"{name} reads its columns in its own order"]
    return Half(kernels, "; ".join(reasons))


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

    Attention in windows: after the first kernel the rows of codes are gathered window by window,
    after attention they are gathered back, without those of padding; so the residual stream never
    leaves its order, and what moves is one byte an element.
    """

    qkv_inv_scale: Tensor | None
    qkv_zero_point: Tensor | None
    pad_codes: Tensor | None

    def __init__(self, source: nn.Module, first: bool = False) -> None:
        """Take over the submodules of a deployed block x + ls1(attn(norm1 x)), + ls2(mlp(norm2 x)).

        Args:
            source: a block with the submodules norm1, attn, ls1, norm2, mlp, ls2.
            first: of its network. Between its ops there are codes, which have no NaN: it gives NaN
                in every token of an image that has NaN or infinity in one, as attention on floats
                would; from there on the residual stream carries it to the logits.
        """
        super().__init__()
        self.first = first
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
        if self._quantizes_qkv():
            quantizers = attn.quantizers()
            width = attn.num_heads * attn.head_dim
            inv_scale, zero_point = (
                torch.stack([q[i] for q in quantizers]).repeat_interleave(width) for i in (0, 1)
            )
        self.register_buffer("qkv_inv_scale", inv_scale, persistent=False)
        self.register_buffer("qkv_zero_point", zero_point, persistent=False)
        pad_codes = None
        if self.attention_half.kernels and attn.windows is not None:
            pad = attn.windows.pad
            if pad is not None:
                pad_codes = attn.qkv.in_gemm_order(attn.qkv.quantize(pad[None]))[0]
        self.register_buffer("pad_codes", pad_codes, persistent=False)

    def _quantizes_qkv(self) -> bool:
        """Whether the epilogue of the qkv GEMM writes codes of q, k and v."""
        attn: Any = self.attn
        fused = self.attention_half.kernels and isinstance(attn, QuantAttention)
        return bool(fused) and attn.qk.bits == attn.av.bits

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, …, C] → [B, …, C]. Masks are refused: no calibrated model takes one."""
        if attn_mask is not None or is_causal:
            raise ValueError("a quantized attention takes no mask; call the model without one")
        if ops.is_plain_eager() and self.runs_at_once(x):
            y: Tensor = dispatch.call("block", "cpu", x, self._arguments())
        else:
            y = self._run_halves(x)
        if self.first and self.attention_half.kernels:
            y += not_finite(x, list(range(1, x.dim())))
        return y

    def _run_halves(self, x: Tensor) -> Tensor:
        if self.attention_half.kernels:
            x = self._attend(x)
        else:
            x = x + self.ls1(self.attn(self.norm1(x)))
        if self.mlp_half.kernels:
            return self._feed_forward(x)
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def runs_at_once(self, x: Tensor) -> bool:
        """Whether one call of the CPU library can run all kernels of the block for an input like
        x; it does unless something records, traces, transforms or profiles.
        """
        if self.attention_half.kernels != _FEWEST or self.mlp_half.kernels != _MLP:
            return False
        attn, mlp = self.attn, self.mlp
        layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        backends = {attn.qk.backend, *(layer.backend for layer in layers)}
        if len(backends) > 1 or any(layer.layout != "int8" for layer in layers):
            return False
        if not x.is_cpu or dispatch.why_not("block", "cpu", x) is not None:
            return False
        backend = dispatch.chosen(*backends)
        if backend == "auto":
            quantizer = (attn.qkv.x_inv_scale, attn.qkv.x_zero_point, attn.qkv.a_bits)
            backend = dispatch.select("quantize", "auto", x, *quantizer)
        return backend == "cpu"

    def _arguments(self) -> BlockArguments:
        """What the whole block's call takes."""
        attn, mlp = self.attn, self.mlp
        qkv, proj, fc1, fc2 = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        return BlockArguments(
            norm1=_norm_arguments(self.norm1, qkv),
            qkv={
                **_operands(qkv),
                "out_inv_scale": self.qkv_inv_scale,
                "out_zero_point": self.qkv_zero_point,
                "out_bits": attn.qk.bits,
            },
            attention=(*attn.factors(), None, *proj.input_quantizer().values()),
            proj=_operands(proj) | {"layer_scale": getattr(self.ls1, "gamma", None)},
            norm2=_norm_arguments(self.norm2, fc1),
            fc1=_operands(fc1) | {"act": self.act} | fc2.input_quantizer(),
            fc2=_operands(fc2) | {"layer_scale": getattr(self.ls2, "gamma", None)},
            heads=attn.num_heads,
            head_dim=attn.head_dim,
        )

    def _attend(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        windows = attn.windows
        rows = x.reshape(-1, x.shape[-1])
        qkv, proj = attn.qkv, attn.proj
        # Windows move single rows of codes and pad them: they are not packed there.
        qkv_packs = windows is None and qkv.packs_codes()
        proj_packs = windows is None and proj.packs_codes() and proj.operands.order is None
        codes = ops.layer_norm_quantize(
            rows, *_norm_arguments(self.norm1, qkv), qkv_packs, backend=qkv.backend
        )
        codes, bias = codes.reshape(*x.shape[:-1], codes.shape[-1]), None
        if windows is not None:
            bias = windows.bias_at((x.shape[1], x.shape[2]))
            codes = windows.cut(codes, self.pad_codes)
        b, t, columns = codes.shape
        codes = codes.reshape(b * t, columns)
        if self.qkv_inv_scale is not None:
            y = qkv.multiply(
                codes,
                out_inv_scale=self.qkv_inv_scale,
                out_zero_point=self.qkv_zero_point,
                out_bits=attn.qk.bits,
            )
            heads = attn.split_heads(y, b, t)
            codes = attn.multiply(*heads, bias=bias, **proj.input_quantizer(proj_packs))
        else:
            heads = attn.split_heads(qkv.multiply(codes, out_dtype=x.dtype), b, t)
            if isinstance(attn, QuantAttention):
                codes = attn.quantize(*heads)
                codes = attn.multiply(*codes, bias=bias, **proj.input_quantizer(proj_packs))
            else:
                codes = proj.quantize(_attention(attn, bias, *heads))
        if windows is not None:
            codes = windows.join(codes.reshape(b, t, proj.in_features), (x.shape[1], x.shape[2]))
        width = proj.in_features // 2 if codes.dtype == torch.uint8 else proj.in_features
        codes = codes.reshape(-1, width)
        return self._project(proj, codes, self.ls1, rows).reshape(x.shape)

    def _feed_forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        rows = x.reshape(-1, x.shape[-1])
        fc1, fc2 = mlp.fc1, mlp.fc2
        fc1_packs = fc1.packs_codes()
        # Only the 4-bit kernel writes codes packed.
        fc2_packs = fc1_packs and fc2.packs_codes() and fc2.operands.order is None
        codes = ops.layer_norm_quantize(
            rows, *_norm_arguments(self.norm2, fc1), fc1_packs, backend=fc1.backend
        )
        codes = fc1.multiply(codes, act=self.act, **fc2.input_quantizer(fc2_packs))
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
                    args = (row, *_norm_arguments(getattr(self, f"norm{i}"), layer))
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


def _norm_arguments(norm: Any, layer: QuantLinear) -> tuple[Any, ...]:
    """What `ops.layer_norm_quantize` takes after the rows to give the codes that `layer` reads."""
    return (
        norm.weight, norm.bias, norm.eps, layer.x_inv_scale, layer.x_zero_point,
        layer.a_bits, layer.operands.order,
    )  # fmt: skip


def _operands(layer: QuantLinear) -> dict[str, Any]:
    """What `ops.qlinear` reads of a layer, by name."""
    o = layer.operands
    return {
        "weight": o.weight, "scale": o.scale, "scale2": o.scale2, "split": o.split, "bias": o.bias,
    }  # fmt: skip


def _attention(attn: Attention, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in floating point, [B, H, T, D] each → [B, T, H, D]."""
    if not q.is_cuda:  # the arithmetic of the simulated model, bit by bit
        return attn.core(q, k, v, bias).transpose(1, 2)
    scale = attn.qk.temperature
    assert isinstance(scale, float)
    if bias is not None:  # n windows of each image
        bias = bias.to(q.dtype).repeat(len(q) // len(bias), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)


@contextmanager
def module_by_module(net: nn.Module) -> Iterator[None]:
    """Inside the context the blocks of `net` run their modules one by one, to the same codes."""
    blocks = [m for m in net.modules() if isinstance(m, QuantBlock)]
    halves = [(b.attention_half, b.mlp_half) for b in blocks]
    for block in blocks:
        block.attention_half = block.mlp_half = Half(())
    try:
        yield
    finally:
        for block, (attention, mlp) in zip(blocks, halves, strict=True):
            block.attention_half, block.mlp_half = attention, mlp


def fuse_blocks(net: nn.Module, paths: list[str]) -> None:
    """Put a `QuantBlock` in place of each block at `paths` that has a half to run on codes."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        block = QuantBlock(net.get_submodule(path), first=path == paths[0])
        if block.attention_half.kernels or block.mlp_half.kernels:
            setattr(net.get_submodule(parent), leaf, block)

"""Attention rewritten so that both of its matmuls are modules, hence sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from erq.models.windows import Windows, add_bias


class ScaledScores(nn.Module):
    """q·kᵀ times the softmax temperature: the site `qk`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, T, D] twice → [B, H, T, T]."""
        return (q @ k.transpose(-2, -1)) * self.temperature


class WeightedValues(nn.Module):
    """softmax(scores)·v: the site `av`."""

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, T], [B, H, T, D] → [B, H, T, D]."""
        return p @ v


class Attention(nn.Module):
    """timm's multi-head self-attention with explicit matmuls; same parameters, same output.

    Sites: `qkv`, `qk`, `av`, `proj`. With `windows` it works on maps of tokens, window by window.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        qkv: nn.Module,
        q_norm: nn.Module,
        k_norm: nn.Module,
        qk: nn.Module,
        av: nn.Module,
        norm: nn.Module,
        proj: nn.Module,
        windows: Windows | None = None,
    ) -> None:
        """Take over the given submodules; `norm` acts on the heads' joined output."""
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv, self.q_norm, self.k_norm = qkv, q_norm, k_norm
        self.qk, self.av = qk, av
        self.norm, self.proj = norm, proj
        self.windows = windows

    @classmethod
    def from_timm(cls, source: Any, windows: Windows | None = None) -> Attention:
        """The rewritten form of a `timm.layers.Attention` without a gate, or of a Swin attention;
        submodules are shared."""
        num_heads = int(source.num_heads)
        return cls(
            num_heads,
            int(source.qkv.out_features) // 3 // num_heads,
            source.qkv,
            getattr(source, "q_norm", nn.Identity()),
            getattr(source, "k_norm", nn.Identity()),
            ScaledScores(float(source.scale)),
            WeightedValues(),
            getattr(source, "norm", nn.Identity()),
            source.proj,
            windows,
        )

    @classmethod
    def from_multihead(cls, source: nn.MultiheadAttention) -> Attention:
        """The rewritten form of torch's self-attention; parameters are shared."""
        assert source.in_proj_weight is not None
        has_bias = source.in_proj_bias is not None
        qkv = nn.Linear(source.embed_dim, 3 * source.embed_dim, bias=has_bias, device="meta")
        qkv.weight = nn.Parameter(source.in_proj_weight.detach(), requires_grad=False)
        if has_bias:
            qkv.bias = nn.Parameter(source.in_proj_bias.detach(), requires_grad=False)
        proj = nn.Linear(source.embed_dim, source.embed_dim, bias=has_bias, device="meta")
        proj.weight, proj.bias = source.out_proj.weight, source.out_proj.bias
        head_dim = source.embed_dim // source.num_heads
        identities = [nn.Identity() for _ in range(3)]
        return cls(
            source.num_heads, head_dim, qkv, identities[0], identities[1],
            ScaledScores(head_dim**-0.5), WeightedValues(), identities[2], proj,
        )  # fmt: skip

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, T, C] → [B, T, C], or with windows [B, H, W, C] → [B, H, W, C].

        Masks are refused: no calibrated model takes one.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("a quantized attention takes no mask; call the model without one")
        size, bias = x.shape[1:-1], None
        if self.windows is not None:
            bias = self.windows.bias_at((size[0], size[1]))
            x = self.windows.cut(x)
        b, t, _ = x.shape
        q, k, v = self.split_heads(self.qkv(x), b, t)
        q, k = self.q_norm(q), self.k_norm(k)
        y = self.core(q, k, v, bias).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)
        if self.windows is not None:
            y = self.windows.join(y, (size[0], size[1]))
        return self.proj(self.norm(y))  # type: ignore[no-any-return]

    def split_heads(self, qkv: Tensor, b: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, T, D], views of [B·T, 3·H·D] or [B, T, 3·H·D]."""
        qkv = qkv.reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def core(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ · temperature + bias) v for [B, H, T, D] each.

        Args:
            bias: float [n, H, T, T], n a divisor of B: those of every n entries of the batch.
        """
        scores = self.qk(q, k)
        if bias is not None:
            scores = add_bias(scores, bias)
        return self.av(torch.softmax(scores, dim=-1), v)  # type: ignore[no-any-return]

"""Attention rewritten so that both of its matmuls are modules, hence sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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

    Sites: `qkv`, `qk`, `av`, `proj`.
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
    ) -> None:
        """Take over the given submodules; `norm` acts on the heads' joined output."""
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv, self.q_norm, self.k_norm = qkv, q_norm, k_norm
        self.qk, self.av = qk, av
        self.norm, self.proj = norm, proj

    @classmethod
    def from_timm(cls, source: Any) -> Attention:
        """The rewritten form of a `timm.layers.Attention` without a gate; submodules are shared."""
        num_heads = int(source.num_heads)
        return cls(
            num_heads,
            int(source.qkv.out_features) // 3 // num_heads,
            source.qkv,
            source.q_norm,
            source.k_norm,
            ScaledScores(float(source.scale)),
            WeightedValues(),
            getattr(source, "norm", nn.Identity()),
            source.proj,
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, T, C] → [B, T, C]. Masks are refused: no calibrated model has one."""
        if attn_mask is not None or is_causal:
            raise ValueError("a quantized attention takes no mask; call the model without one")
        b, t, _ = x.shape
        q, k, v = self.split_heads(self.qkv(x), b, t)
        q, k = self.q_norm(q), self.k_norm(k)
        y = self.core(q, k, v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)
        return self.proj(self.norm(y))  # type: ignore[no-any-return]

    def split_heads(self, qkv: Tensor, b: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, T, D], views of [B·T, 3·H·D] or [B, T, 3·H·D]."""
        qkv = qkv.reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ · temperature) v for [B, H, T, D] each."""
        return self.av(torch.softmax(self.qk(q, k), dim=-1), v)  # type: ignore[no-any-return]

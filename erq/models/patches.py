"""Images as rows of patches, so that a patch embedding is a linear layer."""

from __future__ import annotations

from torch import Tensor


def patches(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Non-overlapping patches as rows: [B, C, H, W] → [B, H/kh · W/kw, C·kh·kw]."""
    b, c, h, w = x.shape
    kh, kw = kernel
    gh, gw = h // kh, w // kw
    x = x[:, :, : gh * kh, : gw * kw].reshape(b, c, gh, kh, gw, kw)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, gh * gw, c * kh * kw)

"""(G + λI)⁻¹ B by fp64 Cholesky: the only solver, and the meaning of λ."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_strength(g: Tensor, value: float, scale: str) -> float:
    """λ in the units of the Gram matrix `g`.

    Args:
        g: fp64 [n, n]. value: the config's ridge. scale: `sum` takes it as it is, `relative` times
            the mean diagonal of g, so that neither the number of rows nor the scale of the
            activations changes what it means.
    """
    return value if scale == "sum" else value * float(g.diagonal().mean())


def factor(g: Tensor, strength: float) -> Tensor:
    """Lower Cholesky factor of g + strength · I.

    A singular matrix (fewer rows than channels and λ = 0) gets the smallest diagonal, in powers of
    ten from 1e-12 of its mean diagonal, that makes it factorable.

    Args:
        g: fp64 [n, n], symmetric positive semi-definite.

    Raises:
        ValueError: g holds NaN or infinity.
    """
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    mean = max(float(g.diagonal().mean()), torch.finfo(torch.float64).tiny)
    for extra in (0.0, *(10.0**e for e in range(-12, 0))):
        lower, info = torch.linalg.cholesky_ex(g + (strength + extra * mean) * eye)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return lower
    raise ValueError("the Gram matrix of a layer's inputs holds NaN or infinite values")


def solve(lower: Tensor, b: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b for fp64 L [n, n], b [n, m]."""
    return torch.cholesky_solve(b, lower)

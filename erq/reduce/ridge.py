"""(G + λI)⁻¹ B by fp64 Cholesky: the only solver, and the meaning of λ."""

from __future__ import annotations

import torch
from torch import Tensor

from erq.reduce.gram import Gram


def ridge_strength(gram: Gram, value: float, scale: str) -> float:
    """λ in the units of the Gram matrix.

    Args:
        value: the config's ridge.
        scale: `sum` takes it as it is, on sums over rows, as published. `relative` multiplies it by
            trace(G) / rows, the mean squared length of an input row: the value that is best then
            depends on neither the number of rows nor the scale or number of the input channels
            (docs/math.md).
    """
    if scale == "sum":
        return value
    return value * float(gram.g.diagonal().sum()) / gram.rows


def factor(g: Tensor, strength: float) -> Tensor:
    """Lower Cholesky factor of g + strength · I.

    A singular matrix (fewer rows than channels and λ = 0) gets the smallest diagonal, in powers of
    ten from 1e-12 of its mean diagonal, that makes it factorable.

    Args:
        g: fp64 [n, n], symmetric positive semi-definite. strength: λ >= 0.

    Raises:
        ValueError: g holds NaN or infinity.
    """
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    mean = max(float(g.diagonal().mean()), torch.finfo(torch.float64).tiny)
    for extra in (0.0, *(10.0**e for e in range(-12, 0))):
        result = torch.linalg.cholesky_ex(g + (strength + extra * mean) * eye)
        lower: Tensor = result.L
        if int(result.info) == 0 and bool(torch.isfinite(lower).all()):
            return lower
    raise ValueError("the Gram matrix of a layer's inputs holds NaN or infinite values")


def solve(lower: Tensor, b: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b for fp64 L [n, n], b [n, m]."""
    out: Tensor = torch.cholesky_solve(b, lower)
    return out

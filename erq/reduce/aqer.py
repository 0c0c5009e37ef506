"""Aqer, activation quantization error reduction: a ridge update of the full-precision weight.

Source: the paper's first step; method.md §5. Minimizes ‖Y − A(W + δ)ᵀ‖² + λ‖δ‖² over δ, the bias
being the weight of a constant input: δᵀ = (G + λI)⁻¹ C Wᵀ.
"""

from __future__ import annotations

from torch import Tensor

from erq.reduce.ridge import Ridge


def aqer(ridge: Ridge, weight: Tensor, cross: Tensor) -> Tensor:
    """The updated weight.

    Args:
        ridge: of the layer's statistics; without the constant input the bias stays.
        weight: fp64 [N, D + 1], bias last (0 if there is none).
        cross: fp64 [D + 1, N], CWᵀ (`Gram.cross`).

    Returns:
        fp64 [N, D + 1].
    """
    n = ridge.size
    out = weight.clone()
    out[:, :n] += ridge.solve(cross[:n]).t()
    return out

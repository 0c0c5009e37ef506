"""Aqer, activation quantization error reduction: a ridge update of the full-precision weight.

Source: the paper's first step; method.md §5. Minimizes ‖Y − A(W + δ)ᵀ‖² + λ‖δ‖² over δ, the bias
being the weight of a constant input: δᵀ = (G + λI)⁻¹ C Wᵀ.
"""

from __future__ import annotations

from torch import Tensor

from erq.reduce.gram import Gram
from erq.reduce.ridge import factor, solve


def aqer(gram: Gram, weight: Tensor, strength: float, has_bias: bool = True) -> Tensor:
    """The updated weight.

    Args:
        gram: statistics of the layer.
        weight: fp64 [N, D + 1], bias last (0 if there is none).
        strength: λ in the units of the Gram matrix (`ridge_strength`).
        has_bias: False solves without the constant input.

    Returns:
        fp64 [N, D + 1].
    """
    n = len(gram.g) if has_bias else len(gram.g) - 1
    delta = solve(factor(gram.g[:n, :n], strength), gram.c[:n] @ weight[:, :-1].t())
    out = weight.clone()
    out[:, :n] += delta.t()
    return out

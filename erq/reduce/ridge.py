"""(G + λI)⁻¹ B by fp64 Cholesky: the only solver, and the meaning of λ.

In reversed order of the columns, every trailing block of G + λI is a leading block of one matrix:
one factor serves the solve of all columns and those of Wqer's rounds.
"""

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
    mean = max(float(g.diagonal().mean()), torch.finfo(torch.float64).tiny)
    for extra in (0.0, *(10.0**e for e in range(-12, 0))):
        shifted = g.clone()
        shifted.diagonal().add_(strength + extra * mean)
        result = torch.linalg.cholesky_ex(shifted)
        lower: Tensor = result.L
        # Every row's diagonal entry comes out of all of the row: one that is not finite shows.
        if int(result.info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return lower
    raise ValueError("the Gram matrix of a layer's inputs holds NaN or infinite values")


class Ridge:
    """Solves with the trailing blocks of G + λI.

    Args:
        gram: statistics of a layer. strength: λ >= 0 (`ridge_strength`).
        has_bias: False leaves out the constant input, the last column.

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """

    def __init__(self, gram: Gram, strength: float, has_bias: bool) -> None:
        self.size = gram.columns + 1 if has_bias else gram.columns
        self._lower = factor(gram.g[: self.size, : self.size].flip(0, 1), strength)

    def solve(self, b: Tensor, start: int = 0) -> Tensor:
        """(G_rr + λI)⁻¹ b for the columns r from `start` on; b fp64 [size − start, m]."""
        rest = self.size - start
        out: Tensor = torch.cholesky_solve(b.flip(0), self._lower[:rest, :rest])
        return out.flip(0)

    def remaining(self, columns: slice) -> Tensor:
        """What is left of the moment of `columns` s, fp64 [n, n], once the columns r behind them
        have made up for it: the Schur complement G_ss + λI − G_sr (G_rr + λI)⁻¹ G_rs."""
        block = slice(self.size - columns.stop, self.size - columns.start)
        lower = self._lower[block, block]
        return (lower @ lower.t()).flip(0, 1)

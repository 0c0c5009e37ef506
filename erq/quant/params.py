"""What a quantizer is: frozen, validated values that map floats to b-bit codes and back.

Every quantizer of b bits has exactly 2**b codes. Layout of scales: a 0-d scale quantizes a whole
tensor; a scale of shape [N] quantizes the rows of a [N, K] weight matrix, or the last dimension of
an activation, depending on the function that applies it (`erq.quant.functional`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer in 2..8; raise ValueError otherwise."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"{name} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}; "
            "choose one of these widths (a_bits=16 keeps activations in floating point)"
        )
    return bits


def _check_scale(scale: Tensor, what: str) -> None:
    if scale.dtype != torch.float32 or scale.dim() > 1:
        raise ValueError(
            f"{what} must be float32 of shape [] or [N], got {scale.dtype} {list(scale.shape)}"
        )
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ValueError(f"{what} must be finite and > 0, got values down to {float(scale.min())}")


@dataclass(frozen=True)
class AffineParams:
    """x ≈ (code − zero_point) · scale, code = clamp(round(x / scale) + zero_point, 0, 2**bits − 1).

    The division is carried out as a multiplication by `inv_scale`, here and in every kernel.

    Args:
        scale: fp32, [] per tensor or [N] per channel, > 0.
        zero_point: int32, same shape; may lie outside 0..2**bits − 1.
        bits: 2..8.

    Raises:
        ValueError: a shape, dtype or range that is not the above.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check_scale(self.scale, "scale")
        if self.zero_point.dtype != torch.int32 or self.zero_point.shape != self.scale.shape:
            raise ValueError(
                f"zero_point must be int32 of shape {list(self.scale.shape)} like scale, "
                f"got {self.zero_point.dtype} {list(self.zero_point.shape)}"
            )

    @property
    def inv_scale(self) -> Tensor:
        """1 / scale in fp32: the factor every quantize multiplies by."""
        return self.scale.reciprocal()

    def to(self, device: torch.device | str) -> AffineParams:
        """The same quantizer with its tensors on `device`."""
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))


@dataclass(frozen=True)
class DualAffineParams:
    """Dual uniform quantization (DUQ): outlier input channels have their own scale per row.

    Args:
        outlier: parameters [N] of the outlier input channels.
        rest: parameters [N] of all other input channels, same bits.
        columns: int64 [S], the outlier input channels, sorted, distinct, 0 < S < K.

    Source: method.md of the paper's step "Dual Uniform Quantization"; docs/math.md, section DUQ.
    """

    outlier: AffineParams
    rest: AffineParams
    columns: Tensor

    def __post_init__(self) -> None:
        if self.outlier.bits != self.rest.bits or self.outlier.scale.shape != self.rest.scale.shape:
            raise ValueError("both halves of a dual quantizer need the same bits and rows")
        if self.columns.dtype != torch.int64 or self.columns.dim() != 1 or not len(self.columns):
            raise ValueError(
                "columns must be a non-empty int64 vector, got "
                f"{self.columns.dtype} {list(self.columns.shape)}"
            )
        if bool((self.columns.diff() <= 0).any()) or int(self.columns[0]) < 0:
            raise ValueError("columns must be sorted, distinct and >= 0")

    @property
    def bits(self) -> int:
        """Width of the codes, the same for both halves."""
        return self.outlier.bits

    def to(self, device: torch.device | str) -> DualAffineParams:
        """The same quantizer with its tensors on `device`."""
        return DualAffineParams(
            self.outlier.to(device), self.rest.to(device), self.columns.to(device)
        )


@dataclass(frozen=True)
class LogParams:
    """Base-√2 logarithmic quantizer of softmax outputs: x ≈ scale · 2^(−code/2).

    Args:
        scale: fp32 [], > 0; the value of code 0 (larger inputs saturate there).
        bits: 2..8.
        zero_last: True: the last code 2**bits − 1 means exactly 0, and every input whose rounded
            exponent would reach it. False: the last code is one more level, and nothing is 0.

    Source: RepQ-ViT's log√2 quantizer, which has 2**bits + 1 values; the choice of what the last
    code means is measured in docs/math.md.
    """

    scale: Tensor
    bits: int
    zero_last: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check_scale(self.scale, "scale")
        if self.scale.dim() != 0:
            raise ValueError(f"a log quantizer has one scale, got {list(self.scale.shape)}")

    def to(self, device: torch.device | str) -> LogParams:
        """The same quantizer with its tensor on `device`."""
        return replace(self, scale=self.scale.to(device))


WeightParams = AffineParams | DualAffineParams
Params = AffineParams | DualAffineParams | LogParams

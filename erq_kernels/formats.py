"""How codes lie in memory: the dense bit stream of files, and the layout that integer GEMMs read.

Codes of b bits are whole numbers 0..2**b − 1. In tensors they are int8: the code itself for
b <= 7, code − 128 for b = 8 (`code_offset`), since int8 is what tensor cores multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def code_offset(bits: int) -> int:
    """What is subtracted from a code so that it fits int8: 128 for 8 bits, else 0."""
    return 128 if bits == 8 else 0


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits in the dense stream."""
    return (count * bits + 7) // 8


def check_range(codes: Tensor, bits: int) -> None:
    """Raise ValueError unless every code lies in 0..2**bits − 1."""
    if not codes.numel():
        return
    ordered = codes if codes.dtype in (torch.uint8, torch.int8) else codes.to(torch.int64)
    low, high = (int(c) for c in ordered.aminmax())
    if low < 0 or high >= 1 << bits:
        raise ValueError(
            f"codes of {bits} bits must lie in 0..{(1 << bits) - 1}, got {low}..{high}"
        )


def check_stream(packed: Tensor, bits: int, count: int) -> None:
    """Raise ValueError unless `packed` holds `count` codes of `bits` bits."""
    fits = packed.dim() > 0 and packed.numel() == packed_size(count, bits)
    if packed.dtype != torch.uint8 or not fits:
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes (uint8), got "
            f"{packed.numel()} of {packed.dtype}"
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Dense row-major bit stream of codes: code i starts at bit i·bits, least significant first.

    Args:
        codes: integer tensor of any shape, every value in 0..2**bits − 1.
        bits: 1..8.

    Returns:
        uint8 [ceil(numel · bits / 8)]; unused bits of the last byte are 0.

    Raises:
        ValueError: a code outside its range.
    """
    check_range(codes, bits)
    flat = codes.reshape(-1).to(torch.int64)
    # Eight codes fill exactly `bits` bytes: one 64-bit word each.
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    shifts = torch.arange(8, device=flat.device) * bits
    words = (padded << shifts).sum(dim=1)
    out = (words[:, None] >> (torch.arange(bits, device=flat.device) * 8)) & 0xFF
    return out.to(torch.uint8).reshape(-1)[: packed_size(flat.numel(), bits)].contiguous()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Codes of a dense bit stream.

    Args:
        packed: uint8 [ceil(prod(shape) · bits / 8)].

    Returns:
        uint8 codes of `shape`, each 0..2**bits − 1.

    Raises:
        ValueError: a stream whose length does not fit the shape.
    """
    count = 1
    for n in shape:
        count *= n
    check_stream(packed, bits, count)
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    words = (padded.to(torch.int64) << (torch.arange(bits, device=packed.device) * 8)).sum(dim=1)
    codes = (words[:, None] >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(-1)[:count].reshape(shape)


K_ALIGN = 32
"""A K segment of the GEMM layout is a multiple of so many columns: whole loads, whole MMA steps."""


def k_order(columns: Tensor | None, k: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Order in which a GEMM reads the input channels: outlier columns first, segments padded.

    Args:
        columns: int64 [S] sorted outlier columns, or None.
        k: number of input channels.

    Returns:
        order: int64 [K'], position → input channel; at padding any channel, its weight is 0.
            None if it is the natural order.
        real: bool [K'], False at padding; None with the natural order.
        split: length of the first segment, padding included.
    """
    device = None if columns is None else columns.device
    everything = torch.arange(k, device=device)
    if columns is None:
        segments = [everything]
    else:
        rest = torch.ones(k, dtype=torch.bool, device=device)
        rest[columns] = False
        segments = [columns, everything[rest]]
    padded = [torch.nn.functional.pad(s, (0, -len(s) % K_ALIGN), value=-1) for s in segments]
    order = torch.cat(padded)
    if columns is None and len(order) == k:
        return None, None, k
    return order.clamp(min=0), order >= 0, len(padded[0])


@dataclass(frozen=True)
class GemmOperands:
    """What `qlinear` reads besides the activation codes.

    Args:
        weight: int8 [N, K'], code − zero_point, columns in `order`, 0 at padding; or, for
            `qlinear_packed`, uint8 of `order_packed`.
        scale: fp32 [N], activation scale · weight scale of the first segment.
        scale2: fp32 [N] of the second segment, or None.
        split: length of the first segment; K' without a second one.
        bias: fp32 [N], the layer's bias with the activation zero point folded in.
        order: int64 [K'], position → input channel (`k_order`), or None for natural order.
    """

    weight: Tensor
    scale: Tensor
    scale2: Tensor | None
    split: int
    bias: Tensor
    order: Tensor | None


def repacked_columns(k: int, outliers: int) -> int:
    """K': columns of the GEMM layout of `k` input channels, `outliers` of them in a segment of
    their own.
    """
    return sum(-(-n // K_ALIGN) * K_ALIGN for n in (outliers, k - outliers))


def check_centered(
    codes: Callable[[], Tensor],
    bits: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Raise ValueError, naming the zero point, unless every code − zero_point fits int8.

    Args:
        codes: gives the codes [N, K]; asked only where the zero points alone do not decide.
        zero_point: int32 [N]; zero_point2: that of `columns`.
    """
    named = (("zero_point", zero_point), ("zero_point2", zero_point2))
    if all(z is None or _surely_fits(z, bits) for _, z in named):
        return
    known = codes()
    dual = torch.zeros(known.shape[1], dtype=torch.bool, device=known.device)
    if columns is not None:
        dual[columns] = True
    for (name, z), chosen in zip(named, (~dual, dual), strict=True):
        part = known[:, chosen]
        if z is None or not part.numel():
            continue
        lowest = int((part.amin(dim=1).long() - z).min())
        highest = int((part.amax(dim=1).long() - z).max())
        if lowest < -128 or highest > 127:
            raise ValueError(
                f"{name}: weight code − zero_point must fit int8 (−128..127), got "
                f"{lowest}..{highest}; fit the weight with centered_int8"
            )


def _surely_fits(zero_point: Tensor, bits: int) -> bool:
    """Whether every code of `bits` bits minus any of the zero points fits int8."""
    if not zero_point.numel():
        return True
    low, high = (int(z) for z in zero_point.aminmax())
    return low >= 2**bits - 128 and high <= 128


def center(
    codes: Tensor,
    bits: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """The weight that integer GEMMs read: code − zero_point in the order of `k_order`.

    Args:
        codes: uint8 [N, K], natural column order.
        zero_point: int32 [N]; zero_point2: that of the outlier `columns`, int64 [S], or None.

    Returns:
        int8 [N, K'], 0 at padding.

    Raises:
        ValueError: a code − zero_point outside int8.
    """
    check_centered(lambda: codes, bits, zero_point, zero_point2, columns)
    centered = codes.to(torch.int32) - zero_point[:, None]
    if columns is not None:
        assert zero_point2 is not None
        centered[:, columns] = codes[:, columns].to(torch.int32) - zero_point2[:, None]
    order, real, _ = k_order(columns, codes.shape[1])
    if order is not None and real is not None:
        centered = centered[:, order.to(codes.device)] * real.to(codes.device)
    return centered.to(torch.int8)


def repack(
    packed: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`center` of the packed codes [N, k]: bit stream → the layout that integer GEMMs read."""
    codes = unpack(packed, bits, (zero_point.shape[0], k))
    return center(codes, bits, zero_point, zero_point2, columns)


def order_packed(packed: Tensor, bits: int, n: int, k: int, columns: Tensor | None) -> Tensor:
    """The packed layout that `qlinear_packed` reads: codes in the order of `k_order`, any at
    padding.

    Args:
        packed: uint8 dense bit stream of codes [n, k]. columns: int64 [S] outliers, or None.

    Returns:
        uint8 [n, K' · bits / 8]; K' is a multiple of K_ALIGN, so a row is whole 32-bit words. In
        the natural order it is the stream itself.
    """
    order, _, _ = k_order(columns, k)
    if order is None:
        return packed.reshape(n, k * bits // 8)
    codes = unpack(packed, bits, (n, k))[:, order.to(packed.device)]
    return pack(codes, bits).reshape(n, codes.shape[1] * bits // 8)


def gemm_operands(
    weight: Tensor,
    k: int,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: int,
    scale2: Tensor | None = None,
    columns: Tensor | None = None,
) -> GemmOperands:
    """What a quantized linear layer's GEMM reads; simulation and deployment both run on it.

    Args:
        weight: int8 [N, K'] of `center` or `repack`. k: input channels.
        scale: fp32 [N] of all columns but `columns`.
        bias: fp32 [N] or None.
        x_scale, x_zero_point, x_bits: the activation quantizer, per tensor.
        scale2: fp32 [N] of the outlier `columns`, or None.
        columns: int64 [S], or None.
    """
    first, second = scale, None
    if columns is not None:
        assert scale2 is not None
        first, second = scale2, scale
    order, _, split = k_order(columns, k)
    # The stored activation code is q − offset and x = (q − z)·s, so every output carries the
    # constant −(z − offset)·Σ_k w' per segment. fp64, rounded once.
    shift = (x_zero_point - code_offset(x_bits)).double()
    zeros = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    folded = zeros if bias is None else bias.double()
    m1 = x_scale * first
    folded = folded - shift * m1.double() * weight[:, :split].sum(dim=1).double()
    m2 = None if second is None else x_scale * second
    if m2 is not None:
        folded = folded - shift * m2.double() * weight[:, split:].sum(dim=1).double()
    order = None if order is None else order.to(weight.device)
    return GemmOperands(weight, m1, m2, split, folded.float(), order)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Rows of 4-bit codes, two to a byte: column 2j in the low half of byte j.

    Args:
        codes: int8 [..., K], K even; the low four bits of each count, so −8..−1 keep their two's
            complement.

    Returns:
        uint8 [..., K / 2].
    """
    low, high = ((codes[..., i::2] & 15).to(torch.uint8) for i in (0, 1))
    return low | high << 4


def unpack_nibbles(packed: Tensor, signed: bool = False) -> Tensor:
    """int8 [..., 2·B] of uint8 [..., B], the inverse of `pack_nibbles`: 0..15, or −8..7."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8)
    return (codes ^ 8) - 8 if signed else codes


def pack_weight(weight: Tensor, split: int) -> tuple[Tensor, Tensor | None] | None:
    """A GEMM weight as 4-bit numbers and what to add to those of a row and segment.

    weight = number + offset. A row whose weights lie in −8..7 needs no offset; any other row whose
    largest and smallest weight are at most 15 apart, as W4's are, gets one.

    Args:
        weight: int8 [N, K'] of `center` or `repack`. split: length of the first segment.

    Returns:
        uint8 [N, K' / 2] of `pack_nibbles` and int32 [segments, N], or None where no row needs an
        offset; None where a row spans more than 4 bits.
    """
    segments = [s for s in (weight[:, :split], weight[:, split:]) if s.shape[1]]
    numbers, offsets = [], []
    for segment in segments:
        low, high = segment.to(torch.int32).aminmax(dim=1)
        if bool((high - low > 15).any()):
            return None
        fits = (low >= -8) & (high <= 7)
        offset = torch.where(fits, 0, low + 8)
        numbers.append((segment - offset[:, None]).to(torch.int8))
        offsets.append(offset)
    if not segments:
        return weight.new_empty((len(weight), 0), dtype=torch.uint8), None
    packed = pack_nibbles(torch.cat(numbers, dim=1))
    every = torch.stack(offsets).to(torch.int32)
    return packed, every if bool(every.any()) else None


def unpack_weight(packed: Tensor, offset: Tensor | None, split: int) -> Tensor:
    """int8 [N, K'] of what `pack_weight` gives."""
    numbers = unpack_nibbles(packed, signed=True)
    if offset is not None:
        numbers[:, :split] += offset[0, :, None].to(torch.int8)
        numbers[:, split:] += offset[-1, :, None].to(torch.int8)
    return numbers

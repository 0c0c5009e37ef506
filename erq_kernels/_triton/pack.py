"""Dense bit stream of codes, written and read on the device (`formats.pack`, `unpack`, `repack`).

Grid of pack and unpack: one program per GROUPS groups of 8 codes. Eight codes of b bits are b whole
bytes, so a group owns its bytes: they are built in one 64-bit word, and no byte is written twice.
Grid of repack: one program per BLOCK columns of one output row; each code is read from the two
bytes that it may lie in.

Evidence: equal to the reference under Triton's interpreter; compiled (bench/static.py). Not run on
a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels.formats import k_order, packed_size

GROUPS = 128
BLOCK = 1024


@triton.jit
def pack_kernel(codes, out, count, size, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """codes integers [count] in 0..2**BITS − 1 → out uint8 [size]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, 8)[None, :]
    index = group * 8 + lane  # [GROUPS, 8]
    code = tl.load(codes + index, mask=index < count, other=0).to(tl.int64)
    word = tl.sum(code << (lane * BITS), axis=1)[:, None]
    byte = group * BITS + lane
    tl.store(out + byte, (word >> (lane * 8)).to(tl.uint8), mask=(lane < BITS) & (byte < size))


@triton.jit
def unpack_kernel(packed, out, count, size, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """packed uint8 [size] → out uint8 codes [count]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, 8)[None, :]
    byte = group * BITS + lane  # [GROUPS, 8]
    value = tl.load(packed + byte, mask=(lane < BITS) & (byte < size), other=0).to(tl.int64)
    word = tl.sum(value << (lane * 8), axis=1)[:, None]
    index = group * 8 + lane
    code = (word >> (lane * BITS)) & (2**BITS - 1)
    tl.store(out + index, code.to(tl.uint8), mask=index < count)


@triton.jit
def repack_kernel(
    packed, order, zero_point, zero_point2, out, K, K_OUT, split, size,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """packed uint8 [size] of codes [N, K] → out int8 [N, K_OUT].

    order int64 [K_OUT] gives the channel of each column, −1 at padding.
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < K_OUT
    channel = tl.load(order + position, mask=inside, other=-1)
    real = channel >= 0
    bit = (row * K + channel) * BITS
    byte = bit // 8
    low = tl.load(packed + byte, mask=real, other=0).to(tl.int32)
    high = tl.load(packed + byte + 1, mask=real & (byte + 1 < size), other=0).to(tl.int32)
    code = ((low | (high << 8)) >> (bit % 8).to(tl.int32)) & (2**BITS - 1)
    zero = tl.load(zero_point + row)
    if zero_point2 is not None:
        zero = tl.where(position < split, tl.load(zero_point2 + row), zero)
    tl.store(out + row * K_OUT + position, tl.where(real, code - zero, 0).to(tl.int8), mask=inside)


def _plan_pack(codes: Tensor, out: Tensor, bits: int) -> Launch:
    count = codes.numel()
    return Launch(
        kernel=pack_kernel,
        grid=(triton.cdiv(count, 8 * GROUPS),),
        args={"codes": codes, "out": out, "count": count, "size": out.numel()},
        constants={"BITS": bits, "GROUPS": GROUPS},
        num_warps=4,
        num_stages=1,
    )


def _plan_unpack(packed: Tensor, out: Tensor, bits: int) -> Launch:
    count = out.numel()
    return Launch(
        kernel=unpack_kernel,
        grid=(triton.cdiv(count, 8 * GROUPS),),
        args={"packed": packed, "out": out, "count": count, "size": packed.numel()},
        constants={"BITS": bits, "GROUPS": GROUPS},
        num_warps=4,
        num_stages=1,
    )


def _plan_repack(
    packed: Tensor,
    order: Tensor,
    split: int,
    out: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None,
) -> Launch:
    n, k_out = out.shape
    return Launch(
        kernel=repack_kernel,
        grid=(n, triton.cdiv(k_out, BLOCK)),
        args={
            "packed": packed, "order": order, "zero_point": zero_point,
            "zero_point2": zero_point2, "out": out, "K": k, "K_OUT": k_out, "split": split,
            "size": packed.numel(),
        },
        constants={"BITS": bits, "BLOCK": BLOCK},
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def pack(codes: Tensor, bits: int) -> Tensor:
    """`formats.pack` on the device; the range check waits for the device.

    Raises:
        ValueError: a code outside 0..2**bits − 1.
    """
    size = packed_size(codes.numel(), bits)
    out = torch.empty(size, dtype=torch.uint8, device=codes.device)
    if not size:
        return out
    codes = codes.to(torch.uint8) if codes.dtype == torch.bool else codes
    low, high = (int(t) for t in codes.aminmax())
    if low < 0 or high >= 1 << bits:
        raise ValueError(
            f"codes of {bits} bits must lie in 0..{(1 << bits) - 1}, got {low}..{high}"
        )
    _plan_pack(codes.contiguous(), out, bits).run()
    return out


def pack_why_not(codes: Tensor, bits: int) -> str | None:
    """Why the kernel cannot run these arguments, or None: it takes all."""
    return None


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """`formats.unpack` on the device.

    Raises:
        ValueError: a stream whose length does not fit the shape.
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes (uint8), got "
            f"{packed.numel()} of {packed.dtype}"
        )
    out = torch.empty(tuple(shape), dtype=torch.uint8, device=packed.device)
    if count:
        _plan_unpack(packed.contiguous(), out, bits).run()
    return out


def unpack_why_not(packed: Tensor, bits: int, shape: Sequence[int]) -> str | None:
    """Why the kernel cannot run these arguments, or None: it takes all."""
    return None


def repack(
    packed: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`formats.repack` on the device, for codes that `formats.check_centered` has passed."""
    n = zero_point.shape[0]
    natural, real, split = k_order(columns, k)
    if natural is None or real is None:
        order = torch.arange(k, device=packed.device)
    else:
        order = torch.where(real, natural, -1).to(packed.device)
    out = torch.empty((n, len(order)), dtype=torch.int8, device=packed.device)
    if out.numel():
        second = None if zero_point2 is None else zero_point2.contiguous()
        _plan_repack(
            packed.contiguous(), order, split, out, bits, k, zero_point.contiguous(), second
        ).run()
    return out


def repack_why_not(
    packed: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> str | None:
    """Why the kernel cannot run these arguments, or None: it takes all."""
    return None


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Widths with and without codes that cross bytes."""
    for bits in (3, 4):
        codes = torch.empty(768 * 768, dtype=torch.uint8, device="meta")
        packed = torch.empty(packed_size(768 * 768, bits), dtype=torch.uint8, device="meta")
        yield StaticCase(f"pack {bits} bits", _plan_pack(codes, packed, bits))
        yield StaticCase(f"unpack {bits} bits", _plan_unpack(packed, codes, bits))
        zero = torch.empty(768, dtype=torch.int32, device="meta")
        order = torch.empty(768 + 32, dtype=torch.int64, device="meta")
        out = torch.empty((768, 768 + 32), dtype=torch.int8, device="meta")
        launch = _plan_repack(packed, order, 32, out, bits, 768, zero, zero)
        yield StaticCase(f"repack {bits} bits", launch)

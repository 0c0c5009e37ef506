"""Dense bit stream of codes, written and read on the device (`formats.pack`, `formats.unpack`).

Grid: one program per GROUPS groups of 8 codes. Eight codes of b bits are b whole bytes, so a group
owns its bytes: they are built in one 64-bit word, and no byte is written twice.

Evidence: equal to the reference under Triton's interpreter; compiled for sm_80 and sm_90. Not run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels.formats import packed_size

GROUPS = 128


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


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Widths with and without codes that cross bytes."""
    for bits in (3, 4):
        codes = torch.empty(768 * 768, dtype=torch.uint8, device="meta")
        packed = torch.empty(packed_size(768 * 768, bits), dtype=torch.uint8, device="meta")
        yield StaticCase(f"pack {bits} bits", _plan_pack(codes, packed, bits))
        yield StaticCase(f"unpack {bits} bits", _plan_unpack(packed, codes, bits))

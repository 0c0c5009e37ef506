"""Codes of a float tensor (`reference.quantize`), any strides in, contiguous out.

Grid: one program per BLOCK_R rows by BLOCK_C columns. The tensor is seen as [N0, N1, N2, C] with
its own strides; dimensions that lie in memory as one are merged first, so a contiguous tensor with
one scale is a single row, and a permuted view of q, k or v is read in place.

Evidence: equal to the reference under Triton's interpreter; compiled for sm_80 and sm_90. Not run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.numerics import pack_pairs, quantize_to_int8

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_DIMS = 4


@triton.jit(do_not_specialize=["R"])
def quantize_kernel(
    x, out, inv_scale, zero_point, R, N1, N2, C, stride_0, stride_1, stride_2, stride_c,
    BITS: tl.constexpr, PER_COLUMN: tl.constexpr, PACKED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x float [N0, N1, N2, C] of R = N0·N1·N2 rows → out int8, contiguous; or packed, C even."""
    tiles = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0)
    rows = tile // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (tile % tiles).to(tl.int64) * BLOCK_C
    cols = tl.arange(0, BLOCK_C)
    in_c = cols < C - first
    inside = (rows < R)[:, None] & in_c[None, :]
    start = (
        (rows // N2 // N1).to(tl.int64) * stride_0
        + (rows // N2 % N1).to(tl.int64) * stride_1
        + (rows % N2).to(tl.int64) * stride_2
    )
    x += first * stride_c
    value = tl.load(x + (start[:, None] + cols[None, :] * stride_c), mask=inside, other=0)
    if PER_COLUMN:
        inv = tl.load(inv_scale + first + cols, mask=in_c, other=0.0)[None, :]
        zero = tl.load(zero_point + first + cols, mask=in_c, other=0)[None, :]
    else:
        inv = tl.load(inv_scale)
        zero = tl.load(zero_point)
    codes = quantize_to_int8(value.to(tl.float32), inv, zero, BITS)
    if PACKED:
        half = tl.arange(0, BLOCK_C // 2)
        out += first // 2
        in_half = (rows < R)[:, None] & (half < (C - first) // 2)[None, :]
        at = rows.to(tl.int64)[:, None] * (C // 2) + half[None, :]
        tl.store(out + at, pack_pairs(codes), mask=in_half)
    else:
        out += first
        tl.store(out + (rows.to(tl.int64)[:, None] * C + cols[None, :]), codes, mask=inside)


def _merge(x: Tensor, keep_last: bool) -> tuple[list[int], list[int]]:
    """Sizes and strides of x, dimensions that lie in memory as one merged; one is left at least.

    The last dimension stays alone if keep_last: it has a quantizer per column.
    """
    sizes, strides = [x.shape[-1]], [x.stride(-1)]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        alone = keep_last and len(sizes) == 1
        if not alone and (stride == sizes[0] * strides[0] or sizes[0] == 1):
            strides[0] = stride if sizes[0] == 1 else strides[0]
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            strides.insert(0, stride)
    return sizes, strides


def _plan(x: Tensor, out: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Launch:
    """The launch for a non-empty x of at least one dimension."""
    per_column = inv_scale.dim() == 1
    sizes, strides = _merge(x, per_column)
    if len(sizes) > _DIMS:
        x = x.contiguous()
        sizes, strides = _merge(x, per_column)
    sizes = [1] * (_DIMS - len(sizes)) + sizes
    strides = [0] * (_DIMS - len(strides)) + strides
    rows, columns = sizes[0] * sizes[1] * sizes[2], sizes[3]
    block_c = min(2048, triton.next_power_of_2(columns))
    block_r = min(2048 // block_c, triton.next_power_of_2(rows))
    return Launch(
        kernel=quantize_kernel,
        grid=(triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),),
        args={
            "x": x, "out": out, "inv_scale": inv_scale, "zero_point": zero_point,
            "R": rows, "N1": sizes[1], "N2": sizes[2], "C": columns,
            "stride_0": strides[0], "stride_1": strides[1], "stride_2": strides[2],
            "stride_c": strides[3],
        },
        constants={
            "BITS": bits, "PER_COLUMN": per_column, "PACKED": out.dtype == torch.uint8,
            "BLOCK_R": block_r, "BLOCK_C": block_c,
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def quantize(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int, out_packed: bool = False
) -> Tensor:
    """`reference.quantize`; contiguous."""
    shape, dtype = x.shape, torch.int8
    if out_packed:
        shape, dtype = torch.Size((*shape[:-1], shape[-1] // 2)), torch.uint8
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if x.numel():
        inv_scale, zero_point = inv_scale.contiguous(), zero_point.contiguous()
        _plan(x.reshape(-1) if x.dim() == 0 else x, out, inv_scale, zero_point, bits).run()
    return out


def quantize_why_not(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int, out_packed: bool = False
) -> str | None:
    """Why the kernel cannot run these arguments, or None."""
    if x.dtype not in FLOATS:
        return f"x must be float16, bfloat16 or float32, got {x.dtype}"
    return None


def static_cases(arch: int) -> Iterator[StaticCase]:
    """The input of a linear layer by both kinds of quantizer, and q of an attention layer."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(50432, 384, dtype=torch.bfloat16)
    q = empty(256, 197, 3, 6, 64, dtype=torch.bfloat16)[:, :, 0].transpose(1, 2)
    for name, values, columns in (("", x, ()), (" per column", x, (384,)), (" of q", q, ())):
        codes = empty(*values.shape, dtype=torch.int8)
        inv_scale = empty(*columns, dtype=torch.float32)
        zero_point = empty(*columns, dtype=torch.int32)
        yield StaticCase(f"quantize{name}", _plan(values, codes, inv_scale, zero_point, 4))
    packed = empty(50432, 192, dtype=torch.uint8)
    scalar, zero = empty(dtype=torch.float32), empty(dtype=torch.int32)
    yield StaticCase("quantize packed", _plan(x, packed, scalar, zero, 4))

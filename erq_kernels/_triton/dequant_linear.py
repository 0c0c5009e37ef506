"""x @ Wᵀ + bias with W read from its packed codes (`reference.dequant_linear`), for M from 1 up.

Grid: one program per tile of the output, times SPLIT parts of K. With SPLIT > 1 (few rows) the
parts leave fp32 sums behind, which a second kernel adds in order: no atomics, so equal calls give
equal bits.

W is never written out. Where rows begin on a 32-bit word (WORDS), codes are cut out of whole words
(`bitstream`), otherwise each out of the two bytes around it.

code − zero_point is the operand, in x's dtype, and the scale of the row multiplies the finished
sum: the operand is exact while |code − zero_point| <= 256 in bfloat16, 2048 in float16. Outlier
columns have their own zero point, and an operand times the ratio of the two scales, rounded to x's
dtype. Sums are fp32; float32 is multiplied in full precision, without TF32.

Evidence: under Triton's interpreter (which multiplies bfloat16 as float32) within the bounds of
tests/kernels/test_dequant.py; compiled for sm_80 and sm_90. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton import INTERPRETED
from erq_kernels._triton.bitstream import codes_of_words, unit_of
from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.quantize import FLOATS
from erq_kernels.formats import packed_size

# fp32 holds the whole numbers around 2**23: code | bits of 2**23 is 2**23 + code.
_TWO_23 = tl.constexpr(8388608.0)
_TWO_23_BITS = tl.constexpr(0x4B000000)
# Largest ratio of scales inside an operand: 64 · 1023 stays within fp16.
_MAX_RATIO = tl.constexpr(64.0)


@triton.jit
def _codes_of_bytes(packed, cols, start, N, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """2**23 + code, fp32 [cols, BLOCK_K], of columns start…; packed is bytes, any K."""
    k = start + tl.arange(0, BLOCK_K)
    row = cols.to(tl.int64) * K * BITS  # bit at which the row begins
    bit = (row & 7).to(tl.int32)[:, None] + k[None, :] * BITS
    byte = (row >> 3)[:, None] + (bit >> 3)
    size = (N.to(tl.int64) * K * BITS + 7) >> 3
    inside = (k < K)[None, :]
    low = tl.load(packed + byte, mask=inside, other=0).to(tl.uint32)
    high = tl.load(packed + byte + 1, mask=inside & (byte + 1 < size), other=0).to(tl.uint32)
    code = ((low | (high << 8)) >> (bit & 7)) & (2**BITS - 1)
    return (code | _TWO_23_BITS).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def dequant_linear_kernel(
    x, packed, out, scale, zero_point, scale2, zero_point2, is_outlier, bias, M, N, K,
    units, stride_m, stride_k,
    BITS: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x float [M, K], packed codes [N, K] → out [M, N], or fp32 sums [SPLIT, M, N] if SPLIT > 1."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = cols < N
    # Beyond the edge the last row and column are read again, and not stored.
    x += tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_m
    w_rows = tl.minimum(cols, N - 1)
    s = tl.load(scale + cols, mask=in_n, other=1.0)
    shift = tl.load(zero_point + cols, mask=in_n, other=0).to(tl.float32) + _TWO_23
    if is_outlier is not None:
        s2 = tl.load(scale2 + cols, mask=in_n, other=1.0)
        shift2 = tl.load(zero_point2 + cols, mask=in_n, other=0).to(tl.float32) + _TWO_23
        unit = tl.maximum(s, s2 / _MAX_RATIO)
        ratio = (s / unit)[:, None]  # 1, unless the outliers' scale is more than 64 times larger
        ratio2 = (s2 / unit)[:, None]
        s = unit

    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    begin = tl.program_id(1) * part
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, tl.minimum(begin + part, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < K
        if EVEN:
            a = tl.load(x + k[None, :] * stride_k)
        else:
            a = tl.load(x + k[None, :] * stride_k, mask=in_k[None, :], other=0.0)
        if WORDS:
            w = codes_of_words(
                packed, w_rows, start, units, _TWO_23_BITS, BITS, UNIT, BLOCK_K, EVEN
            ).to(tl.float32, bitcast=True)
        else:
            w = _codes_of_bytes(packed, w_rows, start, N, K, BITS, BLOCK_K)
        if is_outlier is not None:
            outlier = (tl.load(is_outlier + k, mask=in_k, other=0) != 0)[None, :]
            w = w - tl.where(outlier, shift2[:, None], shift[:, None])
            w = w * tl.where(outlier, ratio2, ratio)
        else:
            w = w - shift[:, None]
        acc = tl.dot(a.to(OPERAND), w.to(OPERAND).T, acc, input_precision="ieee")

    inside = (rows < M)[:, None] & in_n[None, :]
    offset = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SPLIT == 1:
        y = acc * s[None, :]
        if bias is not None:
            y += tl.load(bias + cols, mask=in_n, other=0.0)[None, :]
        tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)
    else:
        out += tl.program_id(1).to(tl.int64) * M * N
        tl.store(out + offset, acc * s[None, :], mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_parts_kernel(
    parts, out, bias, M, N, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out [M, N] = parts[0] + … + parts[SPLIT − 1] + bias, in that order, from fp32 parts."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    offset = rows[:, None] * N + cols[None, :]
    y = tl.load(parts + offset, mask=inside, other=0.0)
    for i in tl.static_range(1, SPLIT):
        y += tl.load(parts + i * M * N + offset, mask=inside, other=0.0)
    if bias is not None:
        y += tl.load(bias + cols, mask=cols < N, other=0.0)[None, :]
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Config:
    """Tile of the product; split is how many programs share a tile's K."""

    block_m: int
    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int


# Programs that fill a GPU of some 130 multiprocessors twice.
_PROGRAMS = 256
_MAX_SPLIT = 16


def _configure(m: int, n: int, k: int, tensor_cores: bool, words: bool) -> _Config:
    """Tile for x [m, k], N = n, small enough that nothing spills.

    float32 runs on no tensor core, and bytes take a register or two per code.
    """
    few = m <= 32
    block_m = 16 if m <= 16 else 32
    if tensor_cores and words:
        if few:
            block_m, block_n, block_k, warps = block_m, 32, 128, 4
        elif m <= 256:
            block_m, block_n, block_k, warps = 64, 64, 64, 4
        else:
            block_m, block_n, block_k, warps = 128, 64, 64, 4
    elif tensor_cores and not few:
        block_m, block_n, block_k, warps = 64, 64, 32, 4
    elif words and not few:
        block_m, block_n, block_k, warps = 64, 64, 32, 8
    else:
        block_n, block_k, warps = 32, 32, 4
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    split = max(1, min(_PROGRAMS // tiles, _MAX_SPLIT, triton.cdiv(k, block_k))) if m <= 64 else 1
    return _Config(block_m, block_n, block_k, split, warps, 3)


def _operand(dtype: torch.dtype) -> Any:
    """Dtype of the product's operands; the interpreter cannot multiply bfloat16."""
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _plan(
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor,
    scale2: Tensor | None,
    zero_point2: Tensor | None,
    is_outlier: Tensor | None,
    bias: Tensor | None,
) -> list[Launch]:
    """The launches, in order, for M and N >= 1; is_outlier is int8 [K], not 0 at the outliers."""
    m, k = x.shape
    n = out.shape[1]
    unit = unit_of(bits)
    words = k % unit == 0 and int(packed.storage_offset()) % 4 == 0
    config = _configure(m, n, k, x.dtype != torch.float32, words)
    target = out
    if config.split > 1:
        target = torch.empty((config.split, m, n), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    product = Launch(
        kernel=dequant_linear_kernel,
        grid=(tiles, config.split),
        args={
            "x": x, "packed": packed.view(torch.int32) if words else packed, "out": target,
            "scale": scale, "zero_point": zero_point, "scale2": scale2,
            "zero_point2": zero_point2, "is_outlier": is_outlier, "bias": bias,
            "M": m, "N": n, "K": k, "units": k // unit,
            "stride_m": x.stride(0), "stride_k": x.stride(1),
        },
        constants={
            "BITS": bits, "UNIT": unit, "WORDS": words, "EVEN": k % config.block_k == 0,
            "OPERAND": _operand(x.dtype), "SPLIT": config.split,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if config.split == 1:
        return [product]
    block_n = min(256, triton.next_power_of_2(n))
    block_m = min(1024 // block_n, triton.next_power_of_2(m))
    addition = Launch(
        kernel=add_parts_kernel,
        grid=(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        args={"parts": target, "out": out, "bias": bias, "M": m, "N": n},
        constants={"SPLIT": config.split, "BLOCK_M": block_m, "BLOCK_N": block_n},
        num_warps=4,
        num_stages=1,
    )
    return [product, addition]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def dequant_linear(
    x: Tensor,
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor,
    scale2: Tensor | None = None,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`reference.dequant_linear`; contiguous [M, N] of x's dtype."""
    m, k = x.shape
    n = scale.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    is_outlier = None
    if columns is not None:
        is_outlier = torch.zeros(k, dtype=torch.int8, device=x.device).index_fill_(0, columns, 1)
    if out.numel():
        for launch in _plan(
            x, packed.reshape(-1), out, bits, scale.contiguous(), zero_point.contiguous(),
            _contiguous(scale2), _contiguous(zero_point2), is_outlier, _contiguous(bias),
        ):  # fmt: skip
            launch.run()
    return out


def dequant_linear_why_not(
    x: Tensor,
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor,
    scale2: Tensor | None = None,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> str | None:
    """Why the kernel cannot run these arguments, or None."""
    if x.dtype not in FLOATS:
        return f"x must be float16, bfloat16 or float32, got {x.dtype}"
    return None


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Widths of every kind, for one row, one image and a batch; rows that begin on any bit."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    # Small loads: a unit's three words, which are 12 bytes apart, and a step's flags. Rows that
    # begin on any bit are cut from bytes.
    for m, n, k, bits, dual, dtype, load_bytes, small_loads in (
        (1, 768, 768, 4, False, torch.bfloat16, 16, 0),
        (1, 768, 768, 3, True, torch.float16, 16, 4),
        (197, 768, 768, 8, False, torch.bfloat16, 16, 0),
        (50432, 768, 768, 4, False, torch.bfloat16, 16, 0),
        (50432, 768, 768, 6, True, torch.bfloat16, 16, 7),  # two units a thread
        (257, 1280, 588, 4, False, torch.float16, 1, 0),
    ):
        zero_point = empty(n, dtype=torch.int32)
        launches = _plan(
            empty(m, k, dtype=dtype), empty(packed_size(n * k, bits), dtype=torch.uint8),
            empty(m, n, dtype=dtype), bits, empty(n), zero_point, empty(n) if dual else None,
            zero_point if dual else None, empty(k, dtype=torch.int8) if dual else None, empty(n),
        )  # fmt: skip
        name = f"dequant_linear {m}×{n}×{k} {bits} bits{' dual' if dual else ''} {dtype}"
        for launch, part in zip(launches, ("", " sum"), strict=False):
            yield StaticCase(name.replace("torch.", "") + part, launch, load_bytes, small_loads)

"""`qlinear_packed`: `qlinear` on a weight that stays packed; each tile is unpacked on its way.

Grid, sums and epilogue: those of `qlinear`. A tile of codes is cut out of whole words
(`bitstream`; rows of the layout begin on one), its row's zero point is subtracted, what is padding
becomes 0, and the int8 result is the operand.

It saves memory, not time: every row of tiles unpacks the weight again, while the words themselves
come from the second-level cache as the int8 weight would.

Exactness: as `qlinear`, whose result it equals bit by bit.

Evidence: run in Triton's interpreter against the reference
(tests/kernels/test_triton_qlinear_packed.py), compiled for sm_80 to sm_120 (bench/static.py); not
yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton.bitstream import codes_of_words, unit_of
from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.qlinear import finish, locate_tile, qlinear_why_not
from erq_kernels.formats import K_ALIGN, repacked_columns

_ALIGN = tl.constexpr(K_ALIGN)
_GROUP_M = 8


@triton.jit
def _dot_segment(
    x, packed, rows, cols, first, length, real, zero, units, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Σ_k x[rows, first + k]·(code[cols, first + k] − zero) over k < real: int32.

    real of the segment's `length` columns are no padding; zero is int32 [BLOCK_N].
    """
    k = tl.arange(0, BLOCK_K)
    offset = (rows[:, None] * stride_x + k[None, :]).to(tl.uint32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, length, BLOCK_K):
        a = tl.load(x + first + start + offset, mask=(k < length - start)[None, :], other=0)
        codes = codes_of_words(packed, cols, first + start, units, 0, BITS, UNIT, BLOCK_K, EVEN).to(
            tl.int32
        )
        w = tl.where((k < real - start)[None, :], codes - zero[:, None], 0).to(tl.int8)
        acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["M"])
def qlinear_packed_kernel(
    x, packed, zero_point, zero_point2, out, scale, scale2, bias, layer_scale, residual, inv_scale,
    out_zero_point, M, N, steps, steps_first, real, real2, stride_x, stride_r,
    BITS: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, ACT: tl.constexpr, OUT_BITS: tl.constexpr, PER_COLUMN: tl.constexpr,
):  # fmt: skip
    """packed int32 words of codes [N, K']; real, real2: columns of each segment without padding.

    The lengths K' and that of the first segment come as `steps` of K_ALIGN columns, so that the
    compiler knows how rows of words are aligned.
    """
    K = steps * _ALIGN
    split = steps_first * _ALIGN
    units = steps * (_ALIGN // UNIT)
    row, col = locate_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)
    cols = tl.minimum(col + tl.arange(0, BLOCK_N), N - 1)
    x += row.to(tl.int64) * stride_x
    zero = tl.load(zero_point + cols)
    acc2 = None
    if scale2 is not None:
        zero2 = tl.load(zero_point2 + cols)
        acc2 = _dot_segment(
            x, packed, rows, cols, split, K - split, real2, zero2, units, stride_x,
            BLOCK_M, BLOCK_N, BLOCK_K, BITS, UNIT, EVEN,
        )  # fmt: skip
    acc = _dot_segment(
        x, packed, rows, cols, 0, split, real, zero, units, stride_x,
        BLOCK_M, BLOCK_N, BLOCK_S, BITS, UNIT, EVEN,
    )  # fmt: skip
    finish(
        acc, acc2, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale,
        out_zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
    )  # fmt: skip


@dataclass(frozen=True)
class _Config:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def _configure(m: int, n: int) -> _Config:
    """Tile, small enough that nothing spills."""
    if m <= 16:
        return _Config(16, 32, 128, 4, 3)
    if m <= 32:
        return _Config(32, 32, 128, 4, 3)
    if m <= 1024 or n <= 64:
        return _Config(64, 64, 64, 4, 3)
    # For sm_100, ptxas would otherwise aim at three programs a multiprocessor, and spill.
    return _Config(128, 64, 64, 4, 3, max_registers=248)


def _plan(
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    bits: int,
    k: int,
    outliers: int,
    zero_point: Tensor,
    zero_point2: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    bias: Tensor,
    act: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_inv_scale: Tensor | None,
    out_zero_point: Tensor | None,
    out_bits: int,
    config: _Config,
) -> Launch:
    """The launch of one call that writes `out`, [M, N] contiguous, M, N and k at least 1.

    Args:
        x, residual: rows of any stride, columns contiguous.
        packed: contiguous, its storage offset a multiple of 4.
        others: as `ops.qlinear_packed`; vectors contiguous.
    """
    (m, columns), n = x.shape, packed.shape[0]
    unit = unit_of(bits)
    split = -(-outliers // K_ALIGN) * K_ALIGN if outliers else columns
    block_s = min(config.block_k, triton.next_power_of_2(split)) if outliers else config.block_k
    # Columns that the last step of a segment reaches.
    ends = [triton.cdiv(split, block_s) * block_s]
    if outliers:
        ends.append(split + triton.cdiv(columns - split, config.block_k) * config.block_k)
    return Launch(
        kernel=qlinear_packed_kernel,
        grid=(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),),
        args={
            "x": x, "packed": packed.reshape(-1).view(torch.int32), "zero_point": zero_point,
            "zero_point2": zero_point2, "out": out, "scale": scale, "scale2": scale2,
            "bias": bias, "layer_scale": layer_scale, "residual": residual,
            "inv_scale": out_inv_scale, "out_zero_point": out_zero_point,
            "M": m, "N": n, "steps": columns // K_ALIGN, "steps_first": split // K_ALIGN,
            "real": outliers or k, "real2": k - outliers, "stride_x": x.stride(0),
            "stride_r": 0 if residual is None else residual.stride(0),
        },
        constants={
            "BITS": bits, "UNIT": unit, "EVEN": max(ends) <= columns,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_S": block_s,
            "BLOCK_K": config.block_k, "GROUP_M": _GROUP_M, "ACT": act,
            "OUT_BITS": 0 if out_inv_scale is None else out_bits,
            "PER_COLUMN": out_inv_scale is not None and out_inv_scale.dim() == 1,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )  # fmt: skip


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _with_contiguous_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def qlinear_packed(
    x: Tensor,
    packed: Tensor,
    w_bits: int,
    k: int,
    outliers: int,
    w_zero_point: Tensor,
    w_zero_point2: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    bias: Tensor,
    act: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
) -> Tensor:
    """See `ops.qlinear_packed`."""
    m, n = x.shape[0], packed.shape[0]
    dtype = out_dtype if out_inv_scale is None else torch.int8
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    packed = packed.contiguous()
    if packed.storage_offset() % 4:
        packed = packed.clone()
    _plan(
        _with_contiguous_columns(x), packed, out, w_bits, k, outliers, w_zero_point.contiguous(),
        _contiguous(w_zero_point2), scale.contiguous(), _contiguous(scale2), bias.contiguous(),
        act, _contiguous(layer_scale),
        None if residual is None else _with_contiguous_columns(residual),
        _contiguous(out_inv_scale), _contiguous(out_zero_point), out_bits, _configure(m, n),
    ).run()  # fmt: skip
    return out


def qlinear_packed_why_not(
    x: Tensor,
    packed: Tensor,
    w_bits: int,
    k: int,
    outliers: int,
    w_zero_point: Tensor,
    w_zero_point2: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    bias: Tensor,
    *epilogue: Any,
    **named: Any,
) -> str | None:
    """The reason these arguments cannot run here, or None."""
    return qlinear_why_not(x, packed, scale, scale2, 0, bias, *epilogue, **named)


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Layers of DeiT-S at 4 and 3 bits for one row, one image and a batch."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for m, n, k, bits, outliers in (
        (1, 1536, 384, 4, 0),
        (1, 1536, 384, 3, 0),
        (197, 1152, 384, 4, 5),
        (50432, 1152, 384, 4, 0),
        (50432, 1536, 384, 3, 5),
    ):
        columns = repacked_columns(k, outliers)
        zero_point = empty(n, dtype=torch.int32)
        dual = outliers > 0
        launch = _plan(
            empty(m, columns, dtype=torch.int8), empty(n, columns * bits // 8, dtype=torch.uint8),
            empty(m, n, dtype=torch.int8), bits, k, outliers, zero_point,
            zero_point if dual else None, empty(n), empty(n) if dual else None, empty(n), "gelu",
            None, None, empty(n), zero_point, 4, _configure(m, n),
        )  # fmt: skip
        name = f"qlinear_packed {m}×{n}×{k} {bits} bits{' dual' if dual else ''}"
        # Small loads: the three words of a unit of 3-bit codes, which are 12 bytes apart.
        yield StaticCase(name, launch, small_loads=3 if bits == 3 else 0)

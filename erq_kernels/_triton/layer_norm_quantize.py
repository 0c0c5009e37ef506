"""LayerNorm, then codes in the column order of the next GEMM (`reference.layer_norm_quantize`).

Grid: one program per ROWS whole rows, held in registers: fp32 mean, then fp32 variance about it.
With an order, the program reads its rows again, by channel: they are in the first-level cache, the
channels mostly ascend, and in this form the codes leave as whole vectors. (Scattering them would
need the inverse order and write single bytes; a gather between registers takes hundreds of shuffles
a thread.)

Evidence: under Triton's interpreter codes differ from the reference's by at most one, in fewer than
1e-4 of all; compiled for sm_80 and sm_90. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton import INTERPRETED
from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.numerics import pack_pairs, quantize_to_int8
from erq_kernels._triton.quantize import FLOATS

# Whole rows are held in registers.
MAX_COLUMNS = 16384
# Programs that fill a GPU twice; the interpreter runs one after the other.
_PROGRAMS = 1 if INTERPRETED else 256


@triton.jit
def _codes(
    normal, weight, bias, inv_scale, zero_point, channel, inside,
    BITS: tl.constexpr, PER_COLUMN: tl.constexpr,
):  # fmt: skip
    """int8 codes of normalised values [ROWS, C]; channel [C] is each column's input channel."""
    w = tl.load(weight + channel, mask=inside, other=0.0)[None, :]
    b = tl.load(bias + channel, mask=inside, other=0.0)[None, :]
    if PER_COLUMN:
        inv = tl.load(inv_scale + channel, mask=inside, other=0.0)[None, :]
        zero = tl.load(zero_point + channel, mask=inside, other=0)[None, :]
    else:
        inv = tl.load(inv_scale)
        zero = tl.load(zero_point)
    return quantize_to_int8(normal * w + b, inv, zero, BITS)


@triton.jit
def _store(out, codes, first, in_m, K_OUT, PACKED: tl.constexpr):
    """Codes [ROWS, C] of the columns from `first` on; `out` has the rows' first elements."""
    if PACKED:
        half = first // 2 + tl.arange(0, codes.shape[1] // 2)
        tl.store(out + half[None, :], pack_pairs(codes), mask=in_m & (half < K_OUT // 2)[None, :])
    else:
        cols = first + tl.arange(0, codes.shape[1])
        tl.store(out + cols[None, :], codes, mask=in_m & (cols < K_OUT)[None, :])


@triton.jit(do_not_specialize=["M"])
def layer_norm_quantize_kernel(
    x, out, weight, bias, inv_scale, zero_point, order, M, K, K_OUT, stride_m, stride_k, eps,
    BITS: tl.constexpr, PER_COLUMN: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """x float [M, K] → out int8 [M, K_OUT], contiguous; order None: K_OUT = K; or packed, K_OUT
    even.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, ROWS)[:, None]
    in_m = local < M - first
    cols = tl.arange(0, BLOCK)
    in_k = cols < K
    inside = in_m & in_k[None, :]
    x += first * stride_m + local * stride_m
    row = K_OUT // 2 if PACKED else K_OUT
    out += first * row + local * row
    value = tl.load(x + cols[None, :] * stride_k, mask=inside, other=0).to(tl.float32)
    mean = (tl.sum(value, axis=1) / K)[:, None]
    centred = tl.where(in_k[None, :], value - mean, 0.0)  # [ROWS, BLOCK]
    variance = tl.sum(centred * centred, axis=1) / K
    rstd = tl.rsqrt(variance + eps)[:, None]
    if order is None:
        codes = _codes(
            centred * rstd, weight, bias, inv_scale, zero_point, cols, in_k, BITS, PER_COLUMN
        )
        _store(out, codes, 0, in_m, K_OUT, PACKED)
    else:
        for start in range(0, K_OUT, BLOCK_OUT):
            position = start + tl.arange(0, BLOCK_OUT)
            in_out = position < K_OUT
            channel = tl.load(order + position, mask=in_out, other=0).to(tl.int32)
            written = in_m & in_out[None, :]  # [ROWS, BLOCK_OUT]
            again = tl.load(x + channel[None, :] * stride_k, mask=written, other=0)
            permuted = _codes(
                (again.to(tl.float32) - mean) * rstd, weight, bias, inv_scale, zero_point,
                channel, in_out, BITS, PER_COLUMN,
            )  # fmt: skip
            _store(out, permuted, start, in_m, K_OUT, PACKED)


def _plan(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None = None,
) -> Launch:
    """The launch for x [M, K], M and K >= 1."""
    m, k = x.shape
    block = triton.next_power_of_2(k)
    # Several short rows share the loads of weight, bias and order, if that leaves programs enough.
    rows = max(1, min(2048 // max(block, 128), triton.next_power_of_2(m) // (2 * _PROGRAMS)))
    return Launch(
        kernel=layer_norm_quantize_kernel,
        grid=(triton.cdiv(m, rows),),
        args={
            "x": x, "out": out, "weight": weight, "bias": bias, "inv_scale": inv_scale,
            "zero_point": zero_point, "order": order, "M": m, "K": k,
            "K_OUT": k if order is None else len(order),
            "stride_m": x.stride(0), "stride_k": x.stride(1), "eps": eps,
        },
        constants={
            "BITS": bits, "PER_COLUMN": inv_scale.dim() == 1, "PACKED": out.dtype == torch.uint8,
            "ROWS": rows, "BLOCK": block, "BLOCK_OUT": max(64, 1024 // rows),
        },
        num_warps=max(4, min(16, rows * block // 512)),
        num_stages=1,
    )  # fmt: skip


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None = None,
    out_packed: bool = False,
) -> Tensor:
    """`reference.layer_norm_quantize`; that `order` holds channels of x is not checked here."""
    columns = x.shape[1] if order is None else order.shape[0]
    shape = (x.shape[0], columns // 2 if out_packed else columns)
    dtype = torch.uint8 if out_packed else torch.int8
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if out.numel():
        weight, bias = weight.contiguous(), bias.contiguous()
        inv_scale, zero_point = inv_scale.contiguous(), zero_point.contiguous()
        order = None if order is None else order.contiguous()
        _plan(x, out, weight, bias, eps, inv_scale, zero_point, bits, order).run()
    return out


def layer_norm_quantize_why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None = None,
    out_packed: bool = False,
) -> str | None:
    """Why the kernel cannot run these arguments, or None."""
    if x.dtype not in FLOATS:
        return f"x must be float16, bfloat16 or float32, got {x.dtype}"
    if x.shape[1] > MAX_COLUMNS:
        return f"rows must not be longer than {MAX_COLUMNS}, got {x.shape[1]}"
    return None


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Rows of DeiT-S, ViT-B and Swin, outlier columns first; those of one image; natural order."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for m, k, columns in (
        (50432, 384, 416),
        (50432, 768, 832),
        (100352, 96, 128),
        (197, 384, 416),
        (50432, 384, 0),
    ):
        order = empty(columns, dtype=torch.int64) if columns else None
        launch = _plan(
            empty(m, k, dtype=torch.bfloat16), empty(m, columns or k, dtype=torch.int8), empty(k),
            empty(k), 1e-6, empty(), empty(dtype=torch.int32), 4, order,
        )  # fmt: skip
        name = "ordered" if columns else "natural"
        yield StaticCase(f"layer_norm_quantize {m}×{k} {name}", launch)

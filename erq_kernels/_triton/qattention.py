"""Attention on codes (`reference.qattention`): integer QKᵀ, softmax, log-√2 codes, PV, codes out.

Grid: one program per BLOCK_M query rows of one (batch, head). q, k, v, the bias and the output have
any strides.

A code depends on the sum of its whole row, so the keys are passed twice, BLOCK_N at a time. With
CHUNKS > 0 (short rows; the last chunk has LAST keys) all scores of the row block stay in registers
between the passes; with CHUNKS = 0 the second pass computes them again.

Scores. q is centred as far as int8 holds it (wholly, unless its codes have 8 bits); what is left of
the zero points is corrected with row sums in int32. So scores equal the reference's bit for bit.

Codes. With t = s − max and Z = Σ exp t, −2 log2(p · p_inv_scale) is
2 log2 Z − 2 log2 p_inv_scale − 2 log2(e) t: no division, no second logarithm or exponential.

Values. Even codes k weigh 2^(−k/2) in a sum E, odd ones 2^(−(k+1)/2) in a sum F. Subtracting k
halves of an exponent step from the bits of 2^15 gives 2^(15−k/2) for even k, and
1.5 · 2^(15−(k+1)/2) for odd k; without its mantissa, that is the weight alone. So one subtraction
and one mask per score make the operands of two products with v − zero_point, B = E + 1.5 F and
A = E + F, from which E and F follow. Up to 6 bits the operands are exact in fp16 (beyond, weights
below 2^−39 are lost) as long as |v − zero_point| <= 2048. Up to 4 bits the sums are exact in fp32
too, as long as they stay below 2^15: for 2184 keys of any weight, if the zero point is a code.

Float probabilities (no p_inv_scale): exp(s − max) in fp16 times v − zero_point, divided by Z last.

Evidence: under Triton's interpreter equal to the reference, except where −2 log2(p · p_inv_scale)
lies within its rounding error of a half; compiled for sm_80 and sm_90. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.numerics import pack_pairs, quantize_to_int8
from erq_kernels._triton.quantize import FLOATS

_TWO_LOG2E = tl.constexpr(2 * 1.4426950408889634)
_SQRT2 = tl.constexpr(2.0**0.5)
# Adding 1.5 · 2**23 rounds to a whole number and leaves it in the low bits (`numerics`).
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_TWO_15_BITS = tl.constexpr((127 + 15) << 23)
_NO_MANTISSA = tl.constexpr(-(1 << 23))

_MAX_HEAD_DIM = 128


@triton.jit
def _rows(
    x, rows, first, T, D, stride_t, stride_d, WIDTH: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """int8 codes [rows, WIDTH] of dimensions first…; 0 beyond D, and beyond T, reached if EDGE."""
    dims = first + tl.arange(0, WIDTH)
    mask = (dims < D)[None, :]
    if EDGE:
        mask = mask & (rows < T)[:, None]
    return tl.load(x + rows[:, None] * stride_t + dims[None, :] * stride_d, mask=mask, other=0)


@triton.jit
def _centred_queries(
    q, near, rows, first, T, D, stride_qt, stride_qd, WIDTH: tl.constexpr
):  # fmt: skip
    """int8 q − near [rows, WIDTH] of dimensions first…, 0 beyond T and D; its row sums, int32."""
    inside = (rows < T)[:, None] & (first + tl.arange(0, WIDTH) < D)[None, :]
    codes = _rows(q, rows, first, T, D, stride_qt, stride_qd, WIDTH, True)
    centred = tl.where(inside, codes.to(tl.int32) - near, 0)
    return centred.to(tl.int8), tl.sum(centred, axis=1)


@triton.jit
def _scores(
    q, q_tail, q_rest, row_term, k, bias, score_scale, rows, start, T, D,
    stride_kt, stride_kd, stride_bm, stride_bn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """fp32 scores [BLOCK_M, BLOCK_N] of the keys from start on; −inf beyond T, reached if EDGE."""
    keys = start + tl.arange(0, BLOCK_N)
    codes = _rows(k, keys, 0, T, D, stride_kt, stride_kd, BLOCK_D, EDGE)
    acc = tl.dot(q, codes.T, out_dtype=tl.int32)
    if TAIL > 0:
        codes_tail = _rows(k, keys, BLOCK_D, T, D, stride_kt, stride_kd, q_tail.shape[1], EDGE)
        acc = tl.dot(q_tail, codes_tail.T, acc, out_dtype=tl.int32)
    acc += row_term[:, None]
    if q_rest != 0:
        sums = tl.sum(codes.to(tl.int32), axis=1)
        if TAIL > 0:
            sums += tl.sum(codes_tail.to(tl.int32), axis=1)
        acc -= (q_rest * sums)[None, :]
    scores = acc.to(tl.float32) * score_scale
    inside = (keys < T)[None, :]
    if bias is not None:
        added = tl.load(
            bias + rows[:, None] * stride_bm + keys[None, :] * stride_bn,
            mask=(rows < T)[:, None] & inside,
            other=0.0,
        )
        scores += added.to(tl.float32)
    if EDGE:
        scores = tl.where(inside, scores, float("-inf"))
    return scores


@triton.jit
def _values(
    v, v_zero, keys, first, T, D, stride_vt, stride_vd,
    WIDTH: tl.constexpr, ZERO_LAST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """fp16 v − zero_point [keys, WIDTH] of dimensions first…; finite where masked."""
    codes = _rows(v, keys, first, T, D, stride_vt, stride_vd, WIDTH, EDGE)
    # Int to float by MAGIC's bits: a conversion runs at a quarter of the rate.
    values = (codes.to(tl.int32) + (_MAGIC_BITS - v_zero)).to(tl.float32, bitcast=True) - _MAGIC
    if EDGE and not ZERO_LAST:  # the last code of the keys beyond T has a weight
        values = tl.where((keys < T)[:, None], values, 0.0)
    return values.to(tl.float16)


@triton.jit
def _add_values(
    a, b, a_tail, b_tail, below, log_sum, v, v_zero, start, T, D, stride_vt, stride_vd,
    BITS: tl.constexpr, ZERO_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """2^15 · A and 2^15 · B, [BLOCK_M, BLOCK_D] and [BLOCK_M, TAIL], with the keys from start on.

    below is s − max [BLOCK_M, BLOCK_N], log_sum [BLOCK_M] 2 log2 Z − 2 log2 p_inv_scale.
    """
    last: tl.constexpr = 2**BITS - 1
    y = tl.maximum(tl.fma(below, -_TWO_LOG2E, log_sum[:, None]), 0.0)
    if not ZERO_LAST:
        y = tl.minimum(y, last)
    # The shift leaves the code alone: the low 10 bits of MAGIC_BITS are 0.
    bits = _TWO_15_BITS - ((y + _MAGIC).to(tl.int32, bitcast=True) << 22)
    if ZERO_LAST:
        # y rounds to the last code, which is odd, from just above the half below it.
        bits = tl.where(y > last - 0.5, 0, bits)
    weight_a = (bits & _NO_MANTISSA).to(tl.float32, bitcast=True).to(tl.float16)
    weight_b = bits.to(tl.float32, bitcast=True).to(tl.float16)
    keys = start + tl.arange(0, BLOCK_N)
    values = _values(v, v_zero, keys, 0, T, D, stride_vt, stride_vd, BLOCK_D, ZERO_LAST, EDGE)
    a = tl.dot(weight_a, values, a)
    b = tl.dot(weight_b, values, b)
    if TAIL > 0:
        tail = _values(v, v_zero, keys, BLOCK_D, T, D, stride_vt, stride_vd, TAIL, ZERO_LAST, EDGE)
        a_tail = tl.dot(weight_a, tail, a_tail)
        b_tail = tl.dot(weight_b, tail, b_tail)
    return a, b, a_tail, b_tail


@triton.jit
def _add_float_values(
    a, a_tail, below, v, v_zero, start, T, D, stride_vt, stride_vd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Z · Σ p (v − zero_point) with the keys from start on; below is s − max, p in fp16."""
    weight = tl.exp(below).to(tl.float16)  # 0 beyond T, so that values there do not matter
    keys = start + tl.arange(0, BLOCK_N)
    a = tl.dot(
        weight, _values(v, v_zero, keys, 0, T, D, stride_vt, stride_vd, BLOCK_D, True, EDGE), a
    )
    if TAIL > 0:
        tail = _values(v, v_zero, keys, BLOCK_D, T, D, stride_vt, stride_vd, TAIL, True, EDGE)
        a_tail = tl.dot(weight, tail, a_tail)
    return a, a_tail


@triton.jit
def _whole_values(a, b, scale):
    """(E + √2 F) · value_scale from 2^15 · A and 2^15 · B; scale is value_scale · 2^−15."""
    odd = 2.0 * (b - a)  # 2^15 · F
    return ((a - odd) + _SQRT2 * odd) * scale


@triton.jit
def _store(
    y, out, inv_scale, zero_point, rows, first, T, D, stride_ot, stride_od,
    WIDTH: tl.constexpr, OUT_BITS: tl.constexpr, PER_COLUMN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """fp32 values [rows, WIDTH] or their codes, dimensions first…; PACKED: D even."""
    dims = first + tl.arange(0, WIDTH)
    in_d = dims < D
    o = out + rows[:, None] * stride_ot + dims[None, :] * stride_od
    inside = (rows < T)[:, None] & in_d[None, :]
    if OUT_BITS == 0:
        tl.store(o, y, mask=inside)
    else:
        if PER_COLUMN:
            inv = tl.load(inv_scale + dims, mask=in_d, other=0.0)[None, :]
            zero = tl.load(zero_point + dims, mask=in_d, other=0)[None, :]
        else:
            inv = tl.load(inv_scale)
            zero = tl.load(zero_point)
        codes = quantize_to_int8(y, inv, zero, OUT_BITS)
        if PACKED:
            half = first // 2 + tl.arange(0, WIDTH // 2)
            at = out + rows[:, None] * stride_ot + half[None, :] * stride_od
            in_half = (rows < T)[:, None] & (half < D // 2)[None, :]
            tl.store(at, pack_pairs(codes), mask=in_half)
        else:
            tl.store(o, codes, mask=inside)


@triton.jit
def qattention_kernel(
    q, k, v, out, bias, q_zero_point, k_zero_point, v_zero_point, score_scale, p_inv_scale,
    value_scale, inv_scale, zero_point, H, T, D, bias_batches,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_bb, stride_bh, stride_bm, stride_bn,
    QK_BITS: tl.constexpr, AV_BITS: tl.constexpr, ZERO_LAST: tl.constexpr, OUT_BITS: tl.constexpr,
    PER_COLUMN: tl.constexpr, PACKED: tl.constexpr, CHUNKS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """q, k, v int8 [B, H, T, D] → out fp32, or int8 codes if OUT_BITS > 0; bias [n, H, T, T],
    n = bias_batches: those of every n entries of the batch in turn.

    Without p_inv_scale the probabilities are not quantized.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = (pair // H).to(tl.int64)
    head = (pair % H).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    out += batch * stride_ob + head * stride_oh
    if bias is not None:
        bias += (batch % bias_batches) * stride_bb + head * stride_bh
    # What a stored code of value 0 holds (formats.code_offset).
    qk_offset: tl.constexpr = 128 if QK_BITS == 8 else 0
    av_offset: tl.constexpr = 128 if AV_BITS == 8 else 0
    q_zero = tl.load(q_zero_point) - qk_offset
    k_zero = tl.load(k_zero_point) - qk_offset
    v_zero = tl.load(v_zero_point) - av_offset
    scale = tl.load(score_scale)

    # q' = code − near fits int8; Σ(q − zq)(k − zk) = Σ q'k − zk Σ q' − rest (Σ k − D zk).
    near = tl.minimum(tl.maximum(q_zero, 2**QK_BITS - 128 - qk_offset), 128 - qk_offset)
    rest = q_zero - near
    centred, sums = _centred_queries(q, near, rows, 0, T, D, stride_qt, stride_qd, BLOCK_D)
    centred_tail = centred
    if TAIL > 0:  # int8 products take 32 dimensions at least
        centred_tail, sums_tail = _centred_queries(
            q, near, rows, BLOCK_D, T, D, stride_qt, stride_qd, max(32, TAIL)
        )
        sums += sums_tail
    row_term = k_zero * (D * rest - sums)

    log_scale = 0.0
    if p_inv_scale is not None:
        log_scale = tl.log2(tl.load(p_inv_scale))
    a = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    a_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 16), tl.float32)
    b_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 16), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if CHUNKS > 0:
        scores = ()
        for i in tl.static_range(CHUNKS):
            part = _scores(
                centred, centred_tail, rest, row_term, k, bias, scale, rows, i * BLOCK_N, T, D,
                stride_kt, stride_kd, stride_bm, stride_bn,
                BLOCK_N if i + 1 < CHUNKS else LAST, BLOCK_D, TAIL, i + 1 == CHUNKS,
            )  # fmt: skip
            scores = scores + (part,)  # type: ignore[assignment]  # noqa: RUF005
            top = tl.maximum(top, tl.max(part, axis=1))
        belows = ()
        for i in tl.static_range(CHUNKS):
            below = scores[i] - top[:, None]
            belows = belows + (below,)  # type: ignore[assignment]  # noqa: RUF005
            total += tl.sum(tl.exp(below), axis=1)
        log_sum = 2.0 * (tl.log2(total) - log_scale)
        for i in tl.static_range(CHUNKS):
            if p_inv_scale is None:
                a, a_tail = _add_float_values(
                    a, a_tail, belows[i], v, v_zero, i * BLOCK_N, T, D, stride_vt, stride_vd,
                    BLOCK_N if i + 1 < CHUNKS else LAST, BLOCK_D, TAIL, i + 1 == CHUNKS,
                )  # fmt: skip
            else:
                a, b, a_tail, b_tail = _add_values(
                    a, b, a_tail, b_tail, belows[i], log_sum, v, v_zero, i * BLOCK_N, T, D,
                    stride_vt, stride_vd, AV_BITS, ZERO_LAST,
                    BLOCK_N if i + 1 < CHUNKS else LAST, BLOCK_D, TAIL, i + 1 == CHUNKS,
                )  # fmt: skip
    else:
        for start in range(0, T, BLOCK_N):
            part = _scores(
                centred, centred_tail, rest, row_term, k, bias, scale, rows, start, T, D,
                stride_kt, stride_kd, stride_bm, stride_bn, BLOCK_N, BLOCK_D, TAIL, True,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(part, axis=1))
            # A row whose scores so far are all −inf: any finite shift keeps −inf − shift from NaN.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            added = tl.sum(tl.exp(part - shift[:, None]), axis=1)
            total = total * tl.exp(top - shift) + added
            top = higher
        log_sum = 2.0 * (tl.log2(total) - log_scale)
        for start in range(0, T, BLOCK_N):
            part = _scores(
                centred, centred_tail, rest, row_term, k, bias, scale, rows, start, T, D,
                stride_kt, stride_kd, stride_bm, stride_bn, BLOCK_N, BLOCK_D, TAIL, True,
            )  # fmt: skip
            if p_inv_scale is None:
                a, a_tail = _add_float_values(
                    a, a_tail, part - top[:, None], v, v_zero, start, T, D, stride_vt, stride_vd,
                    BLOCK_N, BLOCK_D, TAIL, True,
                )  # fmt: skip
            else:
                a, b, a_tail, b_tail = _add_values(
                    a, b, a_tail, b_tail, part - top[:, None], log_sum, v, v_zero, start, T, D,
                    stride_vt, stride_vd, AV_BITS, ZERO_LAST, BLOCK_N, BLOCK_D, TAIL, True,
                )  # fmt: skip

    if p_inv_scale is None:
        norm = tl.load(value_scale) / total[:, None]
        y = a * norm
        y_tail = a_tail * norm
    else:
        y_scale = tl.load(value_scale) * 2.0**-15
        y = _whole_values(a, b, y_scale)
        y_tail = _whole_values(a_tail, b_tail, y_scale)
    _store(
        y, out, inv_scale, zero_point, rows, 0, T, D, stride_ot, stride_od,
        BLOCK_D, OUT_BITS, PER_COLUMN, PACKED,
    )  # fmt: skip
    if TAIL > 0:
        _store(
            y_tail, out, inv_scale, zero_point, rows, BLOCK_D, T, D, stride_ot, stride_od,
            TAIL, OUT_BITS, PER_COLUMN, PACKED,
        )  # fmt: skip


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    q_zero_point: Tensor,
    k_zero_point: Tensor,
    v_zero_point: Tensor,
    score_scale: Tensor,
    p_inv_scale: Tensor | None,
    value_scale: Tensor,
    qk_bits: int,
    av_bits: int,
    zero_last: bool,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_zero_point: Tensor | None,
    out_bits: int,
) -> Launch:
    """The launch for non-empty q, k, v."""
    b, h, t, d = q.shape
    block_d = 32 if d <= 32 else 64
    tail = 0 if d <= 64 else max(16, triton.next_power_of_2(d - 64))
    last = max(16, triton.next_power_of_2(t % 64 or 64))
    chunks = triton.cdiv(t, 64)
    # 64 keys take 32 registers of each thread, the two sums as many as there are dimensions.
    if tail or (chunks - 1) * 64 + last > 224:
        chunks = last = 0
    block_m = 64 if chunks or tail else 128
    block_n = {0: 64, 16: 32, 32: 32, 64: 16}[tail]
    biases = bias.shape[0] if bias is not None and bias.dim() == 4 else 1
    args: dict[str, Any] = {
        "q": q, "k": k, "v": v, "out": out,
        "bias": None if bias is None else bias.expand(biases, h, t, t),
        "q_zero_point": q_zero_point, "k_zero_point": k_zero_point, "v_zero_point": v_zero_point,
        "score_scale": score_scale, "p_inv_scale": p_inv_scale, "value_scale": value_scale,
        "inv_scale": None if out_inv_scale is None else out_inv_scale.contiguous(),
        "zero_point": None if out_zero_point is None else out_zero_point.contiguous(),
        "H": h, "T": t, "D": d, "bias_batches": biases,
    }  # fmt: skip
    for name, letter, axes in (
        ("q", "q", "bhtd"), ("k", "k", "bhtd"), ("v", "v", "bhtd"), ("out", "o", "bhtd"),
        ("bias", "b", "bhmn"),
    ):  # fmt: skip
        strides = (0, 0, 0, 0) if args[name] is None else args[name].stride()
        for axis, stride in zip(axes, strides, strict=True):
            args[f"stride_{letter}{axis}"] = stride
    return Launch(
        kernel=qattention_kernel,
        grid=(triton.cdiv(t, block_m) * b * h,),
        args=args,
        constants={
            "QK_BITS": qk_bits, "AV_BITS": av_bits, "ZERO_LAST": zero_last,
            "OUT_BITS": 0 if out_inv_scale is None else out_bits,
            "PER_COLUMN": out_inv_scale is not None and out_inv_scale.dim() == 1,
            "PACKED": out.dtype == torch.uint8,
            "CHUNKS": chunks, "LAST": last, "BLOCK_M": block_m, "BLOCK_N": block_n,
            "BLOCK_D": block_d, "TAIL": tail,
        },
        num_warps=block_m // 16,
        num_stages=1 if tail > 16 else 2,
        # For sm_100, ptxas would otherwise aim at more programs a multiprocessor, and spill.
        max_registers=248 if chunks > 2 or tail else None,
    )  # fmt: skip


def qattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_zero_point: Tensor,
    k_zero_point: Tensor,
    v_zero_point: Tensor,
    score_scale: Tensor,
    p_inv_scale: Tensor | None,
    value_scale: Tensor,
    qk_bits: int,
    av_bits: int,
    zero_last: bool = True,
    bias: Tensor | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    out_packed: bool = False,
) -> Tensor:
    """`reference.qattention`; contiguous [B, T, H, D]."""
    dtype = torch.float32 if out_inv_scale is None else torch.int8
    b, h, t, d = q.shape
    if out_packed:
        d, dtype = d // 2, torch.uint8
    out = torch.empty((b, t, h, d), dtype=dtype, device=q.device)
    if out.numel():
        _plan(
            q, k, v, out.transpose(1, 2), q_zero_point, k_zero_point, v_zero_point, score_scale,
            p_inv_scale, value_scale, qk_bits, av_bits, zero_last, bias, out_inv_scale,
            out_zero_point, out_bits,
        ).run()  # fmt: skip
    return out


def qattention_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_zero_point: Tensor,
    k_zero_point: Tensor,
    v_zero_point: Tensor,
    score_scale: Tensor,
    p_inv_scale: Tensor | None,
    value_scale: Tensor,
    qk_bits: int,
    av_bits: int,
    zero_last: bool = True,
    bias: Tensor | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    out_packed: bool = False,
) -> str | None:
    """Why the kernel cannot run these arguments, or None."""
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"the head dimension must not exceed {_MAX_HEAD_DIM}, got {q.shape[-1]}"
    if bias is not None and bias.dtype not in FLOATS:
        return f"bias must be float16, bfloat16 or float32, got {bias.dtype}"
    return None


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Attention of DeiT-S at 4 and 8 bits and with float probabilities, of Swin, of long rows, and
    of heads of 80 and 96.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    zero = empty(dtype=torch.int32)
    # Small loads: a thread has 4 or 8 bytes of the tiles of dimensions 64…
    for b, h, t, d, bits, has_bias, is_float, small_loads in (
        (256, 6, 197, 64, 4, False, False, 0),
        (256, 6, 197, 64, 8, False, False, 0),
        (256, 6, 197, 64, 8, False, True, 0),
        (4096, 3, 49, 32, 4, True, False, 0),
        (64, 6, 577, 64, 4, False, False, 0),
        (64, 6, 577, 64, 8, False, True, 0),
        (64, 16, 257, 80, 4, False, False, 3),
        (64, 8, 144, 96, 4, True, False, 3),
    ):
        q, k, v = empty(b, t, 3, h, d, dtype=torch.int8).permute(2, 0, 3, 1, 4)
        bias = empty(h, t, t) if has_bias else None
        out = empty(b, t, h, d, dtype=torch.int8).transpose(1, 2)
        launch = _plan(
            q, k, v, out, zero, zero, zero, empty(), None if is_float else empty(), empty(), bits,
            bits, True, bias, empty(), zero, bits,
        )  # fmt: skip
        name = f"qattention {t}×{d} {bits} bits"
        name += (" bias" if has_bias else "") + (" float" if is_float else "")
        yield StaticCase(name, launch, small_loads=small_loads)

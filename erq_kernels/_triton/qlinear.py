"""`qlinear`: int8 GEMM over two K segments, with the whole epilogue in the kernel.

Grid: one program per output tile [BLOCK_M, BLOCK_N], in columns of GROUP_M tiles.
A program: int32 sums of its tile over both segments, on tensor cores; then, EPILOGUE_N columns at a
    time, scale, bias, activation, LayerScale, residual, and either a cast or the next layer's
    codes.
Layouts: codes [M, K] and weight [N, K] row major, each read in whole 16-byte pieces where base, row
    stride and segment bounds are multiples of 16 (`formats.gemm_operands` sees to that); any other
    K, split and stride works, with narrower loads.

Exactness: the integer part is exact. The epilogue does the operations of `reference.qlinear` in
their order, each rounded to fp32 (no contraction to fused multiply-add), so without an activation
the result is the reference's bit by bit; erf and exp are within a few ulp of torch's, which can
move a code that lies on a rounding boundary. Codes equal the reference's for |out_zero_point| <
2**22 − 256.

Evidence: run in Triton's interpreter against the reference (tests/kernels/test_qlinear.py),
compiled for sm_80 to sm_120 (bench/static.py); not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from erq_kernels import configs
from erq_kernels._triton import INTERPRETED
from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.numerics import gelu, gelu_tanh, quantize_to_int8
from erq_kernels.configs import GemmConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# A thread holds one value of scale, bias, … per column of its piece. Whole tiles would need 32
# registers for each of them beside the accumulators; pieces of 32 columns let twice the programs
# fit.
_EPILOGUE_N = tl.constexpr(32)

# Columns of the first segment per step where there are two, times the dots of a step; twice that in
# long first segments. More would cost registers in the kernel's most crowded loop.
_FIRST_STEP = 32


@triton.jit
def locate_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and first column of this program's tile."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    top = pid // per_group * GROUP_M
    height = tl.minimum(tiles_m - top, GROUP_M)
    within = pid % per_group
    return (top + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _dot_segment(
    x, weight, rows, cols, length, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """Σ_k x[rows, k]·weight[cols, k] over k < length: int32 [BLOCK_M, BLOCK_N]."""
    STEP: tl.constexpr = BLOCK_K // DOTS
    k = tl.arange(0, STEP)
    # Unsigned, and apart from the moving bases: an offset then takes one register, not two.
    x_offset = (rows[:, None] * stride_x + k[None, :]).to(tl.uint32)  # [BLOCK_M, STEP]
    w_offset = (cols[None, :] * stride_w + k[:, None]).to(tl.uint32)  # [STEP, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, length, BLOCK_K):
        for i in tl.static_range(DOTS):
            at = start + i * STEP
            inside = k < length - at
            a = tl.load(x + at + x_offset, mask=inside[None, :], other=0)
            b = tl.load(weight + at + w_offset, mask=inside[:, None], other=0)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _dot_segment_tma(
    x, weight, row, col, length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same from descriptors of one segment; tiles [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, length, BLOCK_K):
        a = x.load([row, start])
        b = weight.load([col, start])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _split_columns(tile):
    """Left and right half of a tile; mma layouts repeat along N in registers, so nothing moves."""
    halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def finish(
    acc, acc2, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale, zero_point,
    M, N, stride_r, ACT: tl.constexpr, OUT_BITS: tl.constexpr, PER_COLUMN: tl.constexpr,
):  # fmt: skip
    """Epilogue of the sums [BLOCK_M, n] at (row, col): stores their [M, N] part of `out`."""
    if acc.shape[1] > _EPILOGUE_N:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = _split_columns(acc)
        left2 = None
        right2 = None
        if acc2 is not None:
            left2, right2 = _split_columns(acc2)
        finish(
            left, left2, row, col, out, scale, scale2, bias, layer_scale, residual,
            inv_scale, zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
        )  # fmt: skip
        finish(
            right, right2, row, col + half, out, scale, scale2, bias, layer_scale, residual,
            inv_scale, zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
        )  # fmt: skip
    else:
        rows = tl.arange(0, acc.shape[0])[:, None]
        cols = col + tl.arange(0, acc.shape[1])
        real = cols < N
        inside = (rows < M - row) & real[None, :]
        y = acc.to(tl.float32) * tl.load(scale + cols, mask=real, other=0.0)[None, :]
        if acc2 is not None:
            y += acc2.to(tl.float32) * tl.load(scale2 + cols, mask=real, other=0.0)[None, :]
        y += tl.load(bias + cols, mask=real, other=0.0)[None, :]
        if ACT == "gelu":
            y = gelu(y)
        elif ACT == "gelu_tanh":
            y = gelu_tanh(y)
        if layer_scale is not None:
            y *= tl.load(layer_scale + cols, mask=real, other=0.0)[None, :]
        if residual is not None:
            r = residual + row.to(tl.int64) * stride_r + (rows * stride_r + cols[None, :])
            y = tl.load(r, mask=inside, other=0.0).to(tl.float32) + y
        o = out + row.to(tl.int64) * N + (rows * N + cols[None, :])
        if OUT_BITS == 0:
            tl.store(o, y.to(out.dtype.element_ty), mask=inside)
        else:
            if PER_COLUMN:
                inv = tl.load(inv_scale + cols, mask=real, other=0.0)[None, :]
                zero = tl.load(zero_point + cols, mask=real, other=0)[None, :]
            else:
                inv = tl.load(inv_scale)
                zero = tl.load(zero_point)
            tl.store(o, quantize_to_int8(y, inv, zero, OUT_BITS), mask=inside)


@triton.jit(do_not_specialize=["M"])
def qlinear_kernel(
    x, weight, out, scale, scale2, bias, layer_scale, residual, inv_scale, zero_point,
    M, N, K, split, stride_x, stride_w, stride_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DOTS: tl.constexpr, ACT: tl.constexpr,
    OUT_BITS: tl.constexpr, PER_COLUMN: tl.constexpr,
):  # fmt: skip
    """Tiles through pointers. BLOCK_S is the first segment's step where there are two."""
    row, col = locate_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # Rows and columns over the edge repeat the last real one: in bounds without masks, never
    # stored.
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)
    cols = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - col)
    x += row.to(tl.int64) * stride_x
    weight += col.to(tl.int64) * stride_w
    if scale2 is None:
        acc = _dot_segment(
            x, weight, rows, cols, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, DOTS
        )
        acc2 = None
    else:
        # The long segment first: the short one's loop, with its narrow tiles, has few addresses to
        # keep beside both sums. They stay int32 until the epilogue, which scales them piece by
        # piece.
        acc2 = _dot_segment(
            x + split, weight + split, rows, cols, K - split, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K, DOTS,
        )  # fmt: skip
        acc = _dot_segment(
            x, weight, rows, cols, split, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_S, DOTS
        )
    finish(
        acc, acc2, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale, zero_point,
        M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def qlinear_tma_kernel(
    x, weight, x2, weight2, out,
    scale, scale2, bias, layer_scale, residual, inv_scale, zero_point,
    M, N, K, split, stride_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, ACT: tl.constexpr, OUT_BITS: tl.constexpr, PER_COLUMN: tl.constexpr,
):  # fmt: skip
    """Tiles through tensor descriptors, a pair per segment: beyond their edges they read as 0."""
    row, col = locate_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if scale2 is None:
        acc = _dot_segment_tma(x, weight, row, col, K, BLOCK_M, BLOCK_N, BLOCK_K)
        acc2 = None
    else:
        acc2 = _dot_segment_tma(x2, weight2, row, col, K - split, BLOCK_M, BLOCK_N, BLOCK_K)
        acc = _dot_segment_tma(x, weight, row, col, split, BLOCK_M, BLOCK_N, BLOCK_S)
    finish(
        acc, acc2, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale, zero_point,
        M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
    )  # fmt: skip


def plan(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scale: Tensor,
    scale2: Tensor | None,
    split: int,
    bias: Tensor,
    act: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_inv_scale: Tensor | None,
    out_zero_point: Tensor | None,
    out_bits: int,
    config: GemmConfig,
) -> Launch:
    """The launch of one call that writes `out`, [M, N] contiguous, M and N at least 1.

    Args:
        x, weight, residual: rows of any stride, columns contiguous.
        others: as `ops.qlinear`; vectors contiguous.
        config: its `kernel` is "tma" or "gluon" only where `allows_tma` says so.
    """
    (m, k), n = x.shape, weight.shape[0]
    block_s = _FIRST_STEP * config.dots
    if split > block_s:
        block_s = max(block_s, 2 * _FIRST_STEP)
    args = {
        "out": out,
        "scale": scale,
        "scale2": scale2,
        "bias": bias,
        "layer_scale": layer_scale,
        "residual": residual,
        "inv_scale": out_inv_scale,
        "zero_point": out_zero_point,
        "M": m,
        "N": n,
        "K": k,
        "split": split,
        "stride_r": 0 if residual is None else residual.stride(0),
    }
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_S": block_s,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "ACT": act,
        "OUT_BITS": 0 if out_inv_scale is None else out_bits,
        "PER_COLUMN": out_inv_scale is not None and out_inv_scale.dim() == 1,
    }
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    if config.kernel == "gluon":
        # Where Triton interprets, it has no Gluon.
        from erq_kernels._triton import qlinear_gluon

        return qlinear_gluon.plan(x, weight, split, args, constants, grid, config)
    if config.kernel == "tma":
        kernel = qlinear_tma_kernel
        x2 = weight2 = None
        if scale2 is not None:
            x2 = _descriptor(x[:, split:], config.block_m, config.block_k)
            weight2 = _descriptor(weight[:, split:], config.block_n, config.block_k)
        step = config.block_k if scale2 is None else block_s
        args |= {
            "x": _descriptor(x[:, :split], config.block_m, step),
            "weight": _descriptor(weight[:, :split], config.block_n, step),
            "x2": x2,
            "weight2": weight2,
        }
    else:
        kernel = qlinear_kernel
        args |= {"x": x, "weight": weight, "stride_x": x.stride(0), "stride_w": weight.stride(0)}
        constants["DOTS"] = config.dots
    return Launch(
        kernel,
        grid,
        args,
        constants,
        config.num_warps,
        config.num_stages,
        config.max_registers,
    )


def _descriptor(tile_of: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tile_of, [rows, columns])


def allows_tma(x: Tensor, weight: Tensor, split: int) -> bool:
    """Whether descriptors can read the operands: bases, row strides, segments in 16-byte units."""
    operands = (x, weight)
    return (
        min(x.shape[1], split) > 0
        and split % 16 == 0
        and all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in operands)
        and all(t.stride(0) >= t.shape[1] for t in operands)
    )


def can_run(config: GemmConfig, x: Tensor, weight: Tensor, split: int, arch: int) -> bool:
    if config.kernel == "pointers":
        return True
    if config.kernel == "tma":
        return (INTERPRETED or arch >= 90) and allows_tma(x, weight, split)
    return not INTERPRETED and arch == 90 and allows_tma(x, weight, split)


@cache
def describe_device(device: torch.device) -> tuple[int, str]:
    """Compute capability and name; those of the interpreter are of no device."""
    if INTERPRETED:
        return 80, "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_name(device)


def _with_contiguous_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def qlinear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale2: Tensor | None,
    split: int,
    bias: Tensor,
    act: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    weight_offset: Tensor | None = None,
    out_packed: bool = False,
) -> Tensor:
    """See `ops.qlinear`; nothing is packed here (`qlinear_why_not`)."""
    (m, k), n = x.shape, weight.shape[0]
    dtype = out_dtype if out_inv_scale is None else torch.int8
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = _with_contiguous_columns(x), _with_contiguous_columns(weight)
    dual = scale2 is not None
    arch, device = describe_device(x.device)
    long = max(split, k - split, 1)
    config = configs.choose("qlinear", m, n, long, dual, arch, device)
    if not can_run(config, x, weight, split, arch):
        config = configs.heuristic(m, n, long, dual, arch)
        if not can_run(config, x, weight, split, arch):  # operands that no descriptor can read
            config = replace(config, kernel="pointers")
    plan(
        x,
        weight,
        out,
        scale.contiguous(),
        None if scale2 is None else scale2.contiguous(),
        split,
        bias.contiguous(),
        act,
        None if layer_scale is None else layer_scale.contiguous(),
        None if residual is None else _with_contiguous_columns(residual),
        None if out_inv_scale is None else out_inv_scale.contiguous(),
        None if out_zero_point is None else out_zero_point.contiguous(),
        out_bits,
        config,
    ).run()
    return out


def qlinear_why_not(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale2: Tensor | None,
    split: int,
    bias: Tensor,
    act: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    weight_offset: Tensor | None = None,
    out_packed: bool = False,
) -> str | None:
    """The reason these arguments cannot run here, or None."""
    if x.dtype == torch.uint8 or out_packed:
        return "Triton has no 4-bit tensor-core instruction: codes are int8 here, not packed"
    vectors = {"scale": scale, "scale2": scale2, "bias": bias, "layer_scale": layer_scale}
    for name, vector in vectors.items():
        if vector is not None and vector.dtype != torch.float32:
            return f"{name} must be float32, got {vector.dtype}"
    for name, dtype in (
        ("residual", None if residual is None else residual.dtype),
        ("out_dtype", out_dtype if out_inv_scale is None else None),
    ):
        if dtype is not None and dtype not in FLOATS:
            return f"{name} must be float16, bfloat16 or float32, got {dtype}"
    return None


# (name, M, N, long segment, first segment or 0, epilogue): layers of DeiT-S and DeiT-T at batch
# 256, 8 and 1, and heads. Together they reach every configuration of the heuristic.
_STATIC_SHAPES = (
    ("qkv", 50432, 1152, 384, 0, "codes"),
    ("fc1 gelu", 50432, 1536, 384, 0, "gelu"),
    ("fc1 dual gelu", 50432, 1536, 384, 32, "gelu"),
    ("fc1 dual gelu_tanh", 50432, 1536, 384, 64, "gelu_tanh"),
    ("fc2 residual", 50432, 384, 1536, 0, "residual"),
    ("proj dual residual", 50432, 384, 384, 64, "residual"),
    ("narrow residual", 50432, 192, 192, 0, "residual"),
    ("narrow dual", 50432, 192, 192, 32, "codes"),
    ("batch 8 qkv", 1576, 1152, 384, 0, "codes"),
    ("batch 1 qkv dual", 197, 1152, 384, 32, "codes"),
    ("batch 1 fc2", 197, 384, 1536, 0, "residual"),
    ("21k head batch 32", 32, 21843, 384, 0, "float"),
    ("head batch 1", 1, 1000, 384, 0, "float"),
)
_STATIC_OTHERS = ("qkv", "fc1 dual gelu", "fc2 residual")


def static_cases(arch: int) -> Iterator[StaticCase]:
    """Calls of `_STATIC_SHAPES` on `arch` as the heuristic configures them; some by all kernels."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for name, m, n, long, first, epilogue in _STATIC_SHAPES:
        default = configs.heuristic(m, n, long, first > 0, arch)
        variants = [(f"qlinear {name}", default)]
        if default.kernel == "tma" and name in _STATIC_OTHERS:
            variants.append((f"qlinear {name} pointers", replace(default, kernel="pointers")))
        elif arch >= 90 and name in _STATIC_OTHERS:
            # Without a limit ptxas keeps to 168 for sm_120 under Triton 3.6, and spills.
            limit = 248 if arch == 120 else default.max_registers
            tma = replace(default, kernel="tma", dots=1, max_registers=limit)
            variants.append((f"qlinear {name} tma", tma))
        if arch == 90 and name in _STATIC_OTHERS:
            gluon = replace(default, kernel="gluon", max_registers=None)
            variants.append((f"qlinear {name} gluon", gluon))
        k = first + long
        codes = epilogue in ("codes", "gelu", "gelu_tanh")
        add = epilogue == "residual"
        for label, config in variants:
            launch = plan(
                empty(m, k, dtype=torch.int8),
                empty(n, k, dtype=torch.int8),
                empty(m, n, dtype=torch.int8 if codes else torch.bfloat16),
                empty(n),
                empty(n) if first else None,
                first or k,
                empty(n),
                epilogue if "gelu" in epilogue else "none",
                empty(n) if add else None,
                empty(m, n, dtype=torch.bfloat16) if add else None,
                empty(n) if codes else None,
                empty(n, dtype=torch.int32) if codes else None,
                4 if codes else 0,
                config,
            )
            yield StaticCase(label, launch)

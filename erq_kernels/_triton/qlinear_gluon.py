"""`qlinear` for compute capability 9.0 with asynchronous wgmma, in Gluon.

Triton waits for every int8 wgmma before it goes on (it makes products asynchronous for fp32 sums
only); here one stays in flight while the next tiles arrive. `configs.choose` takes this kernel only
from a table that was measured on the device at hand.

Grid and epilogue: those of `qlinear`. A program: tiles of the long segment through TMA into a ring
of STAGES slots, a wgmma of BLOCK_K columns per step. A first segment has a slot and accumulators of
its own; its copy is issued first and multiplied while the ring fills.

Why a slot is never written while it is read:
- Step k fills the slot of step k + STAGES − 1, which is that of step k − 1. Before it, each warp
  group has waited until at most one wgmma is in flight, which is that of step k, and all threads
  have then met at a barrier; so every warp group has finished step k − 1, and has passed the wait
  on its slot's mbarrier. The one thread that arms the mbarrier again comes after that.
- The i-th use of a slot completes phase i of its mbarrier, whose parity is what is waited for; no
  slot is armed twice between two waits.
- A copy is issued only for a step that is waited for, so none outlives the program.
- wgmma and TMA both go through the async proxy: no fence is needed between them. The epilogue's
  own use of shared memory begins after the last wait and a barrier of the compiler's.
TMA fills what lies beyond a segment's edge, or beyond M and N, with zeros.

Exactness: as `qlinear`; the epilogue is the same operations in the same order.

Evidence: compiled for sm_90 under Triton 3.6 and 3.8: `wgmma.wait_group 1` in the loop, no spill,
two programs per multiprocessor (tests/bench/test_static.py). Gluon has no interpreter, and no run
on a GPU is recorded yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from erq_kernels._triton import numerics
from erq_kernels._triton.launch import Launch
from erq_kernels.configs import GemmConfig

# Columns of a first segment per step, at least.
_MIN_FIRST = 32
_EPILOGUE_N = gl.constexpr(32)  # as in `qlinear`

# Renamed after Triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_gelu = gluon.jit(numerics.gelu.fn)
_gelu_tanh = gluon.jit(numerics.gelu_tanh.fn)
_quantize_to_int8 = gluon.jit(numerics.quantize_to_int8.fn)


@gluon.jit
def _copy(x, weight, row, col, k, ready, a, b, wanted):
    """Start the copy of the tiles at column k into a and b, if wanted; `ready` tells its end."""
    mbarrier.expect(ready, x.block_type.nbytes + weight.block_type.nbytes, wanted)
    tma.async_copy_global_to_shared(x, [row, k], ready, a, wanted)
    tma.async_copy_global_to_shared(weight, [col, k], ready, b, wanted)


@gluon.jit
def _split_columns(tile):
    """Left and right half of a tile; the mma layout repeats along N in registers."""
    halves = gl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return gl.split(gl.permute(halves, (0, 2, 1)))


@gluon.jit
def _rows_and_columns(ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Indices [ROWS, 1] and [COLUMNS] in a tile of this layout."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    return gl.expand_dims(rows, 1), gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))


@gluon.constexpr_function
def _memory_layout(item_bits, warps):
    """Layout of a piece [rows, 32] in which a thread has 16 bytes of a row side by side."""
    items = 128 // item_bits
    return gl.BlockedLayout([1, items], [items, 32 // items], [warps, 1], [1, 0])


@gluon.jit
def _finish(
    acc, acc2, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale, zero_point,
    M, N, stride_r, ACT: gl.constexpr, OUT_BITS: gl.constexpr, PER_COLUMN: gl.constexpr,
):  # fmt: skip
    """Epilogue of the sums [BLOCK_M, n] at (row, col): stores their [M, N] part of `out`."""
    if acc.shape[1] > _EPILOGUE_N:
        half: gl.constexpr = acc.shape[1] // 2
        left, right = _split_columns(acc)
        left2 = None
        right2 = None
        if acc2 is not None:
            left2, right2 = _split_columns(acc2)
        _finish(
            left, left2, row, col, out, scale, scale2, bias, layer_scale, residual,
            inv_scale, zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
        )  # fmt: skip
        _finish(
            right, right2, row, col + half, out, scale, scale2, bias, layer_scale, residual,
            inv_scale, zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
        )  # fmt: skip
    else:
        sums: gl.constexpr = acc.type.layout
        _, at = _rows_and_columns(acc.shape[0], acc.shape[1], sums)
        cols = col + at
        real = cols < N
        s = gl.load(scale + cols, mask=real, other=0.0)
        y = acc.to(gl.float32) * gl.expand_dims(s, 0)
        if acc2 is not None:
            s2 = gl.load(scale2 + cols, mask=real, other=0.0)
            y += acc2.to(gl.float32) * gl.expand_dims(s2, 0)
        y += gl.expand_dims(gl.load(bias + cols, mask=real, other=0.0), 0)
        if ACT == "gelu":
            y = _gelu(y)
        elif ACT == "gelu_tanh":
            y = _gelu_tanh(y)
        if layer_scale is not None:
            y *= gl.expand_dims(gl.load(layer_scale + cols, mask=real, other=0.0), 0)
        if residual is not None:
            item: gl.constexpr = residual.dtype.element_ty.primitive_bitwidth
            stored: gl.constexpr = _memory_layout(item, gl.num_warps())
            rows, at = _rows_and_columns(acc.shape[0], acc.shape[1], stored)
            at = gl.expand_dims(col + at, 0)
            r = residual + row.to(gl.int64) * stride_r + (rows * stride_r + at)
            added = gl.load(r, mask=(rows < M - row) & (at < N), other=0.0)
            y = gl.convert_layout(added, sums).to(gl.float32) + y
        if OUT_BITS == 0:
            result = y.to(out.dtype.element_ty)
        else:
            if PER_COLUMN:
                inv = gl.expand_dims(gl.load(inv_scale + cols, mask=real, other=0.0), 0)
                zero = gl.expand_dims(gl.load(zero_point + cols, mask=real, other=0), 0)
            else:
                inv = gl.load(inv_scale)
                zero = gl.load(zero_point)
            result = _quantize_to_int8(y, inv, zero, OUT_BITS)
        width: gl.constexpr = out.dtype.element_ty.primitive_bitwidth
        written: gl.constexpr = _memory_layout(width, gl.num_warps())
        rows, at = _rows_and_columns(acc.shape[0], acc.shape[1], written)
        at = gl.expand_dims(col + at, 0)
        o = out + row.to(gl.int64) * N + (rows * N + at)
        inside = (rows < M - row) & (at < N)
        gl.store(o, gl.convert_layout(result, written), mask=inside)


@gluon.jit(do_not_specialize=["M"])
def qlinear_gluon_kernel(
    x, weight, x_first, weight_first, out, scale, scale2, bias, layer_scale, residual, inv_scale,
    zero_point, M, N, length, length_first, stride_r,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr, OUT_BITS: gl.constexpr,
    PER_COLUMN: gl.constexpr,
):  # fmt: skip
    """x, weight: descriptors of the long segment; x_first, weight_first: of the first, or None."""
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 32]
    )
    pid = gl.program_id(0)
    tiles_m = gl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * gl.cdiv(N, BLOCK_N)
    top = pid // per_group * GROUP_M
    height = gl.minimum(tiles_m - top, GROUP_M)
    within = pid % per_group
    row = (top + within % height) * BLOCK_M
    col = within // height * BLOCK_N

    a = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    b = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    if x_first is not None:
        FIRST: gl.constexpr = x_first.block_type.shape[1]
        a_first = gl.allocate_shared_memory(gl.int8, [BLOCK_M, FIRST], x_first.layout)
        b_first = gl.allocate_shared_memory(gl.int8, [BLOCK_N, FIRST], weight_first.layout)
        ready_first = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready_first, count=1)
        _copy(x_first, weight_first, row, col, 0, ready_first, a_first, b_first, True)
    steps = gl.cdiv(length, BLOCK_K)
    for i in gl.static_range(STAGES - 1):
        _copy(x, weight, row, col, i * BLOCK_K, ready.index(i), a.index(i), b.index(i), i < steps)

    acc_first = None
    if x_first is not None:
        acc_first = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, mma)
        steps_first = gl.cdiv(length_first, FIRST)
        for k in range(steps_first):
            mbarrier.wait(ready_first, k & 1)
            acc_first = warpgroup_mma(a_first, b_first.permute((1, 0)), acc_first)
            _barrier()
            _copy(
                x_first, weight_first, row, col, (k + 1) * FIRST, ready_first, a_first, b_first,
                k + 1 < steps_first,
            )  # fmt: skip
        mbarrier.invalidate(ready_first)

    acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.int32, mma))
    for k in range(steps):
        slot = k % STAGES
        mbarrier.wait(ready.index(slot), (k // STAGES) & 1)
        acc = warpgroup_mma(a.index(slot), b.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
        _barrier()
        later = k + STAGES - 1
        slot = later % STAGES
        _copy(
            x, weight, row, col, later * BLOCK_K, ready.index(slot), a.index(slot), b.index(slot),
            later < steps,
        )  # fmt: skip
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))

    if acc_first is None:
        _finish(
            acc, None, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale,
            zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
        )  # fmt: skip
    else:
        _finish(
            acc_first, acc, row, col, out, scale, scale2, bias, layer_scale, residual, inv_scale,
            zero_point, M, N, stride_r, ACT, OUT_BITS, PER_COLUMN,
        )  # fmt: skip


def plan(
    x: Tensor,
    weight: Tensor,
    split: int,
    epilogue: Mapping[str, Any],
    constants: Mapping[str, Any],
    grid: tuple[int, ...],
    config: GemmConfig,
) -> Launch:
    """The launch of one call; see `qlinear.plan`, which calls this.

    Args:
        epilogue: run-time arguments without the operands. constants: of the kernels with pointers.
    """
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    first = split if epilogue["scale2"] is not None else 0
    block_first = max(_MIN_FIRST, min(triton.next_power_of_2(first), block_k))
    args = {name: value for name, value in epilogue.items() if name not in ("K", "split")}
    args |= {
        "x": _descriptor(x[:, first:], block_m, block_k),
        "weight": _descriptor(weight[:, first:], block_n, block_k),
        "x_first": _descriptor(x[:, :first], block_m, block_first) if first else None,
        "weight_first": _descriptor(weight[:, :first], block_n, block_first) if first else None,
        "length": x.shape[1] - first,
        "length_first": first,
    }
    return Launch(
        qlinear_gluon_kernel,
        grid,
        args,
        {name: constants[name] for name in ("GROUP_M", "ACT", "OUT_BITS", "PER_COLUMN")}
        | {"STAGES": config.num_stages},
        config.num_warps,
        config.num_stages,
        config.max_registers,
    )


def _descriptor(tile_of: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8)
    return TensorDescriptor.from_tensor(tile_of, [rows, columns], layout)

"""Run by test_static.py without Triton's interpreter: prints what bench/static.py says about
calls that are wrong on purpose, as one JSON list."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.static import examine
from erq_kernels._triton.launch import Launch, StaticCase
from erq_kernels._triton.qlinear import plan
from erq_kernels.configs import GemmConfig


@triton.jit
def raising_kernel(x, N: tl.constexpr):
    tl.static_assert(N > 1, "a compile-time failure")
    tl.store(x, 0)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm(k: int, config: GemmConfig) -> Launch:
    """A dual GEMM that leaves codes after a GELU, of K columns in all."""
    m, n = 1024, 256
    x, weight = empty(m, k, dtype=torch.int8), empty(n, k, dtype=torch.int8)
    return plan(
        x, weight, empty(m, n, dtype=torch.int8), empty(n), empty(n), 32, empty(n), "gelu", None,
        None, empty(n), empty(n, dtype=torch.int32), 4, config,
    )  # fmt: skip


CONFIG = GemmConfig(64, 128, 128)
CASES = (
    StaticCase("good", gemm(416, CONFIG)),
    StaticCase("few registers", gemm(416, replace(CONFIG, max_registers=96))),
    StaticCase("unaligned rows", gemm(417, CONFIG)),
    StaticCase(
        "much shared memory", gemm(416, replace(CONFIG, block_m=128, num_stages=8, num_warps=8))
    ),
    StaticCase("raises", Launch(raising_kernel, (1,), {"x": empty(1)}, {"N": 1}, 4, 1)),
)

if __name__ == "__main__":
    print(json.dumps([asdict(examine(case, 90)) for case in CASES]))

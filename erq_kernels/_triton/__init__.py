"""Triton kernels, one file per op, and `numerics`, the arithmetic they share; loaded on first use.

The row that registers an op is in `erq_kernels._triton_backend`.
"""

import triton

# Triton decides at decoration; a later change of TRITON_INTERPRET has no effect on these kernels.
INTERPRETED: bool = triton.knobs.runtime.interpret

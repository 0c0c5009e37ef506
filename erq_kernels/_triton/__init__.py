"""Triton kernels, one file per op, and what they share; loaded on first use.

The row that registers an op is in `erq_kernels._triton_backend`.
"""

import triton
import triton.language as tl

# Triton decides when a function is decorated, once: these kernels now, its own library when it was
# imported. A later change of TRITON_INTERPRET has no effect on either.
INTERPRETED: bool = triton.knobs.runtime.interpret
IS_MIXED: bool = isinstance(tl.cdiv, triton.JITFunction) == INTERPRETED

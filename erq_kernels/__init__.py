"""Kernels: tensors of codes in, tensors out; knows no model."""

from erq_kernels import _cpu, _cuda, _triton_backend, ops  # noqa: F401 (most register kernels)
from erq_kernels.dispatch import BACKENDS, BackendError, explain, use

__all__ = ["BACKENDS", "BackendError", "explain", "ops", "use"]

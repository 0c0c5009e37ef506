"""Kernels: tensors of codes in, tensors out; knows no model."""

from erq_kernels import ops
from erq_kernels.dispatch import BACKENDS, BackendError, explain, use

__all__ = ["BACKENDS", "BackendError", "explain", "ops", "use"]

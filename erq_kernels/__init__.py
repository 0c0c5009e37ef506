"""Kernels: tensors of codes in, tensors out; knows no model."""

from erq_kernels import _triton_backend, ops  # noqa: F401 (registers the Triton kernels)
from erq_kernels.dispatch import BACKENDS, BackendError, explain, use

__all__ = ["BACKENDS", "BackendError", "explain", "ops", "use"]

"""Loads Triton and our kernels for its interpreter where there is no GPU, before anything else can.

Triton decides at its import whether its own functions are interpreted, and timm, which
tests/conftest.py needs, imports it; our kernels decide at theirs. The variable is set for these
imports alone: with it, `auto` would pick the interpreter over the reference in every test. The
`device` fixture of tests/kernels sets it again.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from erq_kernels import _triton_backend

if not torch.cuda.is_available() and _triton_backend.is_installed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for _module in sorted(set(_triton_backend.MODULES.values())):
            importlib.import_module(f"erq_kernels._triton.{_module}")

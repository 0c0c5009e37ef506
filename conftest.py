"""Loads Triton for its interpreter where there is no GPU, before anything else can load it.

Triton decides at its import whether its own functions are interpreted, and timm, which
tests/conftest.py needs, imports it. The variable is set for the import alone: with it, `auto` would
pick the interpreter over the reference in every test. tests/kernels/conftest.py sets it again.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")

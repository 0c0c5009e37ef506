"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

They run in processes of their own, since the sanitizer has to be loaded before Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
from emulation import ROOT, SANITIZERS, build, why_not

pytestmark = pytest.mark.slow

# More rows than x has.
BEYOND = """
import ctypes, torch
from erq_kernels import _cuda
x = torch.zeros(3, 32, dtype=torch.int8)
weight, scale = torch.zeros(8, 32, dtype=torch.int8), torch.ones(8)
real = _cuda.QlinearArgs
_cuda.QlinearArgs = lambda **fields: real(**(fields | {"m": 4000}))
_cuda.qlinear(x, weight, scale, None, 32, scale)
"""


def runtime(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@cache
def environment() -> dict[str, str]:
    reason = why_not() or ("no libasan.so" if "/" not in runtime("libasan.so") else None)
    if reason is not None:
        pytest.skip(f"emulated CUDA library with sanitizers: {reason}")
    preload = ":".join(runtime(f"lib{name}.so") for name in ("asan", "ubsan", "stdc++"))
    return os.environ | {
        "ERQ_CUDA_LIBRARY": str(build(*SANITIZERS)),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def test_no_kernel_touches_what_is_not_its_own() -> None:
    chosen = "not opcheck and not wide_width and not narrow_width"
    files = [f"tests/csrc/test_cuda_{op}.py" for op in ("qlinear", "dequant_linear")]
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " skipped" not in result.stdout


def test_the_sanitizer_sees_a_read_beyond_the_end() -> None:
    result = run("-c", BEYOND)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "qlinear" in result.stderr

"""Registers the Triton kernels with `dispatch` without importing Triton.

A new kernel is one row of `MODULES`. Its module has, per op, a launcher `<op>(*args)` that takes
the op's arguments, and `<op>_why_not(*args)`: the reason the kernel itself cannot run them (a
dtype, say), or None; and, for bench/static.py, `static_cases(arch)`, an iterable of
`launch.StaticCase`. It loads on the first call that could run there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from erq_kernels import dispatch

# op → module of erq_kernels._triton.
MODULES = {
    "dequant_linear": "dequant_linear",
    "layer_norm_quantize": "layer_norm_quantize",
    "pack": "pack",
    "qattention": "qattention",
    "qlinear": "qlinear",
    "qlinear_packed": "qlinear_packed",
    "quantize": "quantize",
    "repack": "pack",
    "unpack": "pack",
}

_PACKAGE = "erq_kernels._triton"
_MIN_CAPABILITY = (8, 0)


@cache
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _is_interpreter_asked_for() -> bool:
    # The spellings that Triton itself takes for true.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@cache
def _device_reason(device: torch.device) -> str | None:
    """Why compiled kernels cannot run on `device`, or None."""
    got = f"a tensor on {device.type}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = _capability(device)
        if capability >= _MIN_CAPABILITY:
            return None
        got = "{}.{}".format(*capability)
    return (
        f"needs a CUDA device of compute capability 8.0 or newer (got {got}), or TRITON_INTERPRET=1"
    )


def _attribute(op: str, suffix: str) -> Any:
    return getattr(importlib.import_module(f"{_PACKAGE}.{MODULES[op]}"), op + suffix)


def _why_not(op: str, *args: Any, **kwargs: Any) -> str | None:
    if not is_installed():
        return "triton is not installed"
    interpret = _is_interpreter_asked_for()
    if not interpret and args and isinstance(args[0], Tensor) and args[0].is_cpu:
        return _device_reason(args[0].device)  # at once: every op on a CPU asks
    devices = {a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
    if len(devices) > 1:
        return f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}"
    if not interpret:
        for device in devices:
            reason = _device_reason(device)
            if reason is not None:
                return reason
    package = importlib.import_module(_PACKAGE)
    if package.IS_MIXED or interpret != package.INTERPRETED:
        return "TRITON_INTERPRET changed after Triton was loaded; set it before the process starts"
    refusal: str | None = _attribute(op, "_why_not")(*args, **kwargs)
    return refusal


def _run(op: str, *args: Any) -> Any:
    device = next(a.device for a in args if isinstance(a, Tensor))
    run = _attribute(op, "")
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return run(*args)
    # Triton launches on the current device, whatever its arguments live on.
    with torch.cuda.device(device):
        return run(*args)


for _op in MODULES:
    dispatch.register(_op, "triton", partial(_run, _op), partial(_why_not, _op))

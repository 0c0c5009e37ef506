"""What this machine has: versions, devices, and which kernels can run on them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import erq_kernels
from erq._version import __version__

_PACKAGES = ("torch", "timm", "triton", "safetensors", "numpy")
# A layer of ViT-S on one image: what every backend is asked about.
_TOKENS, _WIDTH, _HEADS = 197, 384, 6


def hardware_name(device: torch.device) -> str:
    """Model name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions by package name; None for one that is not installed."""
    found: dict[str, str | None] = {"erq": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """Name, hardware and memory (bytes, None if unknown) of the CPU and of every GPU."""
    cpu: dict[str, Any] = {
        "device": "cpu",
        "hardware": hardware_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }
    found = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "hardware": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def forced_backend() -> str | None:
    """The backend that ERQ_BACKEND forces on this process."""
    return os.environ.get("ERQ_BACKEND") or None


def backends(device: torch.device) -> dict[str, dict[str, str]]:
    """Per op, each backend's "usable" or the reason it is not, for a layer of ViT-S at 4 bits."""
    return {name: erq_kernels.explain(name, *args) for name, args in _examples(device).items()}


def _examples(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op, in the order of `erq_kernels.ops`."""
    m, k, n, bits = _TOKENS, _WIDTH, _WIDTH, 4

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    scale, zero_point = empty(), empty(dtype=torch.int32)
    x, codes = empty(m, k), empty(m, k, dtype=torch.int8)
    heads = empty(1, _HEADS, m, k // _HEADS, dtype=torch.int8)
    weight = empty(n, k, dtype=torch.int8)
    packed = empty(n * k * bits // 8, dtype=torch.uint8)
    rows, row_zeros = empty(n), empty(n, dtype=torch.int32)
    return {
        "quantize": (x, scale, zero_point, bits),
        "layer_norm_quantize": (x, empty(k), empty(k), 1e-6, scale, zero_point, bits, None),
        "qlinear": (
            codes, weight, rows, None, k, rows, "none", None, None, torch.float32, None, None, 0,
        ),
        "qattention": (
            heads, heads, heads, zero_point, zero_point, zero_point, scale, scale, scale, bits,
            bits, True, None, None, None, 0,
        ),
        "dequant_linear": (x, packed, bits, rows, row_zeros, None, None, None, rows),
        "pack": (weight, bits),
        "unpack": (packed, bits, (n, k)),
    }  # fmt: skip

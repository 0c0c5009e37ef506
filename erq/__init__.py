"""ERQ: post-training quantization of Vision Transformers to low-bit weights and activations.

sim = erq.quantize(model, images, "w4a4")     # simulated: every tensor on its b-bit grid
net = erq.deploy(sim)                         # packed codes and kernels
erq.save(net, "vit.safetensors")
net = erq.load("vit.safetensors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from erq._version import __version__

if TYPE_CHECKING:
    # ruff: noqa: F401 (names for type checkers; at run time __getattr__ finds them)
    from erq.config import QuantConfig
    from erq.deployment.checkpoint import CheckpointError, inspect, load, save
    from erq.deployment.convert import deploy
    from erq.deployment.modules import QuantLinear
    from erq.deployment.network import summary, swap_linears
    from erq.evaluation import Evaluation, evaluate
    from erq.models import UnsupportedModelError
    from erq.pipeline import quantize
    from erq.timing import Timing, benchmark
    from erq_kernels.dispatch import BackendError

# Resolved at first use: `import erq` stays light, and a deployed process never loads calibration.
_PUBLIC = {
    "BackendError": "erq_kernels.dispatch",
    "CheckpointError": "erq.deployment.checkpoint",
    "Evaluation": "erq.evaluation",
    "QuantConfig": "erq.config",
    "QuantLinear": "erq.deployment.modules",
    "Timing": "erq.timing",
    "UnsupportedModelError": "erq.models",
    "benchmark": "erq.timing",
    "deploy": "erq.deployment.convert",
    "evaluate": "erq.evaluation",
    "inspect": "erq.deployment.checkpoint",
    "load": "erq.deployment.checkpoint",
    "quantize": "erq.pipeline",
    "save": "erq.deployment.checkpoint",
    "summary": "erq.deployment.network",
    "swap_linears": "erq.deployment.network",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'erq' has no attribute {name!r}")

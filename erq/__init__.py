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

if TYPE_CHECKING:  # `as` makes the names part of the typed surface
    from erq.config import QuantConfig as QuantConfig
    from erq.deployment.checkpoint import CheckpointError as CheckpointError
    from erq.deployment.convert import deploy as deploy
    from erq.deployment.modules import QuantLinear as QuantLinear
    from erq.deployment.network import summary as summary
    from erq.deployment.network import swap_linears as swap_linears
    from erq.evaluation import Evaluation as Evaluation
    from erq.evaluation import evaluate as evaluate
    from erq.evaluation import site_sqnr as site_sqnr
    from erq.export import export_onnx as export_onnx
    from erq.graphs import CudaGraphs as CudaGraphs
    from erq.hub import inspect as inspect
    from erq.hub import load as load
    from erq.hub import save as save
    from erq.models import UnsupportedModelError as UnsupportedModelError
    from erq.pipeline import quantize as quantize
    from erq.timing import Timing as Timing
    from erq.timing import benchmark as benchmark
    from erq_kernels.dispatch import BackendError as BackendError

# Resolved at first use: `import erq` stays light, and a deployed process never loads calibration.
_PUBLIC = {
    "BackendError": "erq_kernels.dispatch",
    "CheckpointError": "erq.deployment.checkpoint",
    "CudaGraphs": "erq.graphs",
    "Evaluation": "erq.evaluation",
    "QuantConfig": "erq.config",
    "QuantLinear": "erq.deployment.modules",
    "Timing": "erq.timing",
    "UnsupportedModelError": "erq.models",
    "benchmark": "erq.timing",
    "deploy": "erq.deployment.convert",
    "evaluate": "erq.evaluation",
    "export_onnx": "erq.export",
    "inspect": "erq.hub",
    "load": "erq.hub",
    "quantize": "erq.pipeline",
    "save": "erq.hub",
    "site_sqnr": "erq.evaluation",
    "summary": "erq.deployment.network",
    "swap_linears": "erq.deployment.network",
}

__all__ = ["__version__", *_PUBLIC]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'erq' has no attribute {name!r}")

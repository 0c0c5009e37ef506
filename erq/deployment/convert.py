"""Simulated model → deployed model: the only file of erq.deploy that knows calibration."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.config import FLOAT_BITS
from erq.deployment.blocks import fuse_blocks
from erq.deployment.modules import (
    QuantAttention,
    QuantLinear,
    QuantPatchEmbed,
    QuantScores,
    QuantValues,
)
from erq.deployment.network import InputCheck, set_backend
from erq.models import adapter_named
from erq.models.attention import Attention
from erq_kernels.dispatch import check_backend


def deploy(sim: Any, backend: str = "auto") -> nn.Module:
    """Pack a simulated model's weights and put kernels in place of its modules.

    Args:
        sim: what `erq.quantize` returned; it is not changed.
        backend: auto, reference, cpu, triton or cuda.

    Returns:
        The deployed model, called like the original one.

    Raises:
        ValueError: not a simulated model, or an unknown backend.
        BackendError: a forced backend that cannot run some layer, with the reason.
    """
    check_backend(backend)
    simulated = SimLinear | SimConv2d | SimScores | SimValues
    modules = sim.modules() if isinstance(sim, nn.Module) and hasattr(sim, "erq_info") else ()
    if not any(isinstance(m, simulated) for m in modules):
        raise ValueError(
            "deploy takes the model that erq.quantize returned, with at least one quantized site, "
            f"got a {type(sim).__name__} without any"
        )
    net: Any = deepcopy(sim)
    for name, module in list(net.named_modules()):
        if isinstance(module, Attention) and isinstance(module.qk, SimScores):
            replace_module(net, name, _attention(module))
    for name, module in list(net.named_modules()):
        if isinstance(module, SimLinear | SimConv2d):
            replace_module(net, name, _linear(module))
    adapter = adapter_named(net.erq_info.family)
    fuse_blocks(net, adapter.pre_norm_blocks(net))
    net.register_forward_pre_hook(InputCheck(adapter.input_shape(net)))
    net.erq_report = [r if isinstance(r, dict) else r.to_dict() for r in sim.erq_report]
    net.requires_grad_(False)
    set_backend(net, backend)
    net.eval()
    return net  # type: ignore[no-any-return]


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the path `name` of `root`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _linear(module: SimLinear | SimConv2d) -> nn.Module:
    assert module.w_params is not None
    if isinstance(module, SimLinear):
        return QuantLinear.from_params(
            module.weight, module.bias, module.w_params, module.x_params, module.x_channels
        )
    layer = QuantPatchEmbed(
        module.in_channels,
        len(module.weight),
        module.kernel_size,
        module.w_params.bits,
        module.bias is not None,
        FLOAT_BITS if module.x_params is None else module.x_params.bits,
    ).to(module.weight.device)
    layer.set_weight(module.weight, module.w_params, module.bias)
    layer.set_input(module.x_params)
    layer.repack()
    return layer


def _attention(module: Attention) -> nn.Module:
    qk, av = module.qk, module.av
    assert isinstance(qk, SimScores) and isinstance(av, SimValues)
    assert qk.q_params is not None and qk.k_params is not None
    assert av.p_params is not None and av.v_params is not None
    scores = QuantScores(qk.q_params.bits, qk.temperature)
    scores.set_params(qk.q_params, qk.k_params)
    values = QuantValues(av.v_params.bits, av.p_params.zero_last)
    values.set_params(av.p_params, av.v_params)
    return QuantAttention.from_attention(module, scores, values)

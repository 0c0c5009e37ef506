"""Checks that adapters share: which parts are understood; is a rebuilt model the same."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import nn

from erq.models.sites import UnsupportedModelError

ACTS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    timm.layers.GELU: "gelu",
    timm.layers.GELUTanh: "gelu_tanh",
    timm.layers.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
NORMS = (timm.layers.LayerNorm, timm.layers.LayerNormFp32, timm.layers.RmsNorm, nn.LayerNorm)


def is_head(module: nn.Module | None) -> bool:
    """Whether a classifier is there, not an Identity in its place."""
    return module is not None and not isinstance(module, nn.Identity)


def foldable(norm: nn.Module, name: str) -> str | None:
    """`name` if the norm has the affine parameters that reparameterization folds into."""
    return name if isinstance(norm, nn.LayerNorm) and norm.weight is not None else None


def check_patches(proj: nn.Module | None, name: str) -> None:
    """Raise UnsupportedModelError unless a patch embedding is a convolution on whole patches."""
    require(proj, (nn.Conv2d,), name)
    assert isinstance(proj, nn.Conv2d)
    if proj.kernel_size != proj.stride or any(proj.padding) or proj.groups != 1:
        raise UnsupportedModelError(
            f"{name}: patches must not overlap or be padded, got kernel {proj.kernel_size}, "
            f"stride {proj.stride}, padding {proj.padding}"
        )


def check_multihead(part: nn.Module | None, name: str) -> None:
    """Raise UnsupportedModelError unless `part` is plain self-attention of torch's."""
    require(part, (nn.MultiheadAttention,), name)
    assert isinstance(part, nn.MultiheadAttention)
    plain = part.in_proj_weight is not None and part.bias_k is None and not part.add_zero_attn
    if not plain or not part.batch_first:
        raise UnsupportedModelError(
            f"{name}: only batch_first attention with one in_proj_weight, without bias_k and "
            "add_zero_attn, is understood"
        )


def require(part: nn.Module | None, allowed: tuple[type[nn.Module], ...], name: str) -> None:
    """Raise UnsupportedModelError unless `part` is of exactly one of the allowed classes."""
    if type(part) not in allowed:
        raise UnsupportedModelError(
            f"{name} is a {type(part).__name__}; understood there: "
            f"{', '.join(sorted({a.__name__ for a in allowed}))}"
        )


def act_name(act: nn.Module) -> str:
    """timm's name of an activation of ACTS."""
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_tanh"
    return ACTS[type(act)]


def _behaviour(module: nn.Module) -> dict[str, Any]:
    """What a module computes beyond its parameters, as far as modules of one model may differ."""
    if type(module) in ACTS:
        return {"activation": act_name(module)}
    names = (
        "num_heads", "scale", "eps", "gate_last", "window_size", "shift_size", "input_resolution",
        "image_size",
    )  # fmt: skip
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def check_twin(model: nn.Module, twin: nn.Module) -> None:
    """Raise if the rebuilt architecture has other parameters or computes something else."""
    ours = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    built = {n: tuple(p.shape) for n, p in twin.state_dict().items()}
    for name in sorted(ours.keys() | built.keys()):
        if ours.get(name) != built.get(name):
            raise UnsupportedModelError(
                f"{name}: the model has shape {ours.get(name)}, its architecture as understood has "
                f"{built.get(name)}"
            )
    rebuilt = dict(twin.named_modules())
    for name, module in model.named_modules():
        if name in rebuilt and _behaviour(module) != _behaviour(rebuilt[name]):
            raise UnsupportedModelError(
                f"{name}: the model has {_behaviour(module)}, its architecture as understood has "
                f"{_behaviour(rebuilt[name])}; blocks that differ are not understood"
            )

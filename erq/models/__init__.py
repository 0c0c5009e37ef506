"""Where quantizers go: the adapters and the vocabulary they answer in."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain

import torch
from torch import nn

from erq.models.sites import Block, ModelAdapter, Site, UnsupportedModelError

# timm classes that are known and refused, with the reason; the message names the class.
_REFUSED = {
    "SwinTransformerV2": "cosine attention gives every head its own temperature, which one scale "
    "of the scores cannot carry",
    "Eva": "rotary position embeddings turn q and k between qkv and attention (EVA-02, DINOv3, "
    "PE); use the vit_* models",
    "Beit": "its relative position bias and its separate q and v biases are not understood",
    "NaFlexVit": "sequences of varying length are not understood",
}

__all__ = [
    "Block",
    "ModelAdapter",
    "Site",
    "UnsupportedModelError",
    "adapter_for",
    "adapter_named",
    "carry_over",
    "prepared_twin",
]


def _adapters() -> tuple[ModelAdapter, ...]:
    from erq.models.timm_swin import TimmSwin  # timm only when a model is at hand
    from erq.models.timm_vit import TimmVit
    from erq.models.torchvision_vit import TorchvisionVit

    return (TimmVit(), TimmSwin(), TorchvisionVit())


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter that understands `model`.

    Raises:
        UnsupportedModelError: none does; the message names the model's class.
    """
    for adapter in _adapters():
        if adapter.matches(model):
            return adapter
    name = type(model).__name__
    if type(model).__module__.startswith("timm.") and name in _REFUSED:
        raise UnsupportedModelError(f"cannot quantize timm's {name}: {_REFUSED[name]}")
    known = ", ".join(a.family for a in _adapters())
    raise UnsupportedModelError(
        f"cannot quantize a {type(model).__module__}.{type(model).__name__}: understood families "
        f"are {known}; any torch model can have its nn.Linear layers swapped to weight-only ones "
        "with erq.swap_linears"
    )


def carry_over(model: nn.Module) -> nn.Module:
    """`model` itself, or for a Hugging Face one timm's model that computes the same.

    Raises:
        UnsupportedModelError: a Hugging Face model that timm has no twin of.
    """
    from erq.models.transformers_vit import is_transformers, to_timm

    return to_timm(model) if is_transformers(model) else model


def prepared_twin(model: nn.Module) -> nn.Module:
    """`model` in fp32 with every site a module, in evaluation mode; fp32 tensors are shared.

    Raises:
        UnsupportedModelError: a model that is not understood.
    """
    adapter = adapter_for(model)
    plain = all(p.dtype == torch.float32 for p in model.parameters())
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())} if plain else {}
    twin = deepcopy(model, shared).float().eval()
    adapter.prepare(twin)
    return twin


def adapter_named(family: str) -> ModelAdapter:
    """The adapter of a family, as a checkpoint names it.

    Raises:
        UnsupportedModelError: an unknown family.
    """
    for adapter in _adapters():
        if adapter.family == family:
            return adapter
    raise UnsupportedModelError(f"unknown model family {family!r}")

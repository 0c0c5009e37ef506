"""Where quantizers go: the adapters and the vocabulary they answer in."""

from __future__ import annotations

from torch import nn

from erq.models.sites import Block, ModelAdapter, Site, UnsupportedModelError

__all__ = [
    "Block",
    "ModelAdapter",
    "Site",
    "UnsupportedModelError",
    "adapter_for",
    "adapter_named",
]


def _adapters() -> tuple[ModelAdapter, ...]:
    from erq.models.timm_swin import TimmSwin  # timm only when a model is at hand
    from erq.models.timm_vit import TimmVit

    return (TimmVit(), TimmSwin())


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter that understands `model`.

    Raises:
        UnsupportedModelError: none does; the message names the model's class.
    """
    for adapter in _adapters():
        if adapter.matches(model):
            return adapter
    known = ", ".join(a.family for a in _adapters())
    raise UnsupportedModelError(
        f"cannot quantize a {type(model).__module__}.{type(model).__name__}: understood families "
        f"are {known}; any torch model can have its nn.Linear layers swapped to weight-only ones "
        "with erq.swap_linears"
    )


def adapter_named(family: str) -> ModelAdapter:
    """The adapter of a family, as a checkpoint names it.

    Raises:
        UnsupportedModelError: an unknown family.
    """
    for adapter in _adapters():
        if adapter.family == family:
            return adapter
    raise UnsupportedModelError(f"unknown model family {family!r}")

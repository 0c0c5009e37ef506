"""Adapter for timm's feature extractors: `timm.create_model(..., features_only=True)`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from erq.models.sites import Block, ModelAdapter, UnsupportedModelError

_PREFIX = "model."


class TimmFeatures:
    """timm FeatureGetterNet around a model of another adapter; gives its list of feature maps."""

    family = "timm_features"
    raw_sites = False

    def __init__(self, adapters: tuple[ModelAdapter, ...]) -> None:
        """Understand what `adapters` do, behind a feature getter."""
        self._adapters = adapters

    def matches(self, model: Any) -> bool:
        """Whether `model` is a getter around a model that an adapter knows."""
        known = type(model) is FeatureGetterNet
        return known and any(a.matches(model.model) for a in self._adapters)

    def prepare(self, model: Any) -> None:
        """Prepare the model inside; see `ModelAdapter.prepare`."""
        self._inner(model).prepare(model.model)

    def blocks(self, model: Any) -> list[Block]:
        """The blocks of the model inside, under its path."""
        out = []
        for block in self._inner(model).blocks(model.model):
            sites = tuple(
                replace(s, name=_PREFIX + s.name, norm=None if s.norm is None else _PREFIX + s.norm)
                for s in block.sites
            )
            out.append(Block(_PREFIX + block.name, sites))
        return out

    def run_block(self, model: Any, index: int, x: Tensor) -> Tensor:
        """One block of the model inside; see `ModelAdapter.run_block`."""
        return self._inner(model).run_block(model.model, index, x)

    def pre_norm_blocks(self, model: Any) -> list[str]:
        """Every transformer block; see `ModelAdapter.pre_norm_blocks`."""
        return [_PREFIX + name for name in self._inner(model).pre_norm_blocks(model.model)]

    def input_shape(self, model: Any) -> tuple[int, int | None, int | None]:
        """(channels, height, width); see `ModelAdapter.input_shape`."""
        return self._inner(model).input_shape(model.model)

    def describe(self, model: Any) -> dict[str, Any]:
        """Arguments of the model inside, and what the getter takes from it.

        Raises:
            UnsupportedModelError: a part that is not understood, by its path.
        """
        inner = self._inner(model)
        if model.return_dict or model.out_map:
            raise UnsupportedModelError("features as a dictionary are not understood")
        features = {
            "family": inner.family,
            "out_indices": [int(i) for i in model.out_indices],
            "output_fmt": str(model.output_fmt.value),
            "norm": bool(model.norm),
        }
        return {**inner.describe(model.model), "features": features}

    def build(self, kwargs: dict[str, Any]) -> nn.Module:
        """A float model of `describe`'s architecture; see `ModelAdapter.build`."""
        k = dict(kwargs)
        features = dict(k.pop("features"))
        family = features.pop("family")
        inner = next(a for a in self._adapters if a.family == family)
        getter: nn.Module = FeatureGetterNet(inner.build(k), prune=False, **features)
        return getter

    def _inner(self, model: Any) -> ModelAdapter:
        for adapter in self._adapters:
            if adapter.matches(model.model):
                return adapter
        raise UnsupportedModelError(
            f"features of a {type(model.model).__name__} are not understood"
        )

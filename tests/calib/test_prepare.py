"""Simulated modules go to every quantized site, and change nothing yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU
from torch import nn

from erq.calib.prepare import insert_simulated
from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.config import QuantConfig
from erq.models.timm_vit import TimmVit

Build = Callable[..., Any]
KINDS = {"conv": SimConv2d, "linear": SimLinear, "matmul_qk": SimScores, "matmul_av": SimValues}


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"mlp_layer": SwiGLU}])
@torch.no_grad()
def test_output_stays_the_same(tiny_vit: Build, settings: dict[str, Any]) -> None:
    model = tiny_vit(**settings)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    blocks = insert_simulated(model, TimmVit(), QuantConfig())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for block in blocks:
        for site in block.sites:
            assert type(model.get_submodule(site.name)) is KINDS[site.kind]
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())


def sites_of(model: nn.Module, **settings: Any) -> dict[str, str | None]:
    blocks = insert_simulated(model, TimmVit(), QuantConfig(**settings))
    return {site.name: site.norm for block in blocks for site in block.sites}


def test_kept_sites_stay_as_they_are(tiny_vit: Build) -> None:
    model = tiny_vit()
    sites = sites_of(model, keep_float=("head", "blocks.*.mlp.fc2"))
    assert "head" not in sites
    assert "blocks.1.mlp.fc2" not in sites
    assert "blocks.1.mlp.fc1" in sites
    assert type(model.head) is nn.Linear
    assert type(model.blocks[0].mlp.fc2) is nn.Linear


@pytest.mark.parametrize(
    "settings", [{"attention": "float"}, {"overrides": {"*.attn.[qa][kv]": {"a_bits": 16}}}]
)
def test_attention_can_stay_float(tiny_vit: Build, settings: dict[str, Any]) -> None:
    sites = sites_of(tiny_vit(), **settings)
    assert not [name for name in sites if name.endswith((".qk", ".av"))]
    assert sites["blocks.0.attn.qkv"] == "blocks.0.norm1"


def test_half_an_attention_is_refused(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qk and blocks\.0\.attn\.av must both"):
        sites_of(tiny_vit(), keep_float=("blocks.0.attn.qk",))


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_float": ("blocks.0.mlp.fc1_x",)},
        {"overrides": {"blocks.0.mlp.fc1_x": {"a_bits": 8}}},
        {"overrides": {"blocks.0.mlp.fc1_g": {"a_bits": 16}}},
    ],
)
def test_a_norm_is_folded_only_if_all_its_layers_want_the_same(
    tiny_vit: Build, settings: dict[str, Any]
) -> None:
    sites = sites_of(tiny_vit(mlp_layer=SwiGLU), **settings)
    assert {sites.get(f"blocks.0.mlp.{n}") for n in ("fc1_g", "fc1_x")} == {None}
    assert {sites[f"blocks.1.mlp.{n}"] for n in ("fc1_g", "fc1_x")} == {"blocks.1.norm2"}


def test_globs_without_a_match_are_refused(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=r"'layers\.\*' matches none of the model's 14 sites"):
        sites_of(tiny_vit(), keep_float=("layers.*",))

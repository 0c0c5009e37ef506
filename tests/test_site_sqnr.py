"""Closeness of every layer to full precision: exact where nothing is quantized, ordered by bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import erq

Build = Callable[..., Any]
FLOAT = {"a_bits": 16, "attention": "float"}


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_deployed_and_simulated_sites_agree(
    kind: str, rotated: bool, tiny_vit: Build, tiny_swin: Build
) -> None:
    model = tiny_vit(embed_dim=32) if kind == "vit" else tiny_swin(img_size=(20, 28))
    x = torch.randn(8, 3, *((16, 16) if kind == "vit" else (20, 28)))
    sim = erq.quantize(model, x, erq.QuantConfig.preset("w4a4", rotate_heads=rotated))
    net: Any = erq.deploy(sim, "reference")
    before = net(x)
    sites = erq.site_sqnr(net, x, model)
    assert sites == pytest.approx(erq.site_sqnr(sim, x, model))
    skipped = ("qk", "av", "qkv") if rotated else ("qk",)  # in a basis of their own
    names = [s.name for s in net.erq_info.sites]
    assert list(sites) == [n for n in names if n.rpartition(".")[2] not in skipped]
    assert all(0 < db < 60 for db in sites.values())
    assert torch.equal(net(x), before)  # its blocks are fused again


def test_more_bits_are_closer(tiny_vit: Build) -> None:
    model, x = tiny_vit(), torch.randn(8, 3, 16, 16)
    few, many = (
        erq.site_sqnr(erq.deploy(erq.quantize(model, x, bits), "reference"), x, model)
        for bits in ("w3a4", "w8a8")
    )
    assert all(many[name] > few[name] + 10 for name in few)


def test_a_layer_before_anything_quantized_is_exact(tiny_vit: Build) -> None:
    model, x = tiny_vit(), torch.randn(8, 3, 16, 16)
    config = {
        "keep_float": ["patch_embed.*", "blocks.0.*"],
        "overrides": {"head": {"w_bits": 2, "a_bits": 2}},
    }
    net = erq.deploy(erq.quantize(model, x, config), "reference")
    sites = erq.site_sqnr(net, x, model)
    assert "blocks.0.attn.qkv" not in sites
    assert sites["head"] < sites["blocks.1.attn.proj"]


def test_the_figure_is_what_it_says(tiny_vit: Build) -> None:
    model, x = tiny_vit(), torch.randn(12, 3, 16, 16)
    sim: Any = erq.quantize(model, x, "w4a4")
    sites = erq.site_sqnr(sim, iter([(x[:5], None), x[5:]]), model)
    with torch.no_grad():
        want, got = model(x), sim(x)
    expected = 10 * math.log10(float(want.square().sum() / (want - got).square().sum()))
    assert sites["head"] == pytest.approx(expected, abs=1e-3)


def test_other_networks_are_refused(tiny_vit: Build) -> None:
    model, x = tiny_vit(), torch.randn(4, 3, 16, 16)
    sim = erq.quantize(model, x, "w4a4")
    for net, reference in ((model, model), (sim, sim)):
        with pytest.raises(ValueError, match="site_sqnr compares a network"):
            erq.site_sqnr(net, x, reference)
    with pytest.raises(ValueError, match="another network"):
        erq.site_sqnr(sim, x, tiny_vit(depth=1))
    with pytest.raises(ValueError, match="another network"):
        erq.site_sqnr(sim, x, tiny_vit(mlp_ratio=3.0))
    with pytest.raises(ValueError, match="another network: images are 16×16, the model takes 24"):
        erq.site_sqnr(sim, x, tiny_vit(img_size=24))
    with pytest.raises(ValueError, match="no images"):
        erq.site_sqnr(sim, [], model)

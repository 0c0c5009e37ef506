"""Another basis for heads: the same network in full precision, a better one in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import erq
from erq.calib.calibrate import gather
from erq.calib.heads import (
    HeadStatistics,
    rotate_heads,
    rotates_scores,
    rotates_values,
    spreading_rotation,
)
from erq.calib.observers import Stream, observe
from erq.calib.prepare import insert_simulated
from erq.config import QuantConfig
from erq.models import adapter_for

Build = Callable[..., Any]


class Case:
    """The first attention of a prepared model, and tokens that enter its block."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        adapter = adapter_for(model)
        self.blocks = insert_simulated(model, adapter, QuantConfig(**settings))
        index = next(i for i, b in enumerate(self.blocks) if b.sites[0].name.endswith("attn.qkv"))
        self.run = partial(adapter.run_block, model, index)
        name = self.blocks[index].sites[0].name.rpartition(".")[0]
        self.attention: Any = model.get_submodule(name)
        x = torch.randn(4, *adapter.input_shape(model))  # type: ignore[arg-type]
        with torch.no_grad():
            for i in range(index):
                x = adapter.run_block(model, i, x)
        self.x = x

    def statistics(self) -> HeadStatistics:
        attention = self.attention
        q, k, v = gather(Stream([self.x]), self.run, attention.qk, attention.av, wanted=(0, 1, 3))
        bits = 4 if rotates_scores(attention) else None
        return HeadStatistics.of(q, k, v, bits, "softmax", attention.qk.temperature)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 24, 32, 48, 64, 80])
def test_rotation_is_orthogonal_and_spreads(n: int) -> None:
    rotation = spreading_rotation(n, torch.device("cpu"))
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(n).double())
    assert float(rotation.abs().max()) <= 1.5 / n**0.5  # no channel stays where it was
    if n & (n - 1) == 0:
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, n**-0.5))


@pytest.mark.parametrize("kind", ["vit", "vit without bias", "swin"])
def test_output_stays_and_operands_are_centred(
    kind: str, tiny_vit: Build, tiny_swin: Build
) -> None:
    if kind == "swin":
        it = Case(tiny_swin())
    else:
        it = Case(tiny_vit(qkv_bias=kind == "vit"))
    before = it.run(it.x)
    proj_before = observe(it.run, (it.attention.proj,), it.x)[0][0]
    basis = rotate_heads(it.attention, replace(it.statistics(), turns_scores=True))
    assert basis is not None
    torch.testing.assert_close(it.run(it.x), before, rtol=1e-4, atol=1e-5)
    proj_after = observe(it.run, (it.attention.proj,), it.x)[0][0]
    torch.testing.assert_close(proj_after, basis.apply(proj_before), rtol=1e-3, atol=1e-4)
    after = it.statistics()
    for centred in (after.k_mean, after.v_mean):
        assert float(centred.abs().max()) < 1e-4
    torch.testing.assert_close(after.v_size, torch.ones_like(after.v_size))


def test_scores_turn_only_where_the_softmax_gains() -> None:
    v = torch.randn(2, 2, 64, 16)
    # One channel far larger than the others in all tokens: a rotation evens them out.
    q, uneven = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    q[..., 0] *= 0.4
    uneven[..., 0] *= 20
    # A key that decides, alike in all channels: the rotation would gather it in one.
    single_q, single_k = torch.randn(2, 2, 64, 16) + 1, torch.randn(2, 2, 64, 16) * 0.3
    single_k[:, :, 5] = 2.5

    def turns(q: Tensor, k: Tensor, bits: int | None = 4) -> bool:
        return HeadStatistics.of(q, k, v, bits, "softmax", 0.25).turns_scores

    assert turns(q, uneven)
    found = {turns(single_q, single_k), turns(q, uneven, None)}
    assert found == {False}


def test_values_without_any_size_are_left_finite(tiny_vit: Build) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
        model.blocks[0].attn.qkv.bias.zero_()
    it = Case(model)
    before = it.run(it.x)
    rotate_heads(it.attention, it.statistics())
    torch.testing.assert_close(it.run(it.x), before)


def test_only_what_can_and_gains(tiny_vit: Build) -> None:
    def can(model: nn.Module, **settings: Any) -> tuple[bool, bool]:
        attention = Case(model, **settings).attention
        return rotates_scores(attention), rotates_values(attention)

    assert can(tiny_vit()) == (True, True)
    assert can(tiny_vit(qk_norm=True)) == (False, True)
    assert can(tiny_vit(scale_attn_norm=True, norm_layer=nn.LayerNorm)) == (True, False)
    assert can(tiny_vit(), attention="float") == (False, True)
    assert can(tiny_vit(), keep_float=("blocks.0.attn.proj",)) == (True, False)


def outliers(model: Any) -> Any:
    """A few channels of k are far from 0, some of q and v large: as in trained networks."""
    with torch.no_grad():
        for block in model.blocks:
            width = block.attn.qkv.in_features
            block.attn.qkv.bias[width + 2] += 30
            block.attn.qkv.bias[2 * width + 5] += 8
            block.attn.qkv.weight[3] *= 6
    return model


@pytest.mark.parametrize("upstream", ["quantized", "float"])
def test_outliers_cost_less(upstream: str, tiny_vit: Build) -> None:
    model = outliers(tiny_vit())
    images = torch.randn(32, *adapter_for(model).input_shape(model))  # type: ignore[arg-type]
    full = model(images).detach()

    def error(**settings: Any) -> float:
        sim = erq.quantize(model, images, QuantConfig(w_bits=8, upstream=upstream, **settings))
        return float((sim(images) - full).square().mean())

    assert error(a_bits=8) < 1e-2 * float(full.square().mean())
    assert error(a_bits=4) < 0.7 * error(a_bits=4, rotate_heads=False)


def test_deployed_network_gives_the_simulated_one_s_codes(tiny_vit: Build) -> None:
    model = outliers(tiny_vit())
    images = torch.randn(8, *adapter_for(model).input_shape(model))  # type: ignore[arg-type]
    sim = erq.quantize(model, images, "w3a4")
    with torch.no_grad():
        assert torch.equal(erq.deploy(sim, backend="reference")(images), sim(images))


def test_swin_end_to_end(tiny_swin: Build) -> None:
    model: SwinTransformer = tiny_swin()
    images = torch.randn(16, *adapter_for(model).input_shape(model))  # type: ignore[arg-type]
    full: Tensor = model(images).detach()
    sim = erq.quantize(model, images, "w8a8")
    assert float((sim(images) - full).norm() / full.norm()) < 0.1

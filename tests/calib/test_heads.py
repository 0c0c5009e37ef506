"""Another basis for heads: the same network in full precision, a better one in few bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import erq
from erq.calib.calibrate import gather
from erq.calib.heads import (
    Basis,
    HeadBases,
    choose_bases,
    choose_scores,
    choose_values,
    rotate_heads,
    rotates_scores,
    rotates_values,
    spreading_rotation,
)
from erq.calib.observers import Stream, observe
from erq.calib.prepare import insert_simulated
from erq.config import QuantConfig
from erq.models import adapter_for
from erq.quant.fit import ACTIVATION_PERCENTILES, fit_scores

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

    def operands(self) -> tuple[Tensor, ...]:
        """q, k, softmax and v."""
        return gather(Stream([self.x]), self.run, self.attention.qk, self.attention.av)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 24, 32, 48, 64, 80])
def test_rotation_is_orthogonal_and_spreads(n: int) -> None:
    rotation = spreading_rotation(n, torch.device("cpu"))
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(n).double())
    assert float(rotation.abs().max()) <= 1.5 / n**0.5  # no channel stays where it was
    if n & (n - 1) == 0:
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, n**-0.5))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("kind", ["vit", "vit without bias", "swin"])
def test_output_stays_and_operands_are_moved(
    kind: str, rotated: bool, tiny_vit: Build, tiny_swin: Build
) -> None:
    if kind == "swin":
        it = Case(tiny_swin())
    else:
        it = Case(tiny_vit(qkv_bias=kind == "vit"))
    before = it.run(it.x)
    q, k, p, v = it.operands()
    proj_before = observe(it.run, (it.attention.proj,), it.x)[0][0]
    scores, values = (Basis(x.mean(dim=(0, 2)), rotated) for x in (k, v))
    rotate_heads(it.attention, HeadBases(scores, values))
    torch.testing.assert_close(it.run(it.x), before, rtol=1e-4, atol=1e-5)
    proj_after = observe(it.run, (it.attention.proj,), it.x)[0][0]
    torch.testing.assert_close(proj_after, values.apply(proj_before), rtol=1e-3, atol=1e-4)
    expected = scores.turn(q), scores.of_heads(k), p, values.of_heads(v)
    for after, wanted in zip(it.operands(), expected, strict=True):
        torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-4)
    for moved in it.operands()[1::2]:
        assert float(moved.mean(dim=(0, 2)).abs().max()) < 1e-4


def test_nothing_moves_where_no_basis_is_chosen(tiny_vit: Build) -> None:
    it = Case(tiny_vit())
    before = it.attention.qkv.weight.clone(), it.attention.proj.weight.clone()
    rotate_heads(it.attention, HeadBases(None, None))
    assert torch.equal(it.attention.qkv.weight, before[0])
    assert torch.equal(it.attention.proj.weight, before[1])


PERCENTILES = ACTIVATION_PERCENTILES["attention"]


def kind_of(basis: Basis) -> tuple[bool, bool]:
    """Whether it centres, and whether it rotates."""
    return bool(basis.mean.any()), basis.rotated


def test_scores_move_where_the_softmax_gains() -> None:
    q, k = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    weak_q = q.clone()
    weak_q[..., 0] *= 0.4
    # One channel far larger than the others in all tokens: a rotation evens them out.
    uneven = k.clone()
    uneven[..., 0] *= 20
    # All tokens far from 0 in some channels: all of the range is a constant.
    far = k.clone()
    far[..., :4] += 30
    # Keys that are 0 but for one, alike in all channels: what a mean would move, and a rotation
    # would gather in one channel.
    single_q, single_k = torch.randn(2, 2, 64, 16) + 1, torch.zeros(2, 2, 64, 16)
    single_k[:, :, 5] = 2.5

    def chosen(q: Tensor, k: Tensor) -> tuple[bool, bool]:
        return kind_of(choose_scores(q, k, 4, PERCENTILES, 0.25))

    assert chosen(weak_q, uneven)[1]
    assert chosen(q, far)[0]
    assert chosen(single_q, single_k) == (False, False)


@pytest.mark.parametrize(("bits", "out_bits"), [(4, 4), (4, 16), (16, 4)])
def test_values_move_where_proj_gains(bits: int, out_bits: int) -> None:
    p = (3 * torch.randn(4, 2, 64, 64)).softmax(-1)
    v, weight = torch.randn(4, 2, 64, 16), torch.randn(32, 32)

    def chosen(v: Tensor) -> tuple[bool, bool]:
        return kind_of(choose_values(p, v, weight, bits, out_bits, PERCENTILES))

    uneven, far = v.clone(), v.clone()
    uneven[..., 0] *= 30
    far[..., :4] += 30
    assert chosen(uneven)[1]
    assert chosen(far)[0]


@pytest.mark.parametrize("attention", ["quantized", "float"])
def test_only_quantizers_that_are_there_decide(attention: str, tiny_vit: Build) -> None:
    it = Case(tiny_vit(), attention=attention)
    _, heads, tokens, width = it.operands()[3].shape
    # A large channel in every token: v's quantizer wants it spread; in the sum it cancels.
    v = torch.randn(4, heads, tokens, width)
    v[..., 0] = 30.0 * (-1) ** torch.arange(tokens)
    v[:, :, 0, 0] = 0 if tokens % 2 else 30.0
    p = torch.full((4, heads, tokens, tokens), 1 / tokens)
    bits = {"qk": 4, "av": 4, "proj": 4}
    chosen = choose_bases(it.attention, (v, v, p, v), bits, PERCENTILES)
    v_bits = {"quantized": 4, "float": 16}
    expected = {
        name: choose_values(p, v, it.attention.proj.weight, n, 4, PERCENTILES)
        for name, n in v_bits.items()
    }
    assert kind_of(expected["quantized"]) != kind_of(expected["float"])
    assert chosen.values is not None
    assert kind_of(chosen.values) == kind_of(expected[attention])
    assert (chosen.scores is None) == (attention == "float")


def test_values_that_are_zero_stay_zero() -> None:
    # Two values for all channels, one of them 0: exact as they are, and in between once moved.
    v = torch.zeros(4, 2, 64, 16)
    v[:, :, ::4] = 1.0
    p = torch.eye(64).expand(4, 2, 64, 64)
    basis = choose_values(p, v, torch.randn(32, 32), 4, 4, PERCENTILES)
    assert kind_of(basis) == (False, False)


def test_the_best_of_four_is_taken() -> None:
    q, k = torch.randn(2, 2, 64, 16) * 2, torch.randn(2, 2, 64, 16) ** 3 + 1
    mean = k.mean(dim=(0, 2))
    losses = {
        (centred, rotated): fit_scores(
            basis.turn(q), basis.of_heads(k), 4, PERCENTILES, 0.25, rounds=1
        )[2]
        for centred, rotated in product((False, True), repeat=2)
        for basis in [Basis(mean * centred, rotated)]
    }
    best = min(losses, key=lambda kind: losses[kind])
    assert kind_of(choose_scores(q, k, 4, PERCENTILES, 0.25)) == best


def test_values_without_any_size_are_left_finite(tiny_vit: Build) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
        model.blocks[0].attn.qkv.bias.zero_()
    images = torch.randn(8, *adapter_for(model).input_shape(model))  # type: ignore[arg-type]
    assert bool(erq.quantize(model, images, "w4a4")(images).isfinite().all())


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

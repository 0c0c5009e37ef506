"""One site at a time: which quantizers it gets, from what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erq.calib.calibrate import RANGE_IMAGES, calibrate_site
from erq.calib.observers import Run, Stream
from erq.calib.prepare import insert_simulated
from erq.config import QuantConfig
from erq.models import Block, Site
from erq.models.timm_vit import TimmVit
from erq.pipeline import quantize
from erq.quant.fit import (
    ACTIVATION_PERCENTILES,
    NORM_PERCENTILES,
    fit_channels,
    fit_scores,
    fit_softmax,
    fit_tensor,
    fit_values,
)

Build = Callable[..., Any]


class Case:
    """A prepared tiny ViT and tokens that enter any block of it."""

    def __init__(self, model: nn.Module, config: QuantConfig) -> None:
        self.model, self.config = model, config
        self.blocks = insert_simulated(model, TimmVit(), config)
        self.tokens = torch.randn(6, 17, 24)

    def find(self, leaf: str) -> tuple[Block, Site, Run]:
        """The first site whose name ends like this, its block and how to run that."""
        for index, block in enumerate(self.blocks):
            for site in block.sites:
                if site.name.endswith(leaf):
                    return block, site, partial(TimmVit().run_block, self.model, index)
        raise LookupError(leaf)

    def calibrate(self, leaf: str) -> tuple[Any, Any]:
        """Calibrate a site; the module and the fold."""
        block, site, run = self.find(leaf)
        module = self.model.get_submodule(site.name)
        group: list[Any] = [
            self.model.get_submodule(s.name)
            for s in block.sites
            if s == site or (site.norm and s.norm == site.norm)
        ]
        stream = Stream(list(self.tokens.split(4)))
        fold = calibrate_site(site, self.model, run, stream, group, self.config)
        return module, fold

    @torch.no_grad()
    def inputs(self, leaf: str) -> tuple[Tensor, ...]:
        """What enters a site, all images at once."""
        _, site, run = self.find(leaf)
        module = self.model.get_submodule(site.name)
        seen: list[tuple[Tensor, ...]] = []
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
        run(self.tokens)
        handle.remove()
        return seen[0]


@pytest.fixture
def case(tiny_vit: Build) -> Callable[..., Case]:
    return lambda **settings: Case(tiny_vit(), QuantConfig(**settings))


def same(params: Any, expected: Any) -> bool:
    names = [n for n in ("scale", "zero_point") if hasattr(params, n)]
    return all(torch.equal(getattr(params, n), getattr(expected, n)) for n in names)


def test_plain_site_gets_a_quantizer_of_its_input(case: Callable[..., Case]) -> None:
    it = case(a_bits=3)
    (x,) = it.inputs("attn.proj")
    module, fold = it.calibrate("attn.proj")
    assert fold is None
    assert module.x_params.bits == 3
    assert same(module.x_params, fit_tensor(x, 3))


def test_percentiles_are_the_published_ones_or_reach_further(case: Callable[..., Case]) -> None:
    it = case(a_bits=3, ranges="official")
    (x,) = it.inputs("attn.proj")
    official, _ = it.calibrate("attn.proj")
    assert same(official.x_params, fit_tensor(x, 3, (0.999, 0.9999, 0.99999)))
    assert float(fit_tensor(x, 3).scale) < float(official.x_params.scale)


def test_matmuls_get_one_for_each_operand(case: Callable[..., Case]) -> None:
    it = case(ranges="fine")
    q, k = it.inputs("attn.qk")
    p, v = it.inputs("attn.av")
    scores, _ = it.calibrate("attn.qk")
    assert same(scores.q_params, fit_tensor(q, 4))
    assert same(scores.k_params, fit_tensor(k, 4))
    # The values are calibrated behind the quantized scores.
    p_quantized, _ = it.inputs("attn.av")
    assert not torch.equal(p, p_quantized)
    values, _ = it.calibrate("attn.av")
    assert same(values.p_params, fit_softmax(p_quantized, 4))
    assert same(values.v_params, fit_tensor(v, 4))


def test_site_behind_a_norm_is_folded(case: Callable[..., Case]) -> None:
    it = case(ranges="fine")
    (x,) = it.inputs("attn.qkv")
    norm = it.model.blocks[0].norm1
    before = norm.weight.clone()
    module, fold = it.calibrate("attn.qkv")
    assert torch.equal(fold.ratio, fit_channels(x, 4).scale / fit_channels(x, 4).scale.mean())
    assert module.x_params is fold.params
    torch.testing.assert_close(norm.weight, before / fold.ratio)


@pytest.mark.parametrize("settings", [{"reparameterize": False}, {"method": "rtn"}])
def test_without_folding_it_gets_a_plain_one(
    case: Callable[..., Case], settings: dict[str, Any]
) -> None:
    it = case(**settings)
    (x,) = it.inputs("attn.qkv")
    module, fold = it.calibrate("attn.qkv")
    assert fold is None
    assert same(module.x_params, fit_tensor(x, 4))


def test_float_activations_get_none(case: Callable[..., Case]) -> None:
    it = case(a_bits=16)
    module, fold = it.calibrate("attn.qkv")
    assert (module.x_params, fold) == (None, None)


def test_ranges_come_from_the_first_images(case: Callable[..., Case]) -> None:
    it = case()
    it.tokens = torch.randn(RANGE_IMAGES + 8, 17, 24)
    few, _ = it.calibrate("attn.proj")
    before = few.x_params
    it.tokens[RANGE_IMAGES:] *= 100
    few.x_params = None
    again, _ = it.calibrate("attn.proj")
    assert same(again.x_params, before)


def test_ranges_of_attention_are_fitted_to_what_it_gives(tiny_vit: Callable[..., Any]) -> None:
    model, x = tiny_vit(), torch.randn(4, 3, 16, 16)
    sim: Any = quantize(model, x, {"a_bits": 4, "w_bits": 8, "ranges": "attention"})
    seen: dict[nn.Module, Any] = {}

    def operands(leaf: str) -> tuple[Any, Any]:
        site = sim.get_submodule(f"blocks.0.attn.{leaf}")
        handle = site.register_forward_pre_hook(lambda _, args: seen.update({site: args}))
        sim(x)
        handle.remove()
        return site, seen[site]

    percentiles = ACTIVATION_PERCENTILES["attention"]
    scores, (q, k) = operands("qk")
    fitted = fit_scores(q, k, 4, percentiles, scores.temperature)
    assert same(fitted[0], scores.q_params) and same(fitted[1], scores.k_params)
    values, (p, v) = operands("av")
    assert torch.equal(fit_values(p, v, 4, percentiles)[0].scale, values.p_params.scale)
    assert same(fit_values(p, v, 4, percentiles)[1], values.v_params)


@pytest.mark.parametrize("ranges", ["attention", "fine", "official"])
def test_percentiles_behind_a_norm(ranges: Any, case: Callable[..., Case]) -> None:
    it = case(ranges=ranges)
    (x,) = it.inputs("mlp.fc1")
    _, fold = it.calibrate("mlp.fc1")
    want = fit_channels(x, 4, NORM_PERCENTILES[ranges])
    torch.testing.assert_close(fold.channels.scale, want.scale)
    fine = fit_channels(x, 4, NORM_PERCENTILES["fine"])
    assert torch.equal(want.scale, fine.scale) == (ranges == "fine")


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_what_enters_fc2_has_ranges_of_its_channels_below_8_bits(
    bits: int, case: Callable[..., Case]
) -> None:
    it = case(a_bits=bits)
    (x,) = it.inputs("mlp.fc2")
    module, fold = it.calibrate("mlp.fc2")
    if bits == 8:
        assert (module.x_channels, fold) == (None, None)
        assert same(module.x_params, fit_tensor(x, bits))
    else:
        torch.testing.assert_close(module.x_channels.scale, fit_channels(x, bits).scale)

"""Folding: the same network in full precision, per-channel codes from a per-tensor quantizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erq.calib.calibrate import calibrate_site
from erq.calib.observers import Stream
from erq.calib.prepare import insert_simulated
from erq.calib.reparam import Fold, apply_fold, fold_input, plan_fold
from erq.calib.simulate import SimLinear
from erq.config import QuantConfig
from erq.models import adapter_for
from erq.quant import AffineParams, fake_quantize, quantize
from erq.quant.fit import fit_channels, fit_tensor


def post_norm(rows: int = 400, channels: int = 24) -> tuple[nn.LayerNorm, Tensor]:
    """A norm with very different gains, a dead and a constant channel, and inputs for it."""
    norm = nn.LayerNorm(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels).exp())
        norm.bias.normal_()
        norm.weight[3], norm.bias[3] = 0.0, 0.0
        norm.weight[7], norm.bias[7] = 0.0, 2.5
    return norm, torch.randn(rows, channels)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_equal_the_per_channel_ones(bits: int) -> None:
    norm, x = post_norm()
    y = norm(x).detach()
    channels = fit_channels(y, bits)
    fold = plan_fold(channels)
    assert fold.params.scale.dim() == 0
    assert fold.params.zero_point.dtype == torch.int32
    per_channel = quantize(y.t().contiguous(), channels).t()
    folded = quantize(fold.apply(y), fold.params)
    different = per_channel != folded
    assert int((per_channel - folded).abs().max()) <= 1
    assert float(different.float().mean()) < 1e-4  # a value on a rounding edge may fall either way


@pytest.mark.parametrize("bits", [3, 4])
def test_values_equal_the_per_channel_ones(bits: int) -> None:
    norm, x = post_norm()
    y = norm(x).detach()
    channels = fit_channels(y, bits)
    fold = plan_fold(channels)
    back = (fake_quantize(fold.apply(y), fold.params) + fold.shift) * fold.ratio
    expected = fake_quantize(y.t().contiguous(), channels).t()
    off = (back - expected).abs() > 1e-4 * (1 + expected.abs())
    assert float(off.float().mean()) < 1e-4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_input_s_fold_keeps_the_layer_and_quantizes_channel_by_channel(bits: int) -> None:
    torch.manual_seed(0)
    x = nn.functional.gelu(torch.randn(400, 24) * torch.rand(24).mul(4) + torch.randn(24))
    linear = nn.Linear(24, 5)
    layer = SimLinear(linear.weight, linear.bias)
    channels = fit_channels(x, bits)
    fold = plan_fold(channels)
    torch.testing.assert_close(fold.channels.scale, channels.scale)
    assert torch.equal(fold.channels.zero_point, channels.zero_point)
    fold_input(fold, layer)
    assert layer.x_params is fold.params and layer.x_channels is not None
    # The same function of the folded input in full precision …
    folded = nn.functional.linear(fold.apply(x), layer.weight, layer.bias)
    torch.testing.assert_close(folded, linear(x), rtol=1e-4, atol=1e-4)
    # … and on codes that of the input quantized channel by channel.
    fake = fake_quantize(x.t().contiguous(), channels).t()
    torch.testing.assert_close(layer(x), linear(fake), rtol=1e-3, atol=1e-3)
    tensor = fake_quantize(x, fit_tensor(x, bits))
    assert (fake - x).square().mean() < (tensor - x).square().mean()


def test_dead_channels_give_a_finite_fold() -> None:
    norm, x = post_norm()
    fold = plan_fold(fit_channels(norm(x).detach(), 4))
    assert bool(torch.isfinite(fold.ratio).all())
    assert bool((fold.ratio > 0).all())
    assert bool(torch.isfinite(fold.shift).all())
    everything_dead = plan_fold(fit_channels(torch.zeros(10, 5), 4))
    assert torch.equal(everything_dead.ratio, torch.ones(5))


def test_fold_by_hand() -> None:
    channels = AffineParams(
        torch.tensor([1.0, 3.0]), torch.tensor([4, 9], dtype=torch.int32), bits=4
    )
    fold = plan_fold(channels)
    assert fold.ratio.tolist() == [0.5, 1.5]
    assert (float(fold.params.scale), int(fold.params.zero_point)) == (2.0, 6)  # 6.5 to even
    assert fold.shift.tolist() == [4.0, -6.0]
    assert fold.apply(torch.tensor([[1.0, 3.0]])).tolist() == [[-2.0, 8.0]]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("norm_has_bias", [True, False])
@torch.no_grad()
def test_folding_leaves_the_outputs_unchanged(has_bias: bool, norm_has_bias: bool) -> None:
    norm, x = post_norm()
    if not norm_has_bias:
        norm.bias = None
    # Two layers behind one norm, as SwiGLU has them.
    linears = [
        SimLinear(torch.randn(n, 24) * 0.2, torch.randn(n) if has_bias else None) for n in (6, 9)
    ]
    before = [linear(norm(x)) for linear in linears]
    fold = plan_fold(fit_channels(norm(x), 4))
    folded_input = fold.apply(norm(x))
    apply_fold(fold, norm, linears)
    torch.testing.assert_close(norm(x), folded_input, rtol=1e-4, atol=1e-4)
    for linear, y in zip(linears, before, strict=True):
        assert linear.x_params is fold.params
        assert linear.bias is not None
        assert not linear.weight.requires_grad
        linear.x_params = None
        torch.testing.assert_close(linear(norm(x)), y, rtol=1e-4, atol=1e-4)


def test_fold_of_one_channel_is_nothing(affine: Callable[..., AffineParams]) -> None:
    fold: Fold = plan_fold(affine([0.3], [5]))
    x = torch.randn(4, 1)
    assert torch.equal(fold.apply(x), x)
    assert torch.equal(quantize(x, fold.params), quantize(x, affine(0.3, 5)))


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_padding_of_windows_follows_the_fold(
    bits: int, tiny_swin: Callable[..., nn.Module]
) -> None:
    """Folding every norm of a Swin with padded windows leaves its full-precision output alone."""
    model: Any = tiny_swin(img_size=(20, 28))
    x = torch.randn(4, 3, 20, 28)
    expected = model(x)
    adapter = adapter_for(model)
    config = QuantConfig(a_bits=bits, attention="float")
    blocks = insert_simulated(model, adapter, config)
    zero = model.layers[0].blocks[0].attn.windows.pad
    assert torch.equal(zero, torch.zeros_like(zero))
    stream = Stream([x])
    for index, block in enumerate(blocks):
        run = partial(adapter.run_block, model, index)
        for site in block.sites:
            if site.norm is not None:
                module = model.get_submodule(site.name)
                fold = calibrate_site(site, model, run, stream, [module], config)
                assert fold is not None
                if site.name.endswith("qkv"):
                    # The code of what stands at padding is the channel's zero point.
                    pad = model.get_submodule(site.name[:-4]).windows.pad
                    offset = fold.params.zero_point - fold.shift / fold.params.scale
                    top = 2**bits - 1
                    codes = quantize(pad, fold.params)
                    assert torch.equal(codes, offset.round().clamp(0, top).to(codes.dtype))
                    assert len(codes.unique()) > 1
                module.x_params = None  # folded, but in full precision
        if index < len(blocks) - 1:
            stream.advance(run)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    # Zeros in their place, as timm pads, would not do.
    for layer in model.layers:
        for block in layer.blocks:
            block.attn.windows.pad.zero_()
    assert float((model(x) - expected).abs().max()) > 1e-2

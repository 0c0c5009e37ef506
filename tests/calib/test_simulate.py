"""Simulated modules: float until they have params, on integer codes once frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues, outlier_split
from erq.models.attention import ScaledScores, WeightedValues
from erq.quant import AffineParams, LogParams, fake_quantize
from erq.quant.fit import fit_dual_weight, fit_weight

Affine = Callable[..., AffineParams]


def test_linear_without_params_is_linear() -> None:
    source = nn.Linear(7, 5)
    sim = SimLinear(source.weight, source.bias)
    x = torch.randn(2, 3, 7)
    assert torch.equal(sim(x), source(x))
    assert not any(p.requires_grad for p in sim.parameters())
    sim.weight.zero_()
    assert source.weight.abs().sum() > 0  # a copy, not the source's own


def test_linear_with_a_quantized_input(affine: Affine) -> None:
    sim = SimLinear(torch.randn(5, 7), None)
    sim.x_params = affine(0.2, 8)
    x = torch.randn(4, 7)
    assert torch.equal(sim(x), F.linear(fake_quantize(x, sim.x_params), sim.weight))


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("x_bits", [3, 4, 8, None])
@pytest.mark.parametrize("has_bias", [True, False])
def test_frozen_linear_computes_the_fake_quantized_layer(
    affine: Affine, dual: bool, x_bits: int | None, has_bias: bool
) -> None:
    sim = SimLinear(torch.randn(40, 50), torch.randn(40) if has_bias else None)
    sim.w_params = fit_dual_weight(sim.weight, 4) if dual else fit_weight(sim.weight, 4)
    with pytest.raises(ValueError, match="not on the grid"):
        sim.freeze()
    assert sim.operands is None
    sim.set_weight(fake_quantize(sim.weight, sim.w_params), sim.bias)
    if x_bits is not None:
        sim.x_params = affine(6.0 / 2**x_bits, 2 ** (x_bits - 1) - 1, x_bits)
    x = torch.randn(2, 9, 50)
    simulated = sim(x)
    sim.freeze()
    assert (sim.operands is None) == (x_bits is None)
    torch.testing.assert_close(sim(x), simulated, rtol=1e-5, atol=2e-5)
    assert sim(x[:0]).shape == (0, 9, 40)


def test_a_weight_off_the_grid_by_one_ulp_is_refused() -> None:
    sim = SimLinear(torch.randn(4, 6), None)
    sim.w_params = fit_weight(sim.weight, 4)
    weight = fake_quantize(sim.weight, sim.w_params)
    weight[1, 2] = torch.nextafter(weight[1, 2] + 1e-3, torch.tensor(9.0))
    sim.set_weight(weight, None)
    with pytest.raises(ValueError, match="not on the grid"):
        sim.freeze()


def test_set_weight_lets_a_bias_come_into_being() -> None:
    sim = SimLinear(torch.zeros(3, 2), None)
    sim.set_weight(torch.ones(3, 2).double(), None)
    assert sim.bias is None
    assert sim.weight.dtype == torch.float32
    sim.set_weight(torch.ones(3, 2), torch.ones(3).double())
    assert sim.bias is not None
    assert sim(torch.ones(1, 2)).tolist() == [[3.0, 3.0, 3.0]]
    assert [n for n, _ in sim.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("shape", [(8, 8), (9, 11)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_conv_is_the_patch_embedding(shape: tuple[int, int], has_bias: bool) -> None:
    conv = nn.Conv2d(3, 10, (2, 4), stride=(2, 4), bias=has_bias)
    sim = SimConv2d(conv)
    x = torch.randn(2, 3, *shape)
    torch.testing.assert_close(sim(x), conv(x), rtol=1e-5, atol=1e-6)
    sim.w_params = fit_weight(sim.weight, 4)
    with pytest.raises(ValueError, match="not on the grid"):
        sim.freeze()
    sim.set_weight(fake_quantize(sim.weight, sim.w_params), sim.bias)
    sim.freeze()
    weight = sim.weight.reshape(conv.weight.shape)
    expected = F.conv2d(x, weight, sim.bias, stride=(2, 4))
    torch.testing.assert_close(sim(x), expected, rtol=1e-5, atol=1e-6)


def test_matmuls_without_params_are_the_float_ones() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    source = ScaledScores(0.3)
    assert torch.equal(SimScores(source)(q, k), source(q, k))
    p = torch.softmax(source(q, k), dim=-1)
    assert torch.equal(SimValues()(p, v), WeightedValues()(p, v))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_matmuls_with_params_are_the_fake_quantized_ones(affine: Affine, bits: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    scores, values = SimScores(ScaledScores(0.3)), SimValues()
    step, middle = 5.0 / 2**bits, 2 ** (bits - 1)
    scores.q_params, scores.k_params = (
        affine(step, middle, bits),
        affine(step / 2, middle - 1, bits),
    )
    expected = fake_quantize(q, scores.q_params) @ fake_quantize(k, scores.k_params).mT * 0.3
    torch.testing.assert_close(scores(q, k), expected, rtol=1e-5, atol=1e-5)
    p = torch.softmax(expected, dim=-1)
    values.p_params, values.v_params = LogParams(torch.tensor(0.8), bits), affine(step, 1, bits)
    expected = fake_quantize(p, values.p_params) @ fake_quantize(v, values.v_params)
    torch.testing.assert_close(values(p, v), expected, rtol=1e-5, atol=1e-5)


def test_quantizers_follow_the_module_and_keep_their_dtypes(affine: Affine) -> None:
    sim = SimLinear(torch.randn(40, 50), torch.randn(40))
    sim.w_params = fit_dual_weight(sim.weight, 4)
    sim.set_weight(fake_quantize(sim.weight, sim.w_params), sim.bias)
    sim.x_params = affine(0.3, 8)
    sim.freeze()
    x = torch.randn(3, 50)
    y = sim(x)
    twin = copy.deepcopy(sim).half()
    assert twin.weight.dtype == torch.float16
    plain, outlier, columns = outlier_split(twin.w_params)
    assert outlier is not None
    assert columns is not None
    assert {t.dtype for t in (plain.scale, outlier.scale, twin.x_params.scale)} == {torch.float32}
    assert (plain.zero_point.dtype, columns.dtype) == (torch.int32, torch.int64)
    assert twin.operands.weight.dtype == torch.int8
    assert torch.equal(twin(x), y)  # integer arithmetic, whatever the dtype of the float copy

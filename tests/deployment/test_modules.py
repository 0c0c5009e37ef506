"""Deployed layers: what they compute, their buffers, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import erq
from erq.config import QuantConfig
from erq.deployment.modules import QuantLinear, QuantPatchEmbed, QuantScores, QuantValues
from erq.models.patches import patches
from erq.quant import AffineParams, DualAffineParams, LogParams, fake_quantize
from erq.quant.fit import fit_dual_weight, fit_tensor, fit_weight

Affine = Callable[..., AffineParams]
N, K = 40, 24


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the modules: the definition runs them wherever nothing else is asked."""
    monkeypatch.setenv("ERQ_BACKEND", "reference")


def make(w_bits: int = 4, a_bits: int = 4, dual: bool = False, bias: bool = True) -> QuantLinear:
    """A layer of random codes; x_scale is small, so that a detour through fp16 would change it."""
    weight = torch.randn(N, K)
    params = fit_dual_weight(weight, w_bits) if dual else fit_weight(weight, w_bits)
    assert isinstance(params, DualAffineParams) == dual
    x_params = None if a_bits == 16 else fit_tensor(torch.randn(500) * 1e-3 + 5e-4, a_bits)
    return QuantLinear.from_params(
        fake_quantize(weight, params), torch.randn(N) if bias else None, params, x_params
    )


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, K) * 1e-3


def exact(layer: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output in fp64 from its buffers, and the sum of magnitudes that it rounds."""
    x = x.double()
    if layer.x_scale is not None and layer.x_zero_point is not None:
        s, z = layer.x_scale, layer.x_zero_point
        code = (x.float() * s.reciprocal()).round() + z
        x = (code.clamp(0, 2**layer.a_bits - 1) - z).double() * s.double()
    codes = layer.weight_codes().double()
    w = (codes - layer.zero_point[:, None]) * layer.scale[:, None].double()
    if layer.dual_columns is not None:
        assert layer.scale2 is not None and layer.zero_point2 is not None
        own = (codes - layer.zero_point2[:, None]) * layer.scale2[:, None].double()
        w[:, layer.dual_columns] = own[:, layer.dual_columns]
    b = torch.zeros(N).double() if layer.bias is None else layer.bias.double()
    return F.linear(x, w, b), F.linear(x.abs(), w.abs(), b.abs())


@pytest.mark.parametrize("shape", [(3,), (2, 5), (), (0,), (2, 0, 4)])
@pytest.mark.parametrize(
    ("w_bits", "a_bits", "dual", "bias"),
    [
        (4, 4, False, True),
        (4, 4, True, True),
        (3, 8, True, False),
        (8, 8, False, False),
        (2, 2, False, True),
        (5, 16, True, True),
        (4, 16, False, False),
    ],
)
def test_output_is_that_of_the_buffers(
    w_bits: int, a_bits: int, dual: bool, bias: bool, shape: tuple[int, ...]
) -> None:
    layer, x = make(w_bits, a_bits, dual, bias), inputs(*shape)
    y = layer(x)
    expected, magnitude = exact(layer, x)
    assert y.shape == (*shape, N) and y.dtype == torch.float32
    # Folding the zero point into the bias rounds at the size of (z · s_x) Σ w, a few times larger.
    assert bool(((y - expected).abs() <= 1e-5 * magnitude + 1e-9).all())
    assert layer.scheme == ("dual" if dual else "affine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("a_bits", [4, 16])
def test_half_inputs_give_half_outputs(a_bits: int, dtype: torch.dtype) -> None:
    layer, x = make(a_bits=a_bits), inputs(2, 3).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize(("a_bits", "dual"), [(4, True), (4, False), (16, True)])
def test_buffers_keep_dtype_and_value(convert: str, a_bits: int, dual: bool) -> None:
    layer, x = make(a_bits=a_bits, dual=dual), inputs(5)
    before, y = {k: v.clone() for k, v in layer.state_dict().items()}, layer(x)
    assert getattr(layer, convert)() is layer
    after = layer.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name
    assert torch.equal(layer(x), y)


def test_move_takes_buffers_and_operands_along() -> None:
    layer = make(dual=True).to("meta")
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    assert layer.operands.weight.device.type == layer.operands.scale.device.type == "meta"
    assert layer(torch.empty(3, K, device="meta")).shape == (3, N)


@torch.no_grad()
def test_half_network(tiny_vit: Callable[..., Any]) -> None:
    images = torch.randn(4, 3, 16, 16)
    sim = erq.quantize(tiny_vit(init_values=1.0), images, "w8a8")
    net = erq.deploy(sim, backend="reference")
    expected, half = net(images), copy.deepcopy(net).half()
    got = half(images.half())
    assert got.dtype == torch.float16
    # fp16 between the layers moves some codes by one, and a log-√2 code stands for 3 dB.
    assert float((got - expected).norm()) < 0.1 * float(expected.norm())
    state = half.state_dict()
    for site in sim.erq_info.sites:
        for key, value in net.get_submodule(site.name).state_dict(prefix=f"{site.name}.").items():
            assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


@pytest.mark.parametrize("bits", range(2, 9))
def test_from_linear_weight_only(bits: int) -> None:
    linear = nn.Linear(K, N)
    weight = linear.weight.detach().clone()
    layer = QuantLinear.from_linear(linear, {"w_bits": bits, "a_bits": 16})
    assert torch.equal(linear.weight, weight)
    assert torch.equal(layer.weight, fake_quantize(weight, fit_weight(weight, bits)))
    assert layer.bias is not None and torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert (layer.w_bits, layer.a_bits, layer.scheme) == (bits, 16, "affine")
    # The weight is uniform over 2^b steps: its deviation is 2^b times that of the rounding error.
    error = float((layer.weight - weight).norm() / weight.norm())
    assert 0.3 * 2.0**-bits < error < 2.0 * 2.0**-bits
    x = torch.randn(3, K)
    expected = F.linear(x, layer.weight, linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_from_linear_quantized_activations() -> None:
    linear, x = nn.Linear(K, N, bias=False), torch.randn(64, K)
    params = fit_tensor(x, 8)
    layer = QuantLinear.from_linear(linear, QuantConfig.preset("w8a8"), params)
    assert layer.bias is None and layer.a_bits == 8
    expected = F.linear(fake_quantize(x, params), layer.weight)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    target = F.linear(x, linear.weight.detach())
    assert float((layer(x) - target).norm()) < 0.02 * float(target.norm())
    params.scale.zero_()  # the layer owns its buffers
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_from_linear_of_another_dtype() -> None:
    linear = nn.Linear(K, N)
    half = copy.deepcopy(linear).half()
    layer = QuantLinear.from_linear(half, "w4a16")
    assert {b.dtype for b in layer.buffers()} == {torch.float32, torch.int32, torch.uint8}
    assert layer(torch.randn(2, K).half()).dtype == torch.float16


def test_from_linear_refuses(affine: Affine) -> None:
    linear, x8 = nn.Linear(K, N), affine(0.1, 3, bits=8)
    refused: list[tuple[Any, Any, Any, str]] = [
        (linear, "w4a4", None, r"a_bits=4 needs x_params of that width, got none"),
        (linear, "w4a4", x8, r"a_bits=4 needs x_params of that width, got 8 bits"),
        (linear, "w4a16", x8, r"a_bits=16 keeps activations float: leave x_params out"),
        (linear, "w4a8", affine([0.1] * K, [3] * K, bits=8), r"one scale .* got \[24\]"),
        (linear, "w9a16", None, r"w_bits must be an integer from 2 to 8, got 9"),
        (linear, "four", None, r"unknown preset 'four'"),
        (linear, 4, None, r"config must be a QuantConfig"),
        (nn.Conv2d(3, 4, 2), "w4a16", None, r"takes an nn\.Linear, got a Conv2d"),
        (torch.randn(N, K), "w4a16", None, r"takes an nn\.Linear, got a Tensor"),
    ]
    for layer, config, x_params, message in refused:
        with pytest.raises(ValueError, match=message):
            QuantLinear.from_linear(layer, config, x_params)


@pytest.mark.parametrize("a_bits", [4, 16])
@pytest.mark.parametrize("shape", [(), (K + 1,), (2, 2 * K), (3, K // 2)])
def test_forward_refuses_another_width(a_bits: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the layer takes \[\.\.\., 24\], got a tensor"):
        make(a_bits=a_bits)(torch.randn(shape))


def test_empty_layer_says_so() -> None:
    with pytest.raises(ValueError, match=r"no integer operands: .* from_params, from_linear or a"):
        QuantLinear(K, N, 4, 4)(torch.randn(2, K))
    with pytest.raises(ValueError, match="no integer operands"):
        _ = make(a_bits=16).operands


@pytest.mark.parametrize(("a_bits", "dual"), [(4, True), (8, False), (16, True)])
def test_state_dict_carries_a_layer_over(a_bits: int, dual: bool) -> None:
    source, x = make(a_bits=a_bits, dual=dual), inputs(4)
    columns = 0 if source.dual_columns is None else len(source.dual_columns)
    target = QuantLinear(K, N, 4, a_bits, columns)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_state_dict_brings_new_operands() -> None:
    first, second, x = make(), make(), inputs(4)
    assert not torch.equal(first(x), second(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    first.load_state_dict({}, strict=False)
    assert torch.equal(first(x), second(x))


def test_copies_and_pickles_compute_the_same() -> None:
    layer, x = make(dual=True), inputs(4)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make(dual=True)
    assert layer.dual_columns is not None and other.dual_columns is not None
    assert len(layer.dual_columns) == len(other.dual_columns)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), y)


BAD_BUFFERS: list[tuple[str, int, Any, str]] = [
    ("scale", 0, 0.0, "scale must be finite and > 0"),
    ("scale", 3, -0.5, r"scale must be finite and > 0, .* got -0\.5"),
    ("scale", N - 1, float("nan"), "scale must be finite and > 0, .* got nan"),
    ("scale2", 1, float("inf"), "scale2 must be finite and > 0, .* got inf"),
    ("scale2", 1, 1e-44, "scale2 must be finite and > 0, and so must its reciprocal"),
    ("bias", 1, float("nan"), "bias must be finite"),
    ("zero_point", 5, 1000, r"zero_point: weight code − zero_point must fit int8 .* got -10"),
    ("zero_point", 5, -(2**31), r"zero_point: weight code − zero_point must fit int8 .*21474836"),
    ("zero_point2", 0, -113, r"zero_point2: weight code − zero_point must fit int8"),
    ("dual_columns", 0, -1, r"dual_columns must be sorted, distinct and inside 0\.\.23, got -1"),
    ("dual_columns", 1, K, r"dual_columns must be sorted"),
    ("dual_columns", 0, K - 1, r"dual_columns must be sorted"),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), BAD_BUFFERS)
@pytest.mark.parametrize("a_bits", [4, 16])
def test_state_dict_of_no_quantizer_is_refused(
    a_bits: int, name: str, index: int, value: Any, message: str
) -> None:
    # All codes 0 and 15 in every row: the int8 bound then depends on the zero point alone.
    weight = torch.linspace(-1, 1, K).repeat(N, 1)
    params = fit_dual_weight(weight, 4, torch.tensor([0, 7, K - 1]))
    x_params = None if a_bits == 16 else AffineParams(torch.tensor(0.1), torch.tensor(3).int(), 4)
    layer = QuantLinear.from_params(weight, torch.zeros(N), params, x_params)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state[name][index] = value
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_scale", 0.0, "x_scale must be finite and > 0"),
        ("x_scale", 3e38, "x_scale · scale, or the bias folded with it, overflows fp32"),
        ("x_zero_point", 2**24, r"x_zero_point must be below 2\*\*24 in magnitude, .* 16,777,216"),
        ("x_zero_point", -(2**31), r"x_zero_point must be below 2\*\*24 .* 2,147,483,648"),
    ],
)
def test_activation_quantizer_that_is_none_is_refused(name: str, value: Any, message: str) -> None:
    layer = make()
    layer.scale.fill_(2.0)
    state = {k: v.clone() for k, v in layer.state_dict().items()} | {
        name: torch.tensor(value, dtype=getattr(layer, name).dtype)
    }
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)


def test_error_names_the_path_of_the_buffer() -> None:
    net = nn.Sequential(nn.Linear(K, N), nn.ModuleDict({"a": make()}))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["1.a.x_scale"].zero_()
    with pytest.raises(ValueError, match=r"^1\.a\.x_scale must be finite"):
        net.load_state_dict(state)


def test_attention_quantizers_are_checked() -> None:
    scores, values = QuantScores(4, 0.5), QuantValues(4, True)
    scores.set_params(
        AffineParams(torch.tensor(0.1), torch.tensor(3).int(), 4),
        AffineParams(torch.tensor(0.2), torch.tensor(4).int(), 4),
    )
    values.set_params(
        LogParams(torch.tensor(0.9), 4), AffineParams(torch.tensor(0.2), torch.tensor(4).int(), 4)
    )
    float_factor = torch.tensor(0.1) * torch.tensor(0.2) * 0.5
    assert torch.equal(scores.factor, float_factor)
    bad: list[tuple[nn.Module, str, Any]] = [
        (scores, "q_scale", -1.0),
        (scores, "k_scale", float("nan")),
        (scores, "k_zero_point", 2**30),
        (values, "p_scale", 0.0),
        (values, "v_scale", float("inf")),
        (values, "v_zero_point", -(2**31)),
    ]
    for module, name, value in bad:
        state = {k: v.clone() for k, v in module.state_dict().items()}
        state[name].fill_(value)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            copy.deepcopy(module).load_state_dict(state)
    state = {k: v.clone() for k, v in scores.state_dict().items()}
    state["q_scale"].fill_(1e30)
    state["k_scale"].fill_(1e30)
    with pytest.raises(ValueError, match="q_scale · k_scale · temperature must be finite"):
        scores.load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding_is_a_convolution(bias: bool) -> None:
    conv = nn.Conv2d(3, N, (4, 2), stride=(4, 2), bias=bias)
    flat = conv.weight.detach().reshape(N, -1)
    params = fit_weight(flat, 8)
    layer = QuantPatchEmbed(3, N, (4, 2), 8, bias)
    layer.set_weight(flat, params, conv.bias)
    layer.repack()
    x = torch.randn(2, 3, 13, 8)  # the last row of pixels belongs to no patch
    y = layer(x)
    expected = F.conv2d(x, layer.weight.reshape(conv.weight.shape), conv.bias, stride=(4, 2))
    assert y.shape == (2, N, 3, 4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        y.flatten(2).transpose(1, 2),
        F.linear(patches(x, (4, 2)), layer.weight, conv.bias),
        rtol=1e-5,
        atol=1e-5,
    )
    assert layer.half().scale.dtype == torch.float32


def test_attention_takes_no_mask(tiny_vit: Callable[..., Any]) -> None:
    net: Any = erq.deploy(erq.quantize(tiny_vit(), torch.randn(4, 3, 16, 16), "w4a4"))
    x = torch.randn(1, 17, 24)
    for masked in ({"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="a quantized attention takes no mask"):
            net.blocks[0].attn(x, **masked)


def test_repr_tells_what_a_layer_is() -> None:
    text = repr(make(3, 8, dual=True))
    assert "24, 40, w_bits=3, scheme=dual, bias=True, backend=auto, a_bits=8" in text

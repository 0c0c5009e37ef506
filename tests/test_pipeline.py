"""quantize() end to end on tiny random ViTs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import erq
from erq import QuantConfig, quantize
from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.models import UnsupportedModelError
from erq.quant import DualAffineParams, dequantize, fake_quantize
from erq.quant import quantize as codes_of

Build = Callable[..., Any]

MODES: dict[str, QuantConfig] = {
    "sequential": QuantConfig.preset("w3a4"),
    "as published": QuantConfig.paper("w3a4"),
    "rtn": QuantConfig.preset("w4a4", method="rtn"),
    "repq": QuantConfig.preset("w4a4", method="repq"),
    "gptq": QuantConfig.preset("w4a4", method="gptq"),
    "float activations": QuantConfig.preset("w3a16"),
    "float attention": QuantConfig.preset("w4a4", attention="float"),
    "eight bits": QuantConfig.preset("w8a8"),
    "two bits": QuantConfig.preset("w2a2"),
    "nothing folded": QuantConfig.preset("w4a4", reparameterize=False, dual=False),
    "published, nothing folded": QuantConfig.paper("w4a4", reparameterize=False),
}


def images(n: int = 12) -> Tensor:
    """Random images with some structure: smooth, and of different brightness."""
    coarse = torch.randn(n, 3, 4, 4) + torch.randn(n, 1, 1, 1)
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


def simulated(sim: nn.Module) -> dict[str, nn.Module]:
    kinds = (SimLinear, SimConv2d, SimScores, SimValues)
    return {n: m for n, m in sim.named_modules() if isinstance(m, kinds)}


def weight_bits(module: nn.Module) -> int | None:
    return module.w_params.bits if isinstance(module, SimLinear | SimConv2d) else None


def check_sites(sim: nn.Module, x: Tensor) -> None:
    """Run `sim` and hold every site to its grids: weights, inputs, at most 2**bits values."""
    seen = set()

    def hold(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        seen.add(name)
        if isinstance(module, SimLinear):
            pairs = [(args[0], module.x_params)]
        elif isinstance(module, SimScores):
            pairs = [(args[0], module.q_params), (args[1], module.k_params)]
        elif isinstance(module, SimValues):
            pairs = [(args[0], module.p_params), (args[1], module.v_params)]
        else:
            pairs = []
        for value, params in pairs:
            if params is None:
                continue
            codes = codes_of(value, params)
            assert 0 <= int(codes.min()) <= int(codes.max()) < 2**params.bits, name
            assert len(fake_quantize(value, params).unique()) <= 2**params.bits, name
        if isinstance(module, SimLinear | SimConv2d):
            assert module.w_params is not None, name
            codes = codes_of(module.weight, module.w_params)
            assert 0 <= int(codes.min()) <= int(codes.max()) < 2**module.w_params.bits, name
            assert torch.equal(dequantize(codes, module.w_params), module.weight), name

    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: hold(name, m, args))
        for name, module in simulated(sim).items()
    ]
    with torch.no_grad():
        y = sim(x)
    for handle in handles:
        handle.remove()
    assert seen == set(simulated(sim)) == {s.name for s in sim.erq_info.sites}
    assert bool(torch.isfinite(y).all())


def relative_error(sim: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        return float((sim(x) - y).square().sum() / y.square().sum())


@pytest.mark.parametrize("config", MODES.values(), ids=MODES.keys())
def test_every_tensor_is_on_its_grid(tiny_vit: Build, config: QuantConfig) -> None:
    sim = quantize(tiny_vit(), images(), config)
    check_sites(sim, images(3))
    for module in simulated(sim).values():
        if isinstance(module, SimLinear):
            expected = None if config.a_bits == 16 else config.a_bits
            assert (module.x_params.bits if module.x_params else None) == expected
        assert weight_bits(module) in (None, config.w_bits)
    quantized = config.attention == "quantized" and config.a_bits != 16
    assert any(isinstance(m, SimScores) for m in simulated(sim).values()) == quantized


KINDS: dict[str, dict[str, Any]] = {
    "distilled": {"cls": VisionTransformerDistilled},
    "average pooling": {"global_pool": "avg", "class_token": False},
    "registers and layer scale": {"reg_tokens": 2, "init_values": 1.0, "no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "any size": {"dynamic_img_size": True},
    "no head": {"num_classes": 0},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("mode", ["sequential", "as published"])
def test_every_kind_of_model(tiny_vit: Build, settings: dict[str, Any], mode: str) -> None:
    model = tiny_vit(**settings)
    sim = quantize(model, images(), MODES[mode])
    check_sites(sim, images(3))
    weights = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(r.name for r in sim.erq_report) == sorted(weights)


def test_eight_bits_are_close_to_full_precision(tiny_vit: Build) -> None:
    model, x = tiny_vit(), images()
    errors = [relative_error(quantize(model, x, f"w{b}a{b}"), model, images(8)) for b in (8, 6, 3)]
    assert errors[0] < 1e-2
    assert errors == sorted(errors)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["sequential", "as published"])
def test_the_model_itself_is_unchanged(tiny_vit: Build, training: bool, mode: str) -> None:
    model = tiny_vit(drop_rate=0.5, drop_path_rate=0.5).train(training)
    before = copy.deepcopy(model)
    ids = {n: id(m) for n, m in model.named_modules()}
    quantize(model, images(), MODES[mode])
    assert {n: id(m) for n, m in model.named_modules()} == ids
    assert all(m.training == training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not hasattr(model, "erq_info")


def same_numbers(a: nn.Module, b: nn.Module) -> bool:
    x = images(3)
    states = a.state_dict(), b.state_dict()
    return (
        a.erq_report == b.erq_report
        and states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
        and torch.equal(a(x), b(x))
    )


@pytest.mark.parametrize("mode", ["sequential", "as published"])
def test_same_inputs_give_the_same_codes(tiny_vit: Build, mode: str) -> None:
    model, x = tiny_vit(), images()
    first = quantize(model, x, MODES[mode])
    torch.manual_seed(99)
    labelled = [(part, torch.zeros(len(part))) for part in x.split(12)]
    assert same_numbers(first, quantize(model, labelled, MODES[mode].to_dict()))


def test_training_mode_and_half_precision_are_accepted(tiny_vit: Build) -> None:
    model, x = tiny_vit(drop_rate=0.5, drop_path_rate=0.5).half(), images()
    expected = quantize(copy.deepcopy(model).float(), x, "w4a4")
    training = quantize(copy.deepcopy(model).float().train(), x, "w4a4")
    half = quantize(model, x, "w4a4")
    for sim in (training, half):
        assert not any(m.training for m in sim.modules())
        assert {p.dtype for p in sim.parameters()} == {torch.float32}
        assert same_numbers(sim, expected)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_sites_can_be_kept_and_overridden(tiny_vit: Build) -> None:
    model = tiny_vit(embed_dim=48)
    config = QuantConfig(
        keep_float=("head", "blocks.0.attn.proj"),
        overrides={
            "blocks.*.mlp.fc2": {"a_bits": 8, "w_bits": 6},
            "blocks.1.attn.qkv": {"dual": False},
            "patch_embed.proj": {"w_bits": 8},
            "blocks.0.mlp.fc1": {"a_bits": 16},
        },
    )
    sim: Any = quantize(model, images(), config)
    check_sites(sim, images(3))
    assert torch.equal(sim.head.weight, model.head.weight)
    assert torch.equal(sim.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)
    for block in sim.blocks:
        assert (block.mlp.fc2.w_params.bits, block.mlp.fc2.x_params.bits) == (6, 8)
    assert isinstance(sim.blocks[0].attn.qkv.w_params, DualAffineParams)
    assert not isinstance(sim.blocks[1].attn.qkv.w_params, DualAffineParams)
    assert sim.patch_embed.proj.w_params.bits == 8
    assert sim.blocks[0].mlp.fc1.x_params is None
    reports = {r.name: (r.w_bits, r.a_bits, r.scheme) for r in sim.erq_report}
    assert "head" not in reports
    assert reports["blocks.0.mlp.fc2"] == (6, 8, "affine")
    assert reports["blocks.0.mlp.fc1"] == (4, 16, "dual")


@pytest.mark.parametrize("mode", ["sequential", "as published", "rtn", "nothing folded"])
def test_both_gates_of_swiglu_share_a_quantizer(tiny_vit: Build, mode: str) -> None:
    sim: Any = quantize(tiny_vit(mlp_layer=SwiGLU), images(), MODES[mode])
    for block in sim.blocks:
        assert block.mlp.fc1_g.x_params is block.mlp.fc1_x.x_params


@pytest.mark.parametrize("mode", ["sequential", "as published"])
@pytest.mark.parametrize("gate", ["fc1_g", "fc1_x"])
@pytest.mark.parametrize("a_bits", [8, 16])
def test_gates_of_different_widths(tiny_vit: Build, mode: str, gate: str, a_bits: int) -> None:
    config = {**MODES[mode].to_dict(), "overrides": {f"*.{gate}": {"a_bits": a_bits}}}
    sim: Any = quantize(tiny_vit(mlp_layer=SwiGLU), images(), config)
    check_sites(sim, images(3))
    other = {"fc1_g": "fc1_x", "fc1_x": "fc1_g"}[gate]
    for block in sim.blocks:
        own = getattr(block.mlp, gate).x_params
        assert (16 if own is None else own.bits) == a_bits
        assert getattr(block.mlp, other).x_params.bits == 4


def traced(model: nn.Module, names: list[str], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the named modules while the model runs on x."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("settings", [{}, {"mlp_layer": SwiGLU}], ids=["Mlp", "SwiGLU"])
@pytest.mark.parametrize("mode", ["sequential", "sequential, own basis", "as published"])
def test_reports_are_what_the_sites_do(
    tiny_vit: Build, settings: dict[str, Any], mode: str
) -> None:
    model, x = tiny_vit(**settings), images(20)
    rotated = mode == "sequential"
    config = replace(MODES[mode.partition(",")[0]], rotate_heads=rotated)
    sim = quantize(model, x, config)
    sites = [s for s in sim.erq_info.sites if s.kind in ("linear", "conv")]
    names = [s.name for s in sites] + [s.norm for s in sites if s.norm is not None]
    full, quantized = traced(model, names, x), traced(sim, names, x)
    for site, report in zip(sites, sim.erq_report, strict=True):
        if rotated and site.name.endswith("qkv"):
            continue  # its output is in a basis that the full-precision network does not have
        expected = full[site.name][1]
        got = quantized[site.name][1]
        if mode == "as published":
            # Every layer alone: behind its own folded norm, on full-precision activations.
            alone = full[site.name][0]
            with torch.no_grad():
                if site.norm is not None:
                    alone = sim.get_submodule(site.norm)(full[site.norm][0])
                got = sim.get_submodule(site.name)(alone)
        error = float((got - expected).square().sum() / expected.square().sum())
        assert report.error_final == pytest.approx(error, rel=0.02, abs=1e-6), site.name


def mean_error(sim: nn.Module, name: str) -> float:
    return sum(getattr(r, name) for r in sim.erq_report) / len(sim.erq_report)


def test_every_step_lowers_the_error(tiny_vit: Build) -> None:
    model, x = tiny_vit(), images()
    for mode in ("sequential", "as published"):
        sim = quantize(model, x, MODES[mode])
        assert mean_error(sim, "error_final") < mean_error(sim, "error_nearest")
        assert mean_error(sim, "error_aqer") <= mean_error(sim, "error_float")
        for report in sim.erq_report:
            assert report.error_final < 1.5 * report.error_nearest, report.name


def test_methods_are_ordered_by_their_error(tiny_vit: Build) -> None:
    """Each method on the full-precision stream, so that all see the same rows."""
    model, x = tiny_vit(), images(24)
    settings = {"upstream": "float", "w_bits": 3, "attention": "float"}
    errors = {
        method: mean_error(quantize(model, x, {**settings, "method": method}), "error_final")
        for method in ("rtn", "repq", "gptq", "erq")
    }
    assert errors["erq"] < errors["gptq"] < errors["repq"] < errors["rtn"]


def test_sequential_beats_published_and_nearest_at_the_output(tiny_vit: Build) -> None:
    totals = dict.fromkeys(("sequential", "as published", "nearest"), 0.0)
    for _ in range(3):
        model, x = tiny_vit(), images(24)
        for name in totals:
            config = MODES.get(name, QuantConfig.preset("w3a4", method="repq"))
            totals[name] += relative_error(quantize(model, x, config), model, x)
    assert totals["sequential"] < totals["as published"] < totals["nearest"]


@torch.no_grad()
def spoil(model: Any, how: str) -> None:
    block = model.blocks[0]
    if how == "dead channels":
        for norm in (block.norm1, block.norm2):
            norm.weight[:5], norm.bias[:5] = 0, 0
    elif how == "constant channels":
        block.norm1.weight[:5], block.norm1.bias[:5] = 0, 3.0
    elif how == "dead norm":
        block.norm1.weight.zero_()
        block.norm1.bias.zero_()
    elif how == "one-signed rows":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight[:4] = module.weight[:4].abs() + 0.1
                module.weight[4:8] = -module.weight[4:8].abs() - 0.1
    elif how == "dead weights":
        block.attn.qkv.weight[:30].zero_()
        block.mlp.fc2.weight.zero_()
        model.head.weight.zero_()
    elif how == "constant activations":
        block.mlp.fc1.weight.zero_()  # the GELU's output is one number per channel
        block.attn.proj.weight.zero_()
    elif how == "huge weights":
        block.mlp.fc1.weight *= 1e4
    elif how == "tiny weights":
        block.mlp.fc1.weight *= 1e-12
        block.norm1.weight *= 1e-12


@pytest.mark.parametrize(
    "how",
    [
        "dead channels",
        "constant channels",
        "dead norm",
        "one-signed rows",
        "dead weights",
        "constant activations",
        "huge weights",
        "tiny weights",
    ],
)
@pytest.mark.parametrize("mode", ["sequential", "as published", "eight bits"])
def test_degenerate_models_go_through(tiny_vit: Build, how: str, mode: str) -> None:
    model = tiny_vit()
    spoil(model, how)
    sim = quantize(model, images(), MODES[mode])
    check_sites(sim, images(3))
    assert all(r.error_final == r.error_final < float("inf") for r in sim.erq_report)
    if mode == "eight bits" and how != "huge weights":
        assert relative_error(sim, model, images(6)) < 0.05


@pytest.mark.parametrize("mode", ["sequential", "as published"])
def test_degenerate_images_go_through(tiny_vit: Build, mode: str) -> None:
    for x in (torch.zeros(4, 3, 16, 16), images(1).repeat(4, 1, 1, 1), images(2)):
        sim = quantize(tiny_vit(), x, MODES[mode])
        check_sites(sim, images(3))


def test_more_images_than_one_chunk_and_than_ranges_use(tiny_vit: Build) -> None:
    model, x = tiny_vit(), images(40)
    for mode in ("sequential", "as published"):
        sim = quantize(model, x, MODES[mode])
        assert sim.erq_info.calibration["n"] == 40
        assert not same_numbers(sim, quantize(model, x[:32], MODES[mode]))


def test_info_of_the_result(tiny_vit: Build) -> None:
    model, x = tiny_vit(), images()
    model.pretrained_cfg = {"architecture": "vit_toy", "mean": (0.5,) * 3, "first_conv": "x"}
    info = quantize(model, x, "w4a4").erq_info
    again = quantize(model, [x[:5], x[5:]], "w4a4").erq_info
    other = quantize(model, x.flip(0), "w4a4").erq_info
    assert info.calibration == again.calibration != other.calibration
    assert len(info.calibration["sha256"]) == 64
    assert (info.family, info.architecture) == ("timm_vit", "vit_toy")
    assert info.pretrained_cfg["mean"] == [0.5] * 3
    assert info.config == QuantConfig.preset("w4a4")
    json.dumps([info.arch_kwargs, info.pretrained_cfg, info.calibration, info.config.to_dict()])


def test_report_is_in_forward_order(tiny_vit: Build) -> None:
    sim = quantize(tiny_vit(), images(), "w4a4")
    linear = [s.name for s in sim.erq_info.sites if s.kind in ("conv", "linear")]
    assert [r.name for r in sim.erq_report] == linear
    assert set(sim.erq_stages) == {"ranges", "gram", "solve", "forward"}


def test_progress_is_silent_without_a_terminal(
    tiny_vit: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    quantize(tiny_vit(depth=1), images(2), "w4a4", progress=True)
    assert capfd.readouterr() == ("", "")


BAD_IMAGES = {
    "NaN": (lambda: images().index_fill(0, torch.tensor([3]), float("nan")), "NaN or infinite"),
    "infinity": (lambda: images() / 0.0, "NaN or infinite"),
    "one": (lambda: images(1), "at least 2 images"),
    "none": (lambda: images(0), "at least 2 images"),
    "channels": (lambda: images()[:, :1], "images have 1 channels, the model takes 3"),
    "size": (lambda: images()[..., :8], "images are 16×8, the model takes 16×16"),
    "integers": (lambda: images().to(torch.uint8), "float tensor"),
}


@pytest.mark.parametrize(("make", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images_are_refused(tiny_vit: Build, make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(tiny_vit(), make(), "w4a4")


def test_bad_settings_and_models_are_refused(tiny_vit: Build) -> None:
    model, x = tiny_vit(), images(2)
    with pytest.raises(ValueError, match="unknown preset 'int4'"):
        quantize(model, x, "int4")
    with pytest.raises(ValueError, match="matches none of the model's 14 sites"):
        quantize(model, x, {"overrides": {"layers.*": {"w_bits": 8}}})
    with pytest.raises(UnsupportedModelError, match="Sequential"):
        quantize(nn.Sequential(nn.Linear(3, 3)), x)
    assert torch.get_float32_matmul_precision() == "highest"


def test_matmul_precision_is_given_back(tiny_vit: Build) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        quantize(tiny_vit(depth=1), images(2), "w4a4")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_public_names() -> None:
    assert erq.quantize is quantize
    assert erq.QuantConfig is QuantConfig
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = erq.quantise


def test_any_size_model_refuses_images_that_patches_do_not_divide() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=1, dynamic_img_size=True
    ).eval()
    with pytest.raises(ValueError, match="does not take images of 40×48"):
        quantize(model, torch.randn(2, 3, 40, 48), "w4a4")


def test_submodule_left_in_training_mode_changes_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=1, proj_drop_rate=0.5
    ).eval()
    images = torch.randn(4, 3, 32, 32)
    calm = quantize(model, images, "w4a4")(images)
    model.blocks[0].mlp.train()
    assert torch.equal(quantize(model, images, "w4a4")(images), calm)


@torch.no_grad()
def test_target_bits_are_met_by_widths_of_least_error(tiny_vit: Build) -> None:
    model, x = tiny_vit(), images()
    sim: Any = quantize(model, x, "w4a4", target_bits=3.5)
    bits = {n: weight_bits(m) for n, m in simulated(sim).items() if weight_bits(m) is not None}
    assert {s.name: s.w_bits for s in sim.erq_bits} == bits
    sizes = {n: sim.get_submodule(n).weight.numel() for n in bits}
    average = sum(bits[n] * sizes[n] for n in bits) / sum(sizes.values())
    assert 3.2 < average <= 3.5
    assert len(set(bits.values())) > 1
    # The settings that it carries are those of a run without a target.
    again: Any = quantize(model, x, sim.erq_info.config)
    assert torch.equal(again(x), sim(x))
    assert again.erq_bits == []


def test_target_bits_leave_fixed_widths_alone(tiny_vit: Build) -> None:
    config = {
        "overrides": {"patch_embed.*": {"w_bits": 8}, "blocks.0.attn.qkv": {"a_bits": 8}},
        "keep_float": ["head"],
    }
    sim: Any = quantize(tiny_vit(), images(), config, target_bits=3)
    names = {s.name for s in sim.erq_bits}
    assert "patch_embed.proj" not in names and "head" not in names
    assert sim.get_submodule("patch_embed.proj").w_params.bits == 8
    qkv = sim.get_submodule("blocks.0.attn.qkv")
    assert qkv.x_params.bits == 8
    assert {s.name: s.w_bits for s in sim.erq_bits}["blocks.0.attn.qkv"] == qkv.w_params.bits


@pytest.mark.parametrize("target", [1, 9, "4", True])
def test_bad_target_bits_are_refused(target: Any, tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match="target_bits must be"):
        quantize(tiny_vit(), images(), target_bits=target)


def test_target_bits_need_a_layer_to_decide_on(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match="no layer to decide on"):
        quantize(tiny_vit(), images(), {"overrides": {"*": {"w_bits": 4}}}, target_bits=3)

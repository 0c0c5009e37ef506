"""Simulated, deployed and reloaded models: the same codes at every site, the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import erq
from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.config import QuantConfig
from erq.deployment.modules import (
    QuantAttention,
    QuantLinear,
    QuantPatchEmbed,
    QuantScores,
    QuantValues,
)
from erq.models.patches import patches
from erq_kernels import BackendError, dispatch, reference
from erq_kernels.ops import _REFERENCE

Build = Callable[..., Any]
Trace = list[tuple[str, tuple[Tensor, ...]]]

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    **{bits: ({}, bits) for bits in ("w4a4", "w3a4", "w4a8", "w8a8", "w2a2", "w6a6")},
    **{bits: ({}, bits) for bits in ("w4a16", "w3a16")},
    "as published": ({}, QuantConfig.paper("w4a4")),
    "rtn": ({}, {"method": "rtn"}),
    "repq": ({}, {"method": "repq"}),
    "gptq": ({}, {"method": "gptq"}),
    "softmax and values in float": ({}, {"attention": "float"}),
    "mixed bits": (
        {},
        {
            "overrides": {
                "patch_embed.proj": {"w_bits": 8},
                "blocks.0.attn.qkv": {"w_bits": 3, "a_bits": 6},
                "blocks.0.attn.qk": {"a_bits": 8},
                "blocks.0.attn.av": {"a_bits": 3},
                "blocks.1.attn.*": {"a_bits": 5},
                "blocks.*.mlp.fc2": {"a_bits": 8, "w_bits": 2},
                "head": {"a_bits": 16},
            }
        },
    ),
    "an attention of 16 bits": ({}, {"overrides": {"blocks.0.attn.[qa][kv]": {"a_bits": 16}}}),
    "kept in float": ({}, {"keep_float": ["head", "patch_embed.*", "blocks.1.mlp.fc1"]}),
    "an attention kept in float": ({}, {"keep_float": ["blocks.1.attn.qk", "blocks.1.attn.av"]}),
    "all but the attention in float": ({}, {"keep_float": ["*.qkv", "*proj", "*.fc?", "head"]}),
    "deit distilled": ({"cls": VisionTransformerDistilled}, "w4a4"),
    "dinov2 with registers": (
        {"reg_tokens": 4, "init_values": 1.0, "no_embed_class": True, "dynamic_img_size": True},
        "w4a4",
    ),
    "average pooling": ({"global_pool": "avg", "class_token": False}, "w4a4"),
    "qk_norm": ({"qk_norm": True}, "w4a4"),
    "SwiGLU": ({"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU}, "w4a4"),
    "packed SwiGLU": ({"mlp_layer": timm.layers.GluMlp, "act_layer": nn.SiLU}, "w3a4"),
    "norms inside": ({"scale_attn_norm": True, "scale_mlp_norm": True}, "w4a4"),
    "RMS norm": ({"norm_layer": timm.layers.RmsNorm}, "w4a4"),
    "clip": ({"pre_norm": True, "act_layer": "quick_gelu"}, "w4a4"),
    "GELU by tanh": ({"act_layer": "gelu_tanh"}, "w4a4"),
    "no biases": ({"qkv_bias": False, "proj_bias": False}, "w4a4"),
    "no head": ({"num_classes": 0}, "w4a4"),
    "pixels of 8 bits": ({}, {"image_bits": 8, "overrides": {"patch_embed.*": {"w_bits": 8}}}),
    "pixels of 4 bits": ({"patch_size": 2}, {"image_bits": 4}),
}


# `images` are of another size than the model was made for.
SWIN_CASES: dict[str, tuple[dict[str, Any], Any]] = {
    **{bits: ({}, bits) for bits in ("w4a4", "w3a4", "w4a8", "w8a8", "w2a2", "w6a6", "w3a16")},
    "as published": ({}, QuantConfig.paper("w4a4")),
    "softmax and values in float": ({}, {"attention": "float"}),
    "mixed bits": (
        {},
        {
            "overrides": {
                "layers.0.*": {"w_bits": 3},
                "layers.0.blocks.1.attn.av": {"a_bits": 6},
                "layers.1.downsample.reduction": {"a_bits": 8},
                "layers.1.blocks.*.mlp.fc2": {"a_bits": 16},
            }
        },
    ),
    "merging kept in float": ({}, {"keep_float": ["*.reduction", "head.fc"]}),
    "windows with padding": ({"img_size": (20, 28)}, "w4a4"),
    "padding, attention in float": ({"img_size": (20, 28)}, {"attention": "float"}),
    "padding, qkv in float": ({"img_size": (20, 28)}, {"keep_float": ["*.qkv"]}),
    "any size": ({"strict_img_size": False, "images": (20, 12)}, "w4a4"),
    "windows larger than the map": ({"window_size": 9, "always_partition": True}, "w4a4"),
    "heads in another order of columns": ({"embed_dim": 24, "num_heads": (2, 3)}, "w4a4"),
    "no qkv bias": ({"qkv_bias": False, "num_classes": 0}, "w4a4"),
}


@contextmanager
def traced(model: Any) -> Iterator[Trace]:
    """Collect what enters every site when the model runs on the reference backend.

    Sites with integer activations show the codes, as the kernels get them; `qk` those of q and k,
    `av` those of the softmax and of v; weight-only sites show their float rows. A site is known by
    the memory of its operands, so it makes no difference which module calls its kernel.
    """
    trace: Trace = []
    sites: dict[int, str] = {}
    hooks = []

    def record(key: Tensor, *values: Tensor) -> None:
        trace.append((sites[key.data_ptr()], tuple(v.clone() for v in values)))

    def record_rows(name: str, kernel: tuple[int, int] | None) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if kernel is None else patches(args[0], kernel)
            trace.append((name, (x.reshape(-1, x.shape[-1]).clone(),)))

        return hook

    for name, m in model.named_modules():
        if isinstance(m, QuantLinear | QuantPatchEmbed):
            sites[(m.operands.weight if m.a_bits < 16 else m.packed).data_ptr()] = name
        elif isinstance(m, QuantScores):
            sites[m.q_zero_point.data_ptr()] = name
        elif isinstance(m, QuantValues):
            sites[m.v_zero_point.data_ptr()] = name
        elif isinstance(m, SimLinear | SimConv2d) and m.operands is not None:
            sites[m.operands.weight.data_ptr()] = name
        elif isinstance(m, SimLinear | SimConv2d):
            kernel = m.kernel_size if isinstance(m, SimConv2d) else None
            hooks.append(m.register_forward_pre_hook(record_rows(name, kernel)))
        elif isinstance(m, SimScores):
            assert m.q_params is not None
            sites[m.q_params.zero_point.data_ptr()] = name
        elif isinstance(m, SimValues):
            assert m.v_params is not None
            sites[m.v_params.zero_point.data_ptr()] = name

    def qlinear(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record(weight, x)
        return originals["qlinear"](x, weight, *args, **kwargs)

    def dequant_linear(x: Tensor, packed: Tensor, *args: Any) -> Tensor:
        record(packed, x)
        return originals["dequant_linear"](x, packed, *args)

    def attention_scores(q: Tensor, k: Tensor, q_zero_point: Tensor, *args: Any) -> Tensor:
        record(q_zero_point, q, k)
        return originals["attention_scores"](q, k, q_zero_point, *args)

    def attention_values(p: Tensor, v: Tensor, v_zero_point: Tensor, *args: Any) -> Tensor:
        record(v_zero_point, p, v)
        return originals["attention_values"](p, v, v_zero_point, *args)

    spies = {f.__name__: f for f in (qlinear, dequant_linear, attention_scores, attention_values)}
    originals: dict[str, Any] = {name: getattr(reference, name) for name in spies}
    with pytest.MonkeyPatch.context() as patch:
        for name, spy in spies.items():
            patch.setattr(reference, name, spy)
            if (name, "reference") in dispatch._kernels:
                kernel = dispatch.Kernel(spy, lambda *_, **__: None)
                patch.setitem(dispatch._kernels, (name, "reference"), kernel)
        try:
            yield trace
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def trace_of(model: nn.Module, x: Tensor) -> tuple[Trace, Tensor]:
    with traced(model) as trace:
        logits = model(x)
    return trace, logits


def float_only(model: Any, name: str) -> bool:
    """Whether the site `name` of a simulated model takes float activations."""
    m = model.get_submodule(name)
    return isinstance(m, SimConv2d | SimLinear) and m.x_params is None


@pytest.mark.parametrize(("settings", "config"), CASES.values(), ids=CASES.keys())
def test_codes_are_equal_at_every_site(
    settings: dict[str, Any], config: Any, tiny_vit: Build, tmp_path: Path
) -> None:
    check_codes(tiny_vit(**settings), config, torch.randn(9, 3, 16, 16), tmp_path)


@pytest.mark.parametrize(("settings", "config"), SWIN_CASES.values(), ids=SWIN_CASES.keys())
def test_codes_of_a_swin_are_equal_at_every_site(
    settings: dict[str, Any], config: Any, tiny_swin: Build, tmp_path: Path
) -> None:
    settings = dict(settings)
    size = settings.pop("images", settings.get("img_size", (16, 16)))
    check_codes(tiny_swin(**settings), config, torch.randn(9, 3, *size), tmp_path)


def check_codes(model: nn.Module, config: Any, images: Tensor, tmp_path: Path) -> None:
    """Simulated, deployed and reloaded, `model` has the same codes at every site.

    Args:
        images: three to compare on, after those to calibrate on.
    """
    sim: Any = erq.quantize(model, images[:-3], config)
    x = images[-3:]
    expected, logits = trace_of(sim, x)
    assert [name for name, _ in expected] == [s.name for s in sim.erq_info.sites] != []
    assert float(logits.std()) > 0.05  # logits that a lost site would change

    net = erq.deploy(sim, backend="reference")
    erq.save(net, tmp_path / "net.safetensors")
    reloaded = erq.load(tmp_path / "net.safetensors", backend="reference")
    traces = {"deployed": trace_of(net, x), "reloaded": trace_of(reloaded, x)}
    for state, (trace, got) in traces.items():
        assert [name for name, _ in trace] == [name for name, _ in expected], state
        for (name, seen), (_, wanted) in zip(trace, expected, strict=True):
            for a, b in zip(seen, wanted, strict=True):
                if float_only(sim, name):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                else:
                    assert len(b.unique()) > 1, f"{name}: a constant shows nothing"
                    assert torch.equal(a, b), f"{state}: codes differ at {name}"
        bound = 1e-5 * float(logits.abs().max())
        torch.testing.assert_close(got, logits, rtol=0, atol=bound, msg=f"{state}: logits")
    assert torch.equal(traces["deployed"][1], traces["reloaded"][1])


@pytest.fixture
def sim(tiny_vit: Build) -> Any:
    return erq.quantize(tiny_vit(), torch.randn(4, 3, 16, 16), "w4a4")


@torch.no_grad()
def test_deploy_leaves_the_simulated_model_alone(sim: Any) -> None:
    x = torch.randn(2, 3, 16, 16)
    before, logits = {k: v.clone() for k, v in sim.state_dict().items()}, sim(x)
    types = [type(m) for m in sim.modules()]
    net = erq.deploy(sim)
    for p in net.state_dict().values():
        p.zero_()
    assert [type(m) for m in sim.modules()] == types
    assert torch.equal(sim(x), logits)
    assert all(torch.equal(before[k], v) for k, v in sim.state_dict().items())


def test_deployed_model_holds_packed_codes_alone(sim: Any) -> None:
    net: Any = erq.deploy(sim.train())
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(isinstance(m, SimLinear | SimConv2d | SimScores) for m in net.modules())
    sizes = {s.name: s.kind for s in sim.erq_info.sites}
    for name, kind in sizes.items():
        module = net.get_submodule(name)
        assert not list(module.parameters())
        if kind in ("linear", "conv"):
            source = sim.get_submodule(name)
            n, k = source.weight.shape
            assert module.packed.dtype == torch.uint8
            assert module.packed.numel() == (n * k * 4 + 7) // 8
            assert torch.equal(module.weight, source.weight)  # on the grid, bit by bit
    assert isinstance(net.blocks[0].attn, QuantAttention)
    assert net.erq_info == sim.erq_info
    assert [r["name"] for r in net.erq_report] == [r.name for r in sim.erq_report]


def test_deploy_refuses_anything_else(sim: Any, tiny_vit: Build) -> None:
    everything_float = erq.quantize(tiny_vit(), torch.randn(4, 3, 16, 16), {"keep_float": ["*"]})
    others = [tiny_vit(), erq.deploy(sim), everything_float, nn.Linear(2, 2), "model", None]
    for other in others:
        with pytest.raises(ValueError, match=r"deploy takes the model that erq\.quantize returned"):
            erq.deploy(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown backend 'gpu'; choose one of auto, cuda"):
        erq.deploy(sim, backend="gpu")


def pretend(patch: pytest.MonkeyPatch, backend: str, reasons: dict[str, str]) -> dict[str, int]:
    """Give `backend` reference kernels for all ops but those with a reason; counts their calls."""
    patch.setattr(dispatch, "_kernels", dict(dispatch._kernels))
    calls = dict.fromkeys(_REFERENCE, 0)

    def counting(op: str) -> Any:
        def run(*args: Any) -> Any:
            calls[op] += 1
            return _REFERENCE[op](*args)

        return run

    for op in _REFERENCE:
        reason = reasons.get(op)
        dispatch.register(op, backend, counting(op), lambda *_, r=reason, **__: r)
    return calls


@torch.no_grad()
def test_forced_backend_runs_every_site(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 16, 16)
    expected = erq.deploy(sim, backend="reference")(x)
    calls = pretend(monkeypatch, "cuda", {})
    net = erq.deploy(sim, backend="cuda")
    assert torch.equal(net(x), expected)
    kinds = [s.kind for s in sim.erq_info.sites]
    assert calls["qlinear"] == kinds.count("linear")
    assert calls["qattention"] == kinds.count("matmul_qk")
    assert calls["dequant_linear"] == kinds.count("conv")
    sites, blocks = erq.summary(net).split("total")
    assert sum("cuda" in row for row in sites.splitlines()) == len(kinds)
    assert blocks.count("(cuda)") == 7 and "(reference)" not in blocks


@pytest.mark.parametrize("op", ["quantize", "qlinear", "qattention", "dequant_linear"])
def test_forced_backend_that_lacks_one_op_is_refused(
    op: str, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "triton", {op: "needs a moon"})
    message = rf"no backend can run {op} as asked \(triton: needs a moon\)"
    with pytest.raises(BackendError, match=message):
        erq.deploy(sim, backend="triton")
    monkeypatch.setenv("ERQ_BACKEND", "triton")
    with pytest.raises(BackendError, match=message):
        erq.deploy(sim)
    assert erq.deploy(sim, backend="reference") is not None

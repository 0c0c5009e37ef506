"""A fused block computes what its modules compute one by one, in seven kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import erq
from erq.deployment.blocks import QuantBlock, activation_name
from erq.deployment.network import set_backend
from erq_kernels import _cpu, dispatch

Build = Callable[..., VisionTransformer]

LAYER_NORM, GEMM, ATTENTION = "layer_norm_quantize", "qlinear", "qattention"
SEVEN = [LAYER_NORM, GEMM, ATTENTION, GEMM, LAYER_NORM, GEMM, GEMM]


def deployed(model: nn.Module, **config: Any) -> tuple[Any, Any]:
    """The simulated and the deployed network of `model`."""
    sim = erq.quantize(model, torch.randn(4, 3, 16, 16), {"refine": "off", **config})
    return sim, erq.deploy(sim, backend="reference")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops called since, by name."""
    called: list[str] = []
    real = dispatch.call

    def call(op: str, backend: str, *args: Any) -> Any:
        called.append(op)
        return real(op, backend, *args)

    monkeypatch.setattr(dispatch, "call", call)
    return called


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture",
    [
        {"embed_dim": 32},
        {"embed_dim": 64, "init_values": 0.3},
        {"embed_dim": 64, "act_layer": "gelu_tanh", "class_token": False, "global_pool": "avg"},
    ],
)
def test_a_block_is_seven_kernels(
    architecture: dict[str, Any], tiny_vit: Build, record: list[str]
) -> None:
    sim, net = deployed(tiny_vit(**architecture))
    x = torch.randn(2, 3, 16, 16)
    record.clear()
    y = net(x)
    embedding, *blocks, quantize, head = record
    assert (embedding, quantize, head) == ("dequant_linear", "quantize", GEMM)
    assert blocks == SEVEN * 2
    assert [op for op, _ in net.blocks[0].kernels()] == SEVEN
    assert torch.equal(y, sim(x))
    line = erq.summary(net).splitlines()[-1]
    assert line.startswith("blocks.0 … blocks.1: 7 kernels: layer_norm_quantize (reference) → ")


@pytest.mark.skipif(not _cpu.supported_variants(), reason="the CPU library is not built")
def test_summary_of_a_block_in_one_call(tiny_vit: Build) -> None:
    _, net = deployed(tiny_vit(embed_dim=32))
    set_backend(net, "cpu")
    line = erq.summary(net).splitlines()[-1]
    assert line.startswith("blocks.0 … blocks.1: 7 kernels in one call: layer_norm_quantize (cpu) ")


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "config", "kernels", "reason"),
    [
        # Half on codes, half module by module.
        ({"qk_norm": True}, {}, SEVEN[4:], "attention module by module, since attn.q_norm works"),
        ({"mlp_layer": SwiGLU}, {}, SEVEN[:4], "MLP module by module, since mlp is a SwiGLU"),
        ({"mlp_layer": GluMlp}, {}, SEVEN[:4], "MLP module by module, since mlp is a GluMlp"),
        ({"act_layer": nn.SiLU}, {}, SEVEN[:4], "since mlp.act is a SiLU"),
        (
            {},
            {"keep_float": ["*.qkv"]},
            SEVEN[4:],
            "attention module by module, since attn.qkv has float activations",
        ),
        ({}, {"overrides": {"*.fc2": {"a_bits": 16}}}, SEVEN[:4], "mlp.fc2 has float activations"),
        (
            {},
            {"overrides": {"*.qk": {"a_bits": 8}}},
            [LAYER_NORM, GEMM, "quantize", "quantize", "quantize", ATTENTION, GEMM, *SEVEN[4:]],
            "more than the fewest in the attention half, since q and k have 8 bits, v has 4",
        ),
        # 24 columns are padded to 32.
        (
            {"embed_dim": 24},
            {},
            [LAYER_NORM, GEMM, ATTENTION, "gather", GEMM, LAYER_NORM, GEMM, "gather", GEMM],
            "since attn.proj reads its columns in its own order",
        ),
        (
            {},
            {"attention": "float"},
            [LAYER_NORM, GEMM, "sdpa", "quantize", GEMM, *SEVEN[4:]],
            "8 kernels",
        ),
    ],
)
def test_what_cannot_be_fused_runs_and_says_why(
    architecture: dict[str, Any],
    config: dict[str, Any],
    kernels: list[str],
    reason: str,
    tiny_vit: Build,
) -> None:
    sim, net = deployed(tiny_vit(**{"embed_dim": 32, **architecture}), **config)
    assert [op for op, _ in net.blocks[1].kernels()] == kernels
    assert reason in erq.summary(net)
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(net(x), sim(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (20, 28)])
def test_a_swin_block_is_nine_kernels(
    size: tuple[int, int], tiny_swin: Callable[..., Any], record: list[str]
) -> None:
    sim: Any = erq.quantize(tiny_swin(img_size=size), torch.randn(4, 3, *size), {"refine": "off"})
    net: Any = erq.deploy(sim, backend="reference")
    x = torch.randn(2, 3, *size)
    record.clear()
    y = net(x)
    merging = ["quantize", GEMM]
    assert record == ["dequant_linear", *SEVEN * 2, *merging, *SEVEN * 2, "quantize", GEMM]
    assert torch.equal(y, sim(x))
    nine = [LAYER_NORM, "gather", GEMM, ATTENTION, "gather", *SEVEN[3:]]
    assert [op for op, _ in net.layers[1].blocks[1].kernels()] == nine
    assert "rows of codes are gathered into windows and back" in erq.summary(net)


@torch.no_grad()
def test_a_deployed_swin_is_one_graph(tiny_swin: Callable[..., Any]) -> None:
    model = tiny_swin(img_size=(20, 28))
    net: Any = erq.deploy(erq.quantize(model, torch.randn(4, 3, 20, 28)), backend="reference")
    x = torch.randn(2, 3, 20, 28)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))
    assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


@torch.no_grad()
def test_blocks_without_a_half_on_codes_stay_as_they_were(tiny_vit: Build) -> None:
    sim, net = deployed(tiny_vit(), a_bits=16)
    assert not any(isinstance(m, QuantBlock) for m in net.modules())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(x), sim(x))


@torch.no_grad()
def test_new_values_reach_the_fused_kernels(tiny_vit: Build) -> None:
    _, one = deployed(tiny_vit(embed_dim=32, init_values=0.5))
    _, other = deployed(tiny_vit(embed_dim=32, init_values=0.5))
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_and_scales(dtype: torch.dtype, tiny_vit: Build) -> None:
    _, net = deployed(tiny_vit(embed_dim=32, init_values=0.5), w_bits=8, a_bits=8)
    before = {n: t.clone() for n, t in net.state_dict().items() if "blocks" in n}
    x = torch.randn(2, 3, 16, 16)
    want = net(x)
    net.to(dtype)
    after = {n: t for n, t in net.state_dict().items() if "blocks" in n}
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    got = net(x.to(dtype))
    assert got.dtype == dtype
    # The residual stream is rounded, and codes move by one with it.
    assert (got.float() - want).abs().mean() < 0.1 * want.abs().mean()


def test_masks_are_refused(tiny_vit: Build) -> None:
    _, net = deployed(tiny_vit(embed_dim=32))
    with pytest.raises(ValueError, match="a quantized attention takes no mask"):
        net.blocks[0](torch.randn(1, 17, 32), attn_mask=torch.zeros(17, 17))


def test_activations_by_epilogue() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    names = {nn.GELU(): "gelu", nn.GELU("tanh"): "gelu_tanh", nn.Identity(): "none", Own(): None}
    assert {m: activation_name(m) for m in names} == names

"""A deployed model as a whole: summary, backend, compilation, and swapped layers of any model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import erq
from erq.deployment.modules import QuantLinear
from erq.deployment.network import set_backend, set_layout
from erq.quant import fake_quantize
from erq.quant.fit import fit_weight
from erq_kernels import BackendError, dispatch

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the modules: the definition runs them wherever nothing else is asked."""
    monkeypatch.setenv("ERQ_BACKEND", "reference")


class EncoderBlock(nn.Module):
    """A transformer block as torchvision writes it: nn.MultiheadAttention and a nested MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Dropout(0.0), nn.Linear(32, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Classifier(nn.Module):
    """Tokens → logits, with layers at several depths of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleDict({f"layer_{i}": EncoderBlock(16) for i in range(2)})
        self.heads = nn.Sequential()
        self.heads.add_module("pre_logits", nn.Linear(16, 12, bias=False))
        self.heads.add_module("head", nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layers.values():
            x = layer(x)
        return self.heads(x.mean(dim=1))


LAYERS = [
    "encoder.layers.layer_0.mlp.0",
    "encoder.layers.layer_0.mlp.3",
    "encoder.layers.layer_1.mlp.0",
    "encoder.layers.layer_1.mlp.3",
    "heads.pre_logits",
    "heads.head",
]


def swapped(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]


def round_linears(model: nn.Module, w_bits: int) -> nn.Module:
    """A copy whose nn.Linear weights are rounded in place: what swapped layers must compute."""
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if type(m) is nn.Linear:
            m.weight.data = fake_quantize(m.weight.data, fit_weight(m.weight.data, w_bits))
    return twin


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_swap_every_layer(bits: int) -> None:
    model, x = Classifier().eval(), torch.randn(3, 7, 16)
    expected = round_linears(model, bits)(x)
    assert erq.swap_linears(model, f"w{bits}a16") is model
    assert swapped(model) == LAYERS
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert type(model.encoder.layers["layer_0"].self_attention.out_proj) is not QuantLinear


@torch.no_grad()
def test_swap_in_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 6)
    expected = round_linears(model, 4)(x)
    erq.swap_linears(model)
    assert [type(m) for m in model] == [QuantLinear, nn.ReLU, QuantLinear]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_swap_what_the_filter_takes() -> None:
    seen: dict[str, nn.Linear] = {}

    def keep(path: str, layer: nn.Linear) -> bool:
        seen[path] = layer
        return layer.bias is not None and "layer_1" not in path

    model = Classifier()
    before = {name: model.get_submodule(name) for name in LAYERS}
    erq.swap_linears(model, "w4a16", filter=keep)
    assert seen == before
    assert swapped(model) == [LAYERS[0], LAYERS[1], "heads.head"]
    assert model.get_submodule(LAYERS[2]) is before[LAYERS[2]]


def test_swap_follows_globs() -> None:
    model = Classifier()
    config = {
        "a_bits": 16,
        "w_bits": 8,
        "keep_float": ["heads.*"],
        "overrides": {"*.mlp.3": {"w_bits": 3}},
    }
    erq.swap_linears(model, config)
    bits = {name: model.get_submodule(name).w_bits for name in swapped(model)}
    assert bits == {name: 3 if name.endswith(".3") else 8 for name in LAYERS[:4]}


def test_swap_a_linear_itself() -> None:
    linear = nn.Linear(6, 8)
    layer = erq.swap_linears(linear, "w8a16")
    assert isinstance(layer, QuantLinear) and layer.w_bits == 8
    assert type(linear) is nn.Linear  # cannot become another module in place


@torch.no_grad()
def test_swap_keeps_a_shared_layer_shared() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    model.add_module("nested", nn.Sequential(layer))
    erq.swap_linears(model, {"w_bits": 4, "a_bits": 16, "overrides": {"nested.0": {"w_bits": 2}}})
    assert isinstance(model[0], QuantLinear) and model[0] is model[2]
    assert model.get_submodule("nested.0").w_bits == 2


@pytest.mark.parametrize("training", [True, False])
def test_swap_keeps_mode_and_gradients(training: bool) -> None:
    model = Classifier().train(training)
    erq.swap_linears(model)
    assert {m.training for m in model.modules()} == {training}
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "swinv2_tiny_window8_256", "eva02_tiny_patch14_224"]
)
def test_swap_in_models_that_read_weights_themselves(name: str) -> None:
    """They call F.linear on `qkv.weight`: a swapped layer shows its weight."""
    kwargs: dict[str, Any] = {"img_size": 56, "num_classes": 5}
    if "swin" in name:
        kwargs = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 1, 1, 1)}
    else:
        kwargs |= {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 14}
    model = timm.create_model(name, **kwargs).eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    expected = round_linears(model, 8)(x)
    erq.swap_linears(model, "w8a16")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swap_in_torch_encoder_layer() -> None:
    """In eval mode torch's own layer hands its weights to one fused call."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected = round_linears(model, 8)(x)
    erq.swap_linears(model, "w8a16")
    assert swapped(model) == ["linear1", "linear2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_swap_refuses() -> None:
    def fresh() -> nn.Module:
        return Classifier()

    refused: list[tuple[Any, dict[str, Any], str]] = [
        (fresh(), {"config": "w4a4"}, r"leaves activations float: use a_bits=16 .* got a_bits=4"),
        (
            fresh(),
            {"config": {"a_bits": 16, "overrides": {"*.head": {"a_bits": 8}}}},
            r"got a_bits=8 for heads\.head; quantized activations need erq\.quantize",
        ),
        (nn.Linear(2, 2), {"config": "w4a8"}, r"got a_bits=8 for the layer"),
        (
            fresh(),
            {"config": {"a_bits": 16, "keep_float": ["fc*"]}},
            r"the glob 'fc\*' matches none",
        ),
        (fresh(), {"config": {"a_bits": 16, "keep_float": ["*"]}}, r"no nn\.Linear to swap"),
        (fresh(), {"filter": lambda *_: False}, r"no nn\.Linear to swap in Classifier"),
        (nn.Sequential(nn.ReLU()), {}, r"no nn\.Linear to swap in Sequential"),
        (fresh(), {"config": "w1a16"}, r"w_bits must be an integer from 2 to 8"),
        (torch.randn(2, 2), {}, r"swap_linears takes a torch module, got a Tensor"),
        (None, {}, r"swap_linears takes a torch module, got a NoneType"),
    ]
    for model, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            erq.swap_linears(model, **arguments)
        if isinstance(model, nn.Module):
            assert not swapped(model), "a refused model is left as it was"


def test_summary_has_a_row_per_site(tiny_vit: Build) -> None:
    config = {
        "overrides": {"head": {"a_bits": 16, "w_bits": 3}, "blocks.1.attn.qk": {"a_bits": 8}},
        "keep_float": ["blocks.0.mlp.fc2"],
    }
    sim = erq.quantize(tiny_vit(), torch.randn(4, 3, 16, 16), config)
    net: Any = erq.deploy(sim, backend="reference")
    title, *rows = erq.summary(net).splitlines()
    end = next(i for i, row in enumerate(rows) if row.startswith("total"))
    rows, total, blocks = rows[:end], rows[end], rows[end + 1 :]
    assert [line.split(":")[0] for line in blocks] == ["blocks.0", "blocks.1"]
    assert title.split() == ["site", "weight", "act", "scheme", "kernel", "bytes", "fp32", "bytes"]
    by_name = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(by_name) == [n for n, _ in net.named_modules() if n in by_name]
    assert set(by_name) == {s.name for s in sim.erq_info.sites}
    assert "blocks.0.mlp.fc2" not in by_name
    # 24 × 72 codes of 4 bits, 3 outlier columns, scales and zero points twice, a bias, x's pair.
    size = 24 * 72 // 2 + 3 * 8 + 4 * 4 * 72 + 4 * 72 + 8
    assert by_name["blocks.0.attn.qkv"] == [
        "W4", "72×24", "A4", "dual", "reference", f"{size:,}", f"{4 * 72 * 25:,}",
    ]  # fmt: skip
    assert by_name["head"][:5] == ["W3", "5×24", "A16", "affine", "reference"]
    assert by_name["patch_embed.proj"][:5] == ["W4", "24×48", "A16", "affine", "reference"]
    assert by_name["blocks.1.attn.qk"] == ["A8", "affine", "reference"]
    assert by_name["blocks.1.attn.av"] == ["A4", "log√2", "×", "affine", "reference"]
    sizes = [[int(n.replace(",", "")) for n in r[-2:]] for r in by_name.values() if r[0][0] == "W"]
    packed, full = (sum(column) for column in zip(*sizes, strict=True))
    assert total.split() == ["total", f"{packed:,}", f"{full:,}"]
    assert len({len(row) for row in (title, total)}) == 1


def test_summary_of_swapped_layers() -> None:
    model = erq.swap_linears(Classifier())
    rows = erq.summary(model).splitlines()
    assert [row.split()[0] for row in rows[1:-1]] == LAYERS
    with pytest.raises(ValueError, match=r"the model has no deployed layers: erq\.deploy\(sim\)"):
        erq.summary(Classifier())


def test_backend_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = erq.swap_linears(Classifier())
    with pytest.raises(ValueError, match="unknown backend 'numpy'; choose one of auto, "):
        set_backend(model, "numpy")
    set_backend(model, "reference")
    assert {m.backend for m in model.modules() if isinstance(m, QuantLinear)} == {"reference"}
    monkeypatch.setattr(dispatch, "_kernels", dict(dispatch._kernels))
    dispatch.register("dequant_linear", "cpu", lambda *_: None, lambda *_: "no such instruction")
    with pytest.raises(BackendError, match=r"dequant_linear .*\(cpu: no such instruction\)"):
        set_backend(model, "cpu")


def test_weights_are_kept_unpacked_or_packed(net: Any) -> None:
    images = torch.randn(3, 3, 16, 16)
    layers = [m for m in net.modules() if isinstance(m, QuantLinear) and m.a_bits < 16]
    assert {layer.scheme for layer in layers} == {"dual", "affine"}
    want, unpacked = net(images), [layer.operands.weight.numel() for layer in layers]
    set_layout(net, "packed")
    assert torch.equal(net(images), want)
    for layer, size in zip(layers, unpacked, strict=True):
        assert layer.layout == "packed" and layer.gemm == "qlinear_packed"
        assert layer.operands.weight.numel() == size * layer.w_bits // 8
    assert "qlinear_packed" in erq.summary(net)
    again = copy.deepcopy(net).to("cpu")
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(images), want)
    assert {m.gemm for m in again.modules() if isinstance(m, QuantLinear)} == {"qlinear_packed"}
    set_layout(net, "int8")
    assert [layer.operands.weight.numel() for layer in layers] == unpacked
    with pytest.raises(ValueError, match="weights are kept as one of int8, packed, got 'int4'"):
        set_layout(net, "int4")


@pytest.fixture
def net(tiny_vit: Build) -> Any:
    config = {"overrides": {"head": {"a_bits": 16}, "blocks.0.mlp.fc2": {"a_bits": 8}}}
    sim = erq.quantize(tiny_vit(init_values=1.0, depth=1), torch.randn(4, 3, 16, 16), config)
    return erq.deploy(sim, backend="reference")


@torch.no_grad()
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_network_computes_the_same(compiler: str, net: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 16, 16)
        assert torch.equal(compiled(x), net(x))


@torch.no_grad()
def test_network_on_any_backend_compiles_to_one_graph(tiny_vit: Build) -> None:
    net = erq.deploy(erq.quantize(tiny_vit(embed_dim=32), torch.randn(4, 3, 16, 16)), "auto")
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(compiled(x), net(x))


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_exported_network_computes_the_same(strict: bool, net: Any) -> None:
    x = torch.randn(2, 3, 16, 16)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(net, (x,), dynamic_shapes=(batch,), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    wanted = {"layer_norm_quantize", "qlinear", "qattention", "dequant_linear"}
    assert {f"erq.{op}.default" for op in wanted} <= targets
    for count in (2, 5):
        x = torch.randn(count, 3, 16, 16)
        assert torch.equal(program.module()(x), net(x))

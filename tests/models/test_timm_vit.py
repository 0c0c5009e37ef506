"""The adapter of timm's VisionTransformer: same output prepared, block by block and rebuilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import timm.layers
import torch
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from erq.models import UnsupportedModelError, adapter_for, adapter_named
from erq.models.timm_vit import TimmVit

Build = Callable[..., Any]


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {"cls": partial(timm.create_model, name), **changes}


FAMILY: dict[str, dict[str, Any]] = {
    "vit": named("vit_tiny_patch16_224"),
    "vit without qkv bias": {"qkv_bias": False},
    "vit without any bias": {"qkv_bias": False, "proj_bias": False},
    "deit": named("deit_tiny_patch16_224"),
    "deit distilled": named("deit_tiny_distilled_patch16_224"),
    "deit3": named("deit3_small_patch16_224"),
    "dinov2": named("vit_small_patch14_dinov2", num_classes=5),
    "dinov2 with registers": named("vit_small_patch14_reg4_dinov2", num_classes=5),
    "dinov2 giant, packed SwiGLU": named("vit_giant_patch14_dinov2", num_classes=5),
    "average pooling, no class token": {"global_pool": "avg", "class_token": False},
    "average pooling with the class token": {"global_pool": "avg", "pool_include_prefix": True},
    "average pooling, no fc_norm": {"global_pool": "avg", "fc_norm": False},
    "maximum pooling": {"global_pool": "max"},
    "no pooling": {"global_pool": "", "num_classes": 0},
    "no head": {"num_classes": 0},
    "no final norm": {"final_norm": False},
    "clip": named("vit_base_patch32_clip_224", num_classes=5),
    "clip, quick GELU": named("vit_base_patch32_clip_quickgelu_224", num_classes=5),
    "qk_norm": {"qk_norm": True},
    "norms inside attention and mlp": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU},
    "GluMlp": {"mlp_layer": timm.layers.GluMlp},
    "GluMlp, gate first": {"mlp_layer": partial(timm.layers.GluMlp, gate_last=False)},
    "GELU by tanh": {"act_layer": "gelu_tanh"},
    "torch's GELU by tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "ReLU": {"act_layer": nn.ReLU},
    "RMS norm": {"norm_layer": timm.layers.RmsNorm},
    "another eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "no position embedding": {"pos_embed": "none"},
    "any size": {"dynamic_img_size": True},
    "padded to patches": {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": 16},
    "rectangular, one channel": {"img_size": (8, 20), "in_chans": 1},
    "dropout left in": {"drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
    "odd hidden width": {"mlp_ratio": 45 / 24},
}


def make(build: Build, settings: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    model = build(**settings)
    channels, height, width = TimmVit().input_shape(model)
    return model, torch.randn(3, channels, height or 16, width or 16)


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def case(request: pytest.FixtureRequest, tiny_vit: Build) -> tuple[nn.Module, Tensor]:
    return make(tiny_vit, request.param)


@torch.no_grad()
def run_blocks(model: nn.Module, x: Tensor) -> Tensor:
    adapter = TimmVit()
    for index in range(len(adapter.blocks(model))):
        x = adapter.run_block(model, index, x)
    return x


@torch.no_grad()
def test_output_stays_the_same(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    adapter = adapter_for(model)
    expected = model(x)
    torch.testing.assert_close(run_blocks(model, x), expected, rtol=0, atol=0)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    adapter.prepare(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(run_blocks(model, x), model(x))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@torch.no_grad()
def test_build_of_describe_is_the_same_network(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    adapter = adapter_for(model)
    kwargs = json.loads(json.dumps(adapter.describe(model)))
    twin = adapter_named(adapter.family).build(kwargs).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    assert adapter.describe(twin) == kwargs
    assert adapter.input_shape(twin) == adapter.input_shape(model)


def test_every_site_is_reached_in_order(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    adapter = adapter_for(model)
    adapter.prepare(model)
    sites = [site for block in adapter.blocks(model) for site in block.sites]
    called: list[str] = []
    for site in sites:
        module = model.get_submodule(site.name)
        module.register_forward_hook(lambda *_, name=site.name: called.append(name))
    with torch.no_grad():
        model(x)
    assert called == [site.name for site in sites]
    # Nothing that multiplies by a weight is missed.
    weights = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert weights == {s.name for s in sites if s.kind in ("linear", "conv")}


def test_blocks_are_the_residual_halves(tiny_vit: Build) -> None:
    model = tiny_vit(depth=1)
    TimmVit().prepare(model)
    assert [[(s.name, s.kind, s.norm) for s in b.sites] for b in TimmVit().blocks(model)] == [
        [("patch_embed.proj", "conv", None)],
        [
            ("blocks.0.attn.qkv", "linear", "blocks.0.norm1"),
            ("blocks.0.attn.qk", "matmul_qk", None),
            ("blocks.0.attn.av", "matmul_av", None),
            ("blocks.0.attn.proj", "linear", None),
        ],
        [
            ("blocks.0.mlp.fc1", "linear", "blocks.0.norm2"),
            ("blocks.0.mlp.fc2", "linear", None),
        ],
        [("head", "linear", None)],
    ]


def test_both_gates_share_a_norm_and_rms_norms_are_not_folded(tiny_vit: Build) -> None:
    swiglu = tiny_vit(**FAMILY["SwiGLU"])
    norms = {s.name: s.norm for block in TimmVit().blocks(swiglu) for s in block.sites}
    assert norms["blocks.0.mlp.fc1_g"] == norms["blocks.0.mlp.fc1_x"] == "blocks.0.norm2"
    rms = tiny_vit(**FAMILY["RMS norm"])
    assert {s.norm for b in TimmVit().blocks(rms) for s in b.sites} == {None}


def test_distilled_model_has_two_heads(tiny_vit: Build) -> None:
    model = tiny_vit(VisionTransformerDistilled)
    assert [s.name for s in TimmVit().blocks(model)[-1].sites] == ["head", "head_dist"]


def test_input_shape(tiny_vit: Build) -> None:
    assert TimmVit().input_shape(tiny_vit(img_size=(8, 20), in_chans=1)) == (1, 8, 20)
    assert TimmVit().input_shape(tiny_vit(dynamic_img_size=True)) == (3, None, None)


@torch.no_grad()
def test_a_model_of_any_size_runs_on_another_one(tiny_vit: Build) -> None:
    model = tiny_vit(dynamic_img_size=True)
    x = torch.randn(2, 3, 24, 12)
    expected = model(x)
    TimmVit().prepare(model)
    torch.testing.assert_close(run_blocks(model, x), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_is_refused(tiny_vit: Build) -> None:
    model = tiny_vit()
    TimmVit().prepare(model)
    with pytest.raises(ValueError, match="takes no mask"):
        model.blocks[0].attn(torch.randn(1, 4, 24), is_causal=True)


class _Backbone(nn.Module):
    """A stem for a hybrid patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Subclass(timm_vit.VisionTransformer):
    """Could compute anything."""


class _Adapted(nn.Linear):
    """A linear layer that adds something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def changed(path: str, make_part: Callable[[], Any]) -> Callable[[nn.Module], None]:
    """A change of one part of a model, by its path."""

    def apply(model: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make_part())

    return apply


REFUSED: dict[str, tuple[dict[str, Any], Callable[[nn.Module], None] | None, str]] = {
    "post norm": ({"block_fn": timm_vit.ResPostBlock}, None, r"blocks\.0 is a ResPostBlock"),
    "parallel block": (
        {"block_fn": timm_vit.ParallelScalingBlock},
        None,
        r"blocks\.0 is a ParallelScalingBlock",
    ),
    "attention pooling": ({"global_pool": "map"}, None, r"attn_pool.*attention pooling"),
    "hybrid": (
        {
            "embed_layer": lambda backbone=None, **kw: timm.layers.HybridEmbed(
                _Backbone(), **{k: v for k, v in kw.items() if k != "dynamic_img_pad"}
            ),
            "patch_size": 2,
        },
        None,
        "patch_embed is a HybridEmbed",
    ),
    "gated attention": (
        {},
        changed("blocks.1.attn", lambda: timm.layers.Attention(24, 2, gated=True)),
        r"blocks\.1\.attn\.gate",
    ),
    "another attention": (
        {},
        changed("blocks.1.attn", lambda: nn.MultiheadAttention(24, 2)),
        r"blocks\.1\.attn is a MultiheadAttention",
    ),
    "another mlp": ({}, changed("blocks.1.mlp", nn.Identity), r"blocks\.1\.mlp is a Identity"),
    "a linear layer with something added": (
        {},
        changed("blocks.1.mlp.fc1", lambda: _Adapted(24, 48)),
        r"blocks\.1\.mlp\.fc1 is a _Adapted",
    ),
    "a qkv layer with something added": (
        {},
        changed("blocks.1.attn.qkv", lambda: _Adapted(24, 72)),
        r"blocks\.1\.attn\.qkv is a _Adapted",
    ),
    "another head": (
        {},
        changed("head", lambda: nn.Sequential(nn.Linear(24, 5))),
        "head is a Sequential",
    ),
    "an activation that is not known": (
        {"act_layer": nn.Tanh},
        None,
        r"blocks\.0\.mlp\.act is a Tanh",
    ),
    "blocks with different activations": (
        {},
        changed("blocks.1.mlp.act", nn.ReLU),
        r"blocks\.1\.mlp\.act",
    ),
    "blocks with different heads": (
        {},
        changed("blocks.1.attn.num_heads", lambda: 4),
        r"blocks\.1\.attn",
    ),
    "another temperature": ({}, changed("blocks.1.attn.scale", lambda: 1.0), r"blocks\.1\.attn"),
    "another eps in a block": (
        {},
        changed("blocks.1.norm2.eps", lambda: 1e-2),
        r"blocks\.1\.norm2",
    ),
    "another eps at the end": ({}, changed("norm.eps", lambda: 1e-2), "norm"),
    "another eps in qk_norm": (
        {"qk_norm": True},
        changed("blocks.0.attn.k_norm.eps", lambda: 1e-2),
        r"blocks\.0\.attn\.k_norm",
    ),
    "another gate order": (
        {"mlp_layer": timm.layers.GluMlp},
        changed("blocks.1.mlp.gate_last", lambda: False),
        r"blocks\.1\.mlp",
    ),
    "a norm of another type": (
        {},
        changed("norm", lambda: nn.BatchNorm1d(17)),
        "norm is a BatchNorm1d",
    ),
    "overlapping patches": (
        {},
        changed("patch_embed.proj.stride", lambda: (2, 2)),
        "patches must not overlap",
    ),
    "a part of another width": (
        {},
        changed("blocks.1.mlp", lambda: timm.layers.Mlp(24, 30)),
        r"blocks\.1\.mlp\.fc1",
    ),
    "a norm in the patch embedding": (
        {"embed_norm_layer": nn.LayerNorm},
        None,
        r"patch_embed\.norm",
    ),
    "no blocks": ({"depth": 0}, None, "without transformer blocks"),
}


@pytest.mark.parametrize(("settings", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_named_and_nothing_changes(
    tiny_vit: Build,
    settings: dict[str, Any],
    change: Callable[[nn.Module], None] | None,
    message: str,
) -> None:
    model = tiny_vit(**settings)
    if change is not None:
        change(model)
    modules = {n: (type(m), id(m)) for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for refuse in (adapter_for(model).prepare, adapter_for(model).describe):
        with pytest.raises(UnsupportedModelError, match=message):
            refuse(model)
    assert modules == {n: (type(m), id(m)) for n, m in model.named_modules()}
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: timm.create_model("test_resnet.r160_in1k"), r"cannot quantize a timm\..*ResNet"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), r"cannot quantize a torch\..*Sequential"),
        (lambda: _Subclass(img_size=16, embed_dim=24, depth=1, num_heads=2), "_Subclass"),
    ],
)
def test_other_families_are_refused_by_class(
    make_model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as error:
        adapter_for(make_model())
    assert "swap_linears" in str(error.value)


def test_a_subclass_is_refused_by_the_adapter_itself() -> None:
    with pytest.raises(UnsupportedModelError, match="not subclasses"):
        TimmVit().describe(_Subclass(img_size=16, embed_dim=24, depth=1, num_heads=2))


def test_unknown_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="unknown model family 'bert'"):
        adapter_named("bert")

"""The adapter of timm's SwinTransformer: same output prepared, block by block and rebuilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from erq.models import UnsupportedModelError, adapter_for, adapter_named
from erq.models.timm_swin import TimmSwin

Build = Callable[..., Any]

# Settings, and the size of the images where it is not the model's own.
FAMILY: dict[str, dict[str, Any]] = {
    "shifted windows": {},
    "windows with padding": {"img_size": (20, 28)},
    "padding and odd maps": {"img_size": (18, 22), "window_size": 5},
    "windows as large as the map": {"window_size": 8},
    "windows larger than the map": {"window_size": 9},
    "always partitioned": {"window_size": 7, "always_partition": True},
    "windows per stage": {"window_size": ((4, 2), (2, 4))},
    "a map lower than its windows": {"img_size": (8, 32), "window_size": 7},
    "any size": {"strict_img_size": False, "images": (20, 12)},
    "no qkv bias": {"qkv_bias": False},
    "wider heads": {"head_dim": 24},
    "another mlp ratio": {"mlp_ratio": 1.3},
    "another eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "no head": {"num_classes": 0},
    "no pooling": {"num_classes": 0, "global_pool": ""},
    "maximum pooling": {"global_pool": "max"},
    "one channel": {"in_chans": 1},
    "dropout left in": {"drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
    "swin_tiny": {
        "cls": partial(timm.create_model, "swin_tiny_patch4_window7_224"), "img_size": 224,
        "patch_size": 4, "window_size": 7, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8),
    },
}  # fmt: skip


def make(build: Build, settings: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    settings = dict(settings)
    size = settings.pop("images", None)
    model = build(**settings)
    channels, height, width = TimmSwin().input_shape(model)
    assert (height is None) == (size is not None)
    return model, torch.randn(2, channels, *(size or (height, width)))


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def case(request: pytest.FixtureRequest, tiny_swin: Build) -> tuple[nn.Module, Tensor]:
    return make(tiny_swin, request.param)


@torch.no_grad()
def run_blocks(model: nn.Module, x: Tensor) -> Tensor:
    adapter = TimmSwin()
    for index in range(len(adapter.blocks(model))):
        x = adapter.run_block(model, index, x)
    return x


@torch.no_grad()
def test_output_stays_the_same(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    adapter = adapter_for(model)
    assert isinstance(adapter, TimmSwin)
    expected = model(x)
    assert float(expected.std()) > 1e-3
    parameters = {n: p.clone() for n, p in model.named_parameters()}

    adapter.prepare(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(run_blocks(model, x), model(x))
    now = {n.replace(".windows.", "."): p for n, p in model.named_parameters()}
    assert parameters.keys() == now.keys()
    assert all(torch.equal(p, now[n]) for n, p in parameters.items())


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


def test_norms_of_sites(tiny_swin: Build) -> None:
    model = tiny_swin(depths=(1, 1))
    TimmSwin().prepare(model)
    sites = [s for b in TimmSwin().blocks(model) for s in b.sites]
    assert {s.name: s.norm for s in sites if s.norm} == {
        **{f"layers.{i}.blocks.0.attn.qkv": f"layers.{i}.blocks.0.norm1" for i in (0, 1)},
        **{f"layers.{i}.blocks.0.mlp.fc1": f"layers.{i}.blocks.0.norm2" for i in (0, 1)},
        "layers.1.downsample.reduction": "layers.1.downsample.norm",
    }
    assert [s.name for s in sites if s.merging] == ["layers.1.downsample.reduction"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's interpolation of the tables
@torch.no_grad()
def test_a_resized_model_is_described_as_it_is_now(tiny_swin: Build) -> None:
    model = tiny_swin()
    model.set_input_size((24, 16), window_size=6)
    x = torch.randn(2, 3, 24, 16)
    expected = model(x)
    twin = TimmSwin().build(TimmSwin().describe(model)).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    TimmSwin().prepare(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class _Subclass(SwinTransformer):
    """Could compute anything."""


class _Adapted(nn.Linear):
    """A linear layer that adds something of its own."""


def changed(path: str, make_part: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make_part())

    return apply


BLOCK = "layers.1.blocks.1"
REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "another attention": (
        changed(f"{BLOCK}.attn", lambda: nn.MultiheadAttention(64, 2)),
        r"layers\.1\.blocks\.1\.attn is a MultiheadAttention",
    ),
    "another block": (changed(BLOCK, nn.Identity), r"layers\.1\.blocks\.1 is a Identity"),
    "another merging": (
        changed("layers.1.downsample", lambda: nn.Conv2d(32, 64, 2, 2)),
        r"layers\.1\.downsample is a Conv2d",
    ),
    "a layer with something added": (
        changed(f"{BLOCK}.mlp.fc1", lambda: _Adapted(64, 128)),
        r"mlp\.fc1 is a _Adapted",
    ),
    "another activation": (changed(f"{BLOCK}.mlp.act", nn.ReLU), r"mlp\.act is a ReLU"),
    "a gate in tanh": (
        changed(f"{BLOCK}.mlp.act", lambda: nn.GELU(approximate="tanh")),
        r"mlp\.act",
    ),
    "another norm": (changed(f"{BLOCK}.norm1", nn.Identity), r"norm1 is a Identity"),
    "another eps": (changed(f"{BLOCK}.norm1.eps", lambda: 1e-2), r"blocks\.1\.norm1"),
    "another temperature": (changed(f"{BLOCK}.attn.scale", lambda: 1.0), r"blocks\.1\.attn"),
    "another shift": (changed(f"{BLOCK}.shift_size", lambda: (1, 1)), r"blocks\.1"),
    "another head": (changed("head", lambda: nn.Linear(64, 5)), "head is a Linear"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_named_and_nothing_changes(
    tiny_swin: Build, change: Callable[[nn.Module], None], message: str
) -> None:
    model = tiny_swin()
    change(model)
    modules = {n: (type(m), id(m)) for n, m in model.named_modules()}
    for refuse in (TimmSwin().prepare, TimmSwin().describe):
        with pytest.raises(UnsupportedModelError, match=message):
            refuse(model)
    assert modules == {n: (type(m), id(m)) for n, m in model.named_modules()}


def test_a_subclass_is_refused(tiny_swin: Build) -> None:
    with pytest.raises(UnsupportedModelError, match="not subclasses"):
        TimmSwin().describe(tiny_swin(_Subclass))

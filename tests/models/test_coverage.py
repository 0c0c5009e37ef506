"""Every model that `erq models` lists is quantized, deployed and reloaded to the same output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import erq
from erq.models import UnsupportedModelError, adapter_for, carry_over
from erq.models.coverage import COVERED, REFUSED, Covered


@torch.no_grad()
def randomize(model: Any) -> Any:
    for name, p in model.named_parameters():
        noise = torch.randn_like(p) * (0.2 if p.dim() < 2 else p.shape[-1] ** -0.5)
        is_gain = "norm" in name and name.endswith("weight")
        p.copy_(noise.add(1) if is_gain or "gamma" in name or "lambda1" in name else noise)
    return model.eval()


def make(entry: Covered) -> Any:
    if entry.library == "transformers":
        pytest.importorskip("transformers", minversion="5")
    return randomize(entry.example())


def output(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What a model of any library gives: logits, or the class token."""
    y = model(x)
    if hasattr(y, "logits"):
        return y.logits
    return y.last_hidden_state[:, 0] if hasattr(y, "last_hidden_state") else y


@pytest.mark.parametrize("entry", COVERED, ids=[f"{c.library} {c.names}" for c in COVERED])
@torch.no_grad()
def test_simulated_deployed_and_reloaded_are_equal(entry: Covered, tmp_path: Path) -> None:
    model, x = make(entry), torch.randn(8, 3, 16, 16)
    expected = output(model, x[6:])
    sim = erq.quantize(model, x[:6], "w4a4")
    net = erq.deploy(sim, "reference")
    erq.save(net, tmp_path / "net.safetensors")
    reloaded = erq.load(tmp_path / "net.safetensors", backend="reference")
    got = sim(x[6:])
    bound = 1e-5 * float(got.abs().max())
    assert float(got.std()) > 1e-3
    torch.testing.assert_close(net(x[6:]), got, rtol=0, atol=bound)
    assert torch.equal(reloaded(x[6:]), net(x[6:]))
    assert torch.equal(output(model, x[6:]), expected)  # the model itself is as it was
    # At 8 bits little is lost: the sites are where the network is.
    fine = erq.quantize(model, x[:6], {"w_bits": 8, "a_bits": 8, "attention": "float"})(x[6:])
    assert float((fine - expected).norm() / expected.norm()) < 0.4


@pytest.mark.parametrize("entry", COVERED, ids=[f"{c.library} {c.names}" for c in COVERED])
@torch.no_grad()
def test_prepared_output_is_within_1e_5(entry: Covered) -> None:
    model, x = make(entry), torch.randn(3, 3, 16, 16)
    expected = output(model, x)
    twin: Any = carry_over(model)
    adapter_for(twin).prepare(twin)
    error = (output(twin, x) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-5


NAMED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "swinv2": (
        lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=4),
        r"timm's SwinTransformerV2: cosine attention",
    ),
    "eva02": (
        lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28),
        r"timm's Eva: rotary position embeddings",
    ),
    "dinov3": (
        lambda: timm.create_model("vit_small_patch16_dinov3", img_size=32),
        r"timm's Eva: rotary position embeddings",
    ),
    "siglip": (
        lambda: timm.create_model("vit_base_patch32_siglip_256", img_size=32, depth=1),
        "attention pooling is not understood",
    ),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", depth=1), "timm's Beit: its"),
    "features_only": (
        lambda: timm.create_model("vit_tiny_patch16_224", features_only=True),
        "FeatureGetterNet",
    ),
}


@pytest.mark.parametrize(("build", "message"), NAMED.values(), ids=NAMED.keys())
def test_what_is_not_covered_is_refused_by_name(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model = build()
        adapter_for(model).describe(model)


def test_transformers_are_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    vit = transformers.ViTConfig(**small, patch_size=4, intermediate_size=64)
    dino = transformers.Dinov2Config(**small, patch_size=4)
    swiglu = transformers.Dinov2Config(**small, patch_size=4, use_swiglu_ffn=True)
    for model, message in (
        (transformers.ViTModel(vit), "ViTModel.pooler is no part of timm's network"),
        (transformers.Dinov2ForImageClassification(dino), "quantize model.dinov2"),
        (transformers.Dinov2Model(swiglu), "use_swiglu_ffn is not understood"),
        (transformers.ViTForMaskedImageModeling(vit), "understood are ViTForImageClassification"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            carry_over(model)


def test_a_twin_that_gives_something_else_is_refused() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    entry = next(c for c in COVERED if c.names == "Dinov2Model")
    model = make(entry)
    model.config.layer_norm_eps = 0.1  # not what its norms were made with
    with pytest.raises(UnsupportedModelError, match="something else than its timm twin"):
        carry_over(model)
    assert transformers.__version__


def test_the_table_says_why_of_every_refusal() -> None:
    assert all(len(r.why) > 10 and r.names for r in REFUSED)
    assert len({(c.library, c.names) for c in COVERED}) == len(COVERED)

"""Which models are covered: the table that `erq models` prints and the tests run through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Covered:
    """Models that are quantized, with a small one of their kind.

    Args:
        library: where they come from. names: as users know them.
        what: what is particular about them, and what the tests show of it.
        example: makes a small model with random weights that takes images of 16×16 (a Hugging Face
            one by way of transformers).
    """

    library: str
    names: str
    what: str
    example: Callable[[], nn.Module]


@dataclass(frozen=True)
class Refused:
    """Models that are refused by name, and why."""

    library: str
    names: str
    why: str


def _timm_vit(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(**_VIT | changes)
    return model


def _timm_distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    model: nn.Module = VisionTransformerDistilled(**_VIT)
    return model


def _timm_swin(**changes: Any) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    settings: dict[str, Any] = {
        "img_size": 16, "patch_size": 2, "num_classes": 5, "embed_dim": 32, "depths": (2, 2),
        "num_heads": (2, 4), "window_size": 4, "mlp_ratio": 2.0,
    }  # fmt: skip
    model: nn.Module = SwinTransformer(**settings | changes)
    return model


def _torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(  # type: ignore[no-any-return]
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=5,
    )  # fmt: skip


def _transformers(name: str, **changes: Any) -> nn.Module:
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "num_labels": 5,
    }  # fmt: skip
    if name.startswith("Dinov2"):
        config: Any = transformers.Dinov2Config(**settings, mlp_ratio=2)
    else:
        config = transformers.ViTConfig(**settings, intermediate_size=64)
    return getattr(transformers, name)(config, **changes)  # type: ignore[no-any-return]


_VIT: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "mlp_ratio": 2.0,
}  # fmt: skip

COVERED: tuple[Covered, ...] = (
    Covered("timm", "vit_*", "class token", _timm_vit),
    Covered("timm", "deit_*", "class token", _timm_vit),
    Covered("timm", "deit_*_distilled_*", "two heads", _timm_distilled),
    Covered(
        "timm",
        "deit3_*",
        "LayerScale, no position for the class token",
        partial(_timm_vit, no_embed_class=True, init_values=0.5),
    ),
    Covered("timm", "vit_*_dinov2", "LayerScale, no head", partial(_timm_vit, init_values=0.5)),
    Covered(
        "timm",
        "vit_*_reg4_dinov2",
        "register tokens, images of any size",
        partial(
            _timm_vit, reg_tokens=4, init_values=0.5, no_embed_class=True, dynamic_img_size=True
        ),
    ),
    Covered(
        "timm",
        "vit_*_siglip_gap_*, vit_*_gap_*",
        "average pooling",
        partial(_timm_vit, global_pool="avg", class_token=False),
    ),
    Covered(
        "timm",
        "vit_*_clip_*",
        "norm before the blocks, quick GELU in some",
        partial(_timm_vit, pre_norm=True, act_layer="quick_gelu"),
    ),
    Covered("timm", "vit_* with qk_norm", "norms on q and k", partial(_timm_vit, qk_norm=True)),
    Covered(
        "timm",
        "num_classes=0",
        "a backbone: the pooled features",
        partial(_timm_vit, num_classes=0),
    ),
    Covered("timm", "swin_*, swin_s3_*", "shifted windows, patch merging", _timm_swin),
    Covered("timm", "swin_* at odd sizes", "padded windows", partial(_timm_swin, window_size=3)),
    Covered(
        "torchvision",
        "vit_b_16, vit_b_32, vit_l_*, vit_h_14",
        "nn.MultiheadAttention",
        _torchvision_vit,
    ),
    Covered(
        "transformers",
        "ViTForImageClassification",
        "carried over to timm, checked on an image",
        partial(_transformers, "ViTForImageClassification"),
    ),
    Covered(
        "transformers",
        "ViTModel (add_pooling_layer=False)",
        "the normed class token",
        partial(_transformers, "ViTModel", add_pooling_layer=False),
    ),
    Covered(
        "transformers",
        "Dinov2Model",
        "the normed class token",
        partial(_transformers, "Dinov2Model"),
    ),
)

REFUSED: tuple[Refused, ...] = (
    Refused("timm", "swinv2_*", "cosine attention: every head has its own temperature"),
    Refused(
        "timm", "eva02_*, vit_*_dinov3", "rotary position embeddings between qkv and attention"
    ),
    Refused("timm", "vit_*_siglip_* (not gap)", "attention pooling"),
    Refused("timm", "beit*", "relative position bias with separate q and v biases"),
    Refused("timm", "features_only=True", "use num_classes=0: intermediate maps are not carried"),
    Refused("timm", "hybrids, parallel and post-norm blocks", "their blocks are other ones"),
    Refused("transformers", "Dinov2ForImageClassification", "its head joins class token and mean"),
    Refused("any", "other models", "erq.swap_linears makes their linear layers weight-only"),
)

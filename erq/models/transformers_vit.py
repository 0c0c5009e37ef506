"""Hugging Face ViT and DINOv2 carried over to timm's VisionTransformer, weight by weight.

The result computes the same: that is checked on an image. It needs no transformers any more, and
neither does what is quantized, packed and deployed from it. Names are those of transformers 5.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from erq.models.sites import UnsupportedModelError

_TOLERANCE = 1e-4
_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
# transformers' class → prefix of its encoder's parameters.
_CLASSES = {
    "ViTForImageClassification": "vit.",
    "ViTModel": "",
    "Dinov2Model": "",
}
_REFUSED = {
    "Dinov2ForImageClassification": "its head reads the class token joined with the mean of the "
    "patches, which timm has no pooling for: quantize model.dinov2 and keep the head",
    "Dinov2WithRegistersModel": "use timm's vit_*_reg4_dinov2, the same network",
}
_RENAMED = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:layers|encoder\.layer)\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.(?:layernorm_before|norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|norm2)\.", ".norm2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)


def is_transformers(model: Any) -> bool:
    """Whether `model` is one of Hugging Face transformers' vision models."""
    return type(model).__module__.startswith(
        ("transformers.models.vit.", "transformers.models.dinov2")
    )


def to_timm(model: Any) -> nn.Module:
    """timm's VisionTransformer that computes what `model` does.

    Args:
        model: ViTForImageClassification (logits), ViTModel or Dinov2Model (the normed class token).

    Raises:
        UnsupportedModelError: another class, a setting that timm does not have, or another output.
    """
    from timm.models.vision_transformer import VisionTransformer

    name = type(model).__name__
    if name not in _CLASSES:
        reason = _REFUSED.get(name, f"understood are {', '.join(_CLASSES)}")
        raise UnsupportedModelError(f"transformers' {name}: {reason}")
    if getattr(model, "pooler", None) is not None:
        raise UnsupportedModelError(
            f"{name}.pooler is no part of timm's network: create the model with "
            "add_pooling_layer=False"
        )
    config = model.config
    if config.hidden_act not in _ACTS:
        raise UnsupportedModelError(f"{name}: hidden_act {config.hidden_act!r} is not understood")
    if getattr(config, "use_swiglu_ffn", False):
        raise UnsupportedModelError(f"{name}: use_swiglu_ffn is not understood; use timm's model")
    prefix = _CLASSES[name]
    state = model.state_dict()
    renamed = _rename({k.removeprefix(prefix): v for k, v in state.items()})
    head = state.get("classifier.weight")
    width = renamed["blocks.0.mlp.fc1.weight"].shape[0]
    tanh = ("gelu_new", "gelu_pytorch_tanh")
    image = _pair(config.image_size)
    result: Any = VisionTransformer(
        img_size=image,
        patch_size=_pair(config.patch_size),
        in_chans=config.num_channels,
        num_classes=0 if head is None else len(head),
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(width + 0.5) / config.hidden_size,
        qkv_bias="blocks.0.attn.qkv.bias" in renamed,
        init_values=1.0 if "blocks.0.ls1.gamma" in renamed else None,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer="gelu_tanh" if config.hidden_act in tanh else config.hidden_act,
    )
    try:
        result.load_state_dict(renamed)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"transformers' {name} has other parameters than its timm twin: "
            f"{' '.join(str(error).split())}"
        ) from error
    result.eval().to(next(model.parameters()).device)
    _check_output(model, result, image)
    return result  # type: ignore[no-any-return]


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's parameters, q, k and v joined."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "embeddings.mask_token" or ".attention.k_proj." in name:
            continue
        if ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            name, value = name.replace(".attention.q_proj.", ".attn.qkv."), torch.cat(parts)
        name = re.sub(r"^classifier\.", "head.", name)
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


@torch.no_grad()
def _check_output(model: nn.Module, twin: Any, image: tuple[int, int]) -> None:
    """Raise UnsupportedModelError unless both give the same for an image."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, twin.patch_embed.proj.in_channels, *image, generator=generator)
    x = x.to(parameter.device, parameter.dtype)
    training = model.training
    output: Any = model.eval()(pixel_values=x)
    model.train(training)
    want = output.logits if hasattr(output, "logits") else output.last_hidden_state[:, 0]
    got = twin(x.to(next(twin.parameters()).dtype))
    error = float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
    if not error <= _TOLERANCE:
        raise UnsupportedModelError(
            f"transformers' {type(model).__name__} gives something else than its timm twin "
            f"(relative difference {error:.1e}): its settings are not understood"
        )


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)

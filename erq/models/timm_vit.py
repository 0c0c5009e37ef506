"""Adapter for timm's VisionTransformer: vit_*, deit_* (distilled too), deit3_*, DINOv2."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.layers
import torch
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from erq.models.attention import Attention
from erq.models.sites import Block, Site, UnsupportedModelError
from erq.models.structure import (
    ACTS,
    NORMS,
    act_name,
    check_patches,
    check_twin,
    foldable,
    is_head,
    require,
)

_MLPS: dict[type[nn.Module], str] = {
    timm.layers.Mlp: "mlp",
    timm.layers.GluMlp: "glu",
    timm.layers.SwiGLU: "swiglu",
}
_ATTENTIONS = (timm.layers.Attention, getattr(timm_vit, "Attention", timm.layers.Attention))


class TimmVit:
    """timm VisionTransformer and VisionTransformerDistilled."""

    family = "timm_vit"
    raw_sites = True

    def matches(self, model: Any) -> bool:
        """Whether `model` is of exactly one of the classes this adapter knows."""
        return type(model) in (timm_vit.VisionTransformer, VisionTransformerDistilled)

    def prepare(self, model: Any) -> None:
        """Replace every block's attention; see `ModelAdapter.prepare`."""
        self.describe(model)  # refuses what it does not understand before anything changes
        for block in model.blocks:
            block.attn = Attention.from_timm(block.attn)

    def blocks(self, model: Any) -> list[Block]:
        """Embedding, each block's attention and MLP halves, head; see `ModelAdapter.blocks`."""
        out = [Block("patch_embed", (Site("patch_embed.proj", "conv"),))]
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}"
            norm1 = foldable(block.norm1, f"{name}.norm1")
            norm2 = foldable(block.norm2, f"{name}.norm2")
            mlp = [
                Site(f"{name}.mlp.{n}", "linear", norm2)
                for n in ("fc1_g", "fc1_x", "fc1")
                if hasattr(block.mlp, n)
            ]
            attention = (
                Site(f"{name}.attn.qkv", "linear", norm1),
                Site(f"{name}.attn.qk", "matmul_qk"),
                Site(f"{name}.attn.av", "matmul_av"),
                Site(f"{name}.attn.proj", "linear"),
            )
            out.append(Block(f"{name}.attn", attention))
            hidden = isinstance(getattr(block.mlp, "norm", None) or nn.Identity(), nn.Identity)
            fc2 = Site(f"{name}.mlp.fc2", "linear", hidden=hidden)
            out.append(Block(f"{name}.mlp", (*mlp, fc2)))
        heads = [n for n in ("head", "head_dist") if is_head(getattr(model, n, None))]
        out.append(Block("head", tuple(Site(n, "linear") for n in heads)))
        return out

    def run_block(self, model: Any, index: int, x: Tensor) -> Tensor:
        """One block of the model; see `ModelAdapter.run_block`."""
        if index == 0:
            x = model._pos_embed(model.patch_embed(x))
            x = model.norm_pre(model.patch_drop(x))
        elif index <= 2 * len(model.blocks):
            block = model.blocks[(index - 1) // 2]
            if index % 2:
                x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            else:
                x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        else:
            x = model.forward_head(model.norm(x))
        return x

    def pre_norm_blocks(self, model: Any) -> list[str]:
        """Every transformer block; see `ModelAdapter.pre_norm_blocks`."""
        return [f"blocks.{i}" for i in range(len(model.blocks))]

    def input_shape(self, model: Any) -> tuple[int, int | None, int | None]:
        """(channels, height, width); see `ModelAdapter.input_shape`."""
        channels = int(model.patch_embed.proj.in_channels)
        size = model.patch_embed.img_size
        if model.dynamic_img_size or size is None:
            return channels, None, None
        return channels, int(size[0]), int(size[1])

    def describe(self, model: Any) -> dict[str, Any]:
        """Constructor arguments of the model; see `ModelAdapter.describe`.

        Raises:
            UnsupportedModelError: a part that is not understood, by its path.
        """
        if not self.matches(model):
            raise UnsupportedModelError(
                f"{type(model).__name__}: only timm's VisionTransformer and "
                "VisionTransformerDistilled themselves are understood, not subclasses"
            )
        _check_structure(model)
        block = model.blocks[0]
        embed = model.patch_embed
        linear_mlp = block.mlp.fc1_g if hasattr(block.mlp, "fc1_g") else block.mlp.fc1
        dim = int(model.embed_dim)
        norm = _first_norm(model)
        kwargs: dict[str, Any] = {
            "distilled": type(model) is VisionTransformerDistilled,
            "img_size": None if embed.img_size is None else [int(s) for s in embed.img_size],
            "patch_size": [int(s) for s in embed.patch_size],
            "in_chans": self.input_shape(model)[0],
            "num_classes": int(model.head.out_features) if is_head(model.head) else 0,
            "global_pool": model.global_pool,
            "embed_dim": dim,
            "depth": len(model.blocks),
            "num_heads": int(block.attn.num_heads),
            "mlp_hidden": int(linear_mlp.out_features),
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "scale_attn_norm": not isinstance(
                getattr(block.attn, "norm", nn.Identity()), nn.Identity
            ),
            "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
            "proj_bias": block.attn.proj.bias is not None,
            "layer_scale": not isinstance(block.ls1, nn.Identity),
            "class_token": bool(model.has_class_token),
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "no_embed_class": bool(model.no_embed_class),
            "reg_tokens": int(model.num_reg_tokens),
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "patch_bias": embed.proj.bias is not None,
            "final_norm": not isinstance(model.norm, nn.Identity)
            or not isinstance(model.fc_norm, nn.Identity),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": bool(getattr(model, "pool_include_prefix", False)),
            "dynamic_img_size": bool(model.dynamic_img_size),
            "dynamic_img_pad": bool(embed.dynamic_img_pad),
            "norm": type(norm).__name__,
            "norm_eps": float(norm.eps),
            "mlp": _MLPS[type(block.mlp)],
            "gate_last": bool(getattr(block.mlp, "gate_last", True)),
            "act": act_name(block.mlp.act),
        }
        with torch.device("meta"):
            twin = self.build(kwargs)
        check_twin(model, twin)
        return kwargs

    def build(self, kwargs: dict[str, Any]) -> nn.Module:
        """A float model of `describe`'s architecture; see `ModelAdapter.build`."""
        k = dict(kwargs)
        cls = VisionTransformerDistilled if k.pop("distilled") else timm_vit.VisionTransformer
        mlp_name, gate_last = k.pop("mlp"), k.pop("gate_last")
        mlp = {v: key for key, v in _MLPS.items()}[mlp_name]
        if mlp_name == "glu":
            mlp = partial(mlp, gate_last=gate_last)  # type: ignore[assignment]
        hidden = k.pop("mlp_hidden")
        has_layer_scale = k.pop("layer_scale")
        patch_bias = k.pop("patch_bias")
        optional = {
            name: k.pop(name)
            for name in ("scale_attn_norm", "scale_mlp_norm", "pool_include_prefix")
        }
        k.update({name: value for name, value in optional.items() if value})
        norm_name, eps, act = k.pop("norm"), k.pop("norm_eps"), k.pop("act")
        norm_class = next(c for c in NORMS if c.__name__ == norm_name)
        size = k.pop("img_size")
        model: Any = cls(
            **k,
            img_size=None if size is None else tuple(size),
            norm_layer=partial(norm_class, eps=eps),
            act_layer=act,
            mlp_layer=mlp,
            mlp_ratio=(hidden + 0.5) / k["embed_dim"],
            init_values=1.0 if has_layer_scale else None,
        )
        if patch_bias != (model.patch_embed.proj.bias is not None):
            proj = model.patch_embed.proj
            bias = nn.Parameter(torch.zeros(proj.out_channels)) if patch_bias else None
            proj.register_parameter("bias", bias)
        built: nn.Module = model
        return built


def _first_norm(model: Any) -> Any:
    return model.blocks[0].norm1


def _check_structure(model: Any) -> None:
    """Raise UnsupportedModelError at the first part that is not understood."""
    if not len(model.blocks):
        raise UnsupportedModelError("a model without transformer blocks")
    if model.attn_pool is not None:
        raise UnsupportedModelError(
            f"attn_pool ({type(model.attn_pool).__name__}): attention pooling is not understood"
        )
    require(model.patch_embed, (timm.layers.PatchEmbed,), "patch_embed")
    check_patches(model.patch_embed.proj, "patch_embed.proj")
    require(model.blocks[0], (timm_vit.Block,), "blocks.0")
    norms = NORMS
    norm = _first_norm(model)
    identity = (nn.Identity,)
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        require(block, (timm_vit.Block,), name)
        require(block.attn, _ATTENTIONS, f"{name}.attn")
        if getattr(block.attn, "gate", None) is not None:
            raise UnsupportedModelError(f"{name}.attn.gate: gated attention is not understood")
        require(block.mlp, tuple(_MLPS), f"{name}.mlp")
        require(block.mlp.act, tuple(ACTS), f"{name}.mlp.act")
        for part in ("norm1", "norm2"):
            require(getattr(block, part), norms, f"{name}.{part}")
            if getattr(block, part).eps != norm.eps:
                raise UnsupportedModelError(f"{name}.{part}: eps differs from blocks.0.norm1")
        for part in ("ls1", "ls2"):
            require(getattr(block, part), (*identity, timm.layers.LayerScale), f"{name}.{part}")
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"):
            owner, _, leaf = part.partition(".")
            if hasattr(getattr(block, owner), leaf):
                require(block.get_submodule(part), (nn.Linear,), f"{name}.{part}")
        for part in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm"):
            owner, _, leaf = part.partition(".")
            if hasattr(getattr(block, owner), leaf):
                require(block.get_submodule(part), norms + identity, f"{name}.{part}")
    for part in ("norm", "fc_norm", "norm_pre"):
        require(getattr(model, part), norms + identity, part)
    for part in ("head", "head_dist"):
        if hasattr(model, part):
            require(getattr(model, part), (nn.Linear, nn.Identity), part)

"""Adapter for timm's SwinTransformer: swin_*, swin_s3_*."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm.layers
import torch
from timm.models import swin_transformer as timm_swin
from torch import Tensor, nn

from erq.models.attention import Attention
from erq.models.residual import ResidualBlock, block_halves, run_half
from erq.models.sites import Block, Site, UnsupportedModelError
from erq.models.structure import check_patches, check_twin, foldable, is_head, require
from erq.models.windows import Windows

_NORMS = (nn.LayerNorm, timm.layers.LayerNorm)
_GELU = (nn.GELU, timm.layers.GELU)


class TimmSwin:
    """timm SwinTransformer; its blocks become `ResidualBlock` with windows as index arithmetic."""

    family = "timm_swin"
    raw_sites = False  # padding of windows goes through timm's `proj`

    def matches(self, model: Any) -> bool:
        """Whether `model` is of exactly the class this adapter knows."""
        return type(model) is timm_swin.SwinTransformer

    def prepare(self, model: Any) -> None:
        """Replace every block; see `ModelAdapter.prepare`."""
        self.describe(model)  # refuses what it does not understand before anything changes
        for stage in model.layers:
            for i, block in enumerate(stage.blocks):
                windows = Windows(
                    block.attn.relative_position_bias_table,
                    int(block.attn.qkv.in_features),
                    _pair(block.input_resolution),
                    _pair(block.window_size),
                    _pair(block.shift_size),
                    fixed=not block.dynamic_mask,
                )
                attn = Attention.from_timm(block.attn, windows)
                stage.blocks[i] = ResidualBlock(block.norm1, attn, block.norm2, block.mlp)

    def blocks(self, model: Any) -> list[Block]:
        """Embedding; each stage's merging and its blocks' halves; head."""
        out = [Block("patch_embed", (Site("patch_embed.proj", "conv"),))]
        for name, part in _parts(model):
            if isinstance(part, timm_swin.PatchMerging):
                norm = foldable(part.norm, f"{name}.norm")
                out.append(Block(name, (Site(f"{name}.reduction", "linear", norm, merging=True),)))
                continue
            out += block_halves(part, name)
        head = (Site("head.fc", "linear"),) if is_head(model.head.fc) else ()
        out.append(Block("head", head))
        return out

    def run_block(self, model: Any, index: int, x: Tensor) -> Tensor:
        """One block of a prepared model, maps [B, H, W, C] between them."""
        if index == 0:
            return model.patch_embed(x)  # type: ignore[no-any-return]
        index -= 1
        for _, part in _parts(model):
            halves = 1 if isinstance(part, timm_swin.PatchMerging) else 2
            if index < halves:
                return run_half(part, index, x) if halves == 2 else part(x)
            index -= halves
        return model.forward_head(model.norm(x))  # type: ignore[no-any-return]

    def pre_norm_blocks(self, model: Any) -> list[str]:
        """Every transformer block; see `ModelAdapter.pre_norm_blocks`."""
        return [
            name for name, part in _parts(model) if not isinstance(part, timm_swin.PatchMerging)
        ]

    def input_shape(self, model: Any) -> tuple[int, int | None, int | None]:
        """(channels, height, width); see `ModelAdapter.input_shape`."""
        channels = int(model.patch_embed.proj.in_channels)
        if not model.patch_embed.strict_img_size:
            return channels, None, None
        height, width = model.patch_embed.img_size
        return channels, int(height), int(width)

    def describe(self, model: Any) -> dict[str, Any]:
        """Constructor arguments of the model; see `ModelAdapter.describe`.

        Raises:
            UnsupportedModelError: a part that is not understood, by its path.
        """
        if not self.matches(model):
            raise UnsupportedModelError(
                f"{type(model).__name__}: only timm's SwinTransformer itself is understood, not "
                "subclasses"
            )
        _check_structure(model)
        first = [stage.blocks[0] for stage in model.layers]
        embed = model.patch_embed
        kwargs: dict[str, Any] = {
            "img_size": [int(s) for s in embed.img_size],
            "patch_size": [int(s) for s in embed.patch_size],
            "in_chans": self.input_shape(model)[0],
            "num_classes": int(model.head.fc.out_features) if is_head(model.head.fc) else 0,
            "global_pool": model.head.global_pool.pool_type,
            "embed_dim": int(embed.proj.out_channels),
            "depths": [len(stage.blocks) for stage in model.layers],
            "num_heads": [int(b.attn.num_heads) for b in first],
            "head_dim": [
                int(b.attn.qkv.out_features) // (3 * int(b.attn.num_heads)) for b in first
            ],
            "window_size": [list(_pair(b.window_size)) for b in first],
            "always_partition": bool(first[0].always_partition),
            "strict_img_size": bool(embed.strict_img_size),
            "mlp_hidden": [int(b.mlp.fc1.out_features) for b in first],
            "qkv_bias": first[0].attn.qkv.bias is not None,
            "patch_bias": embed.proj.bias is not None,
            "norm_eps": float(first[0].norm1.eps),
        }
        with torch.device("meta"):
            twin = self.build(kwargs)
        check_twin(model, twin)
        return kwargs

    def build(self, kwargs: dict[str, Any]) -> nn.Module:
        """A float model of `describe`'s architecture; see `ModelAdapter.build`."""
        k = dict(kwargs)
        dim, hidden, patch_bias = k["embed_dim"], k.pop("mlp_hidden"), k.pop("patch_bias")
        widths = [dim * 2**i for i in range(len(hidden))]
        model: Any = timm_swin.SwinTransformer(
            **k
            | {
                "img_size": tuple(k["img_size"]),
                "patch_size": tuple(k["patch_size"]),
                "depths": tuple(k["depths"]),
                "num_heads": tuple(k["num_heads"]),
                "head_dim": tuple(k["head_dim"]),
                "window_size": [tuple(w) for w in k["window_size"]],
                "mlp_ratio": tuple((h + 0.5) / w for h, w in zip(hidden, widths, strict=True)),
                "norm_layer": partial(nn.LayerNorm, eps=k.pop("norm_eps")),
            }
        )
        if not patch_bias:
            model.patch_embed.proj.register_parameter("bias", None)
        return model  # type: ignore[no-any-return]


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _parts(model: Any) -> list[tuple[str, Any]]:
    """Mergings and blocks with their paths, in forward order."""
    parts: list[tuple[str, Any]] = []
    for i, stage in enumerate(model.layers):
        if isinstance(stage.downsample, timm_swin.PatchMerging):
            parts.append((f"layers.{i}.downsample", stage.downsample))
        parts += [(f"layers.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
    return parts


def _check_structure(model: Any) -> None:
    """Raise UnsupportedModelError at the first part that is not understood."""
    require(model.patch_embed, (timm.layers.PatchEmbed,), "patch_embed")
    check_patches(model.patch_embed.proj, "patch_embed.proj")
    require(model.patch_embed.norm, _NORMS, "patch_embed.norm")
    require(model.norm, _NORMS, "norm")
    require(model.head, (timm.layers.ClassifierHead,), "head")
    require(model.head.fc, (nn.Linear, nn.Identity), "head.fc")
    for i, stage in enumerate(model.layers):
        require(stage, (timm_swin.SwinTransformerStage,), f"layers.{i}")
        require(stage.downsample, (timm_swin.PatchMerging, nn.Identity), f"layers.{i}.downsample")
        if not len(stage.blocks):
            raise UnsupportedModelError(f"layers.{i} has no blocks")
    for name, part in _parts(model):
        if isinstance(part, timm_swin.PatchMerging):
            require(part.norm, _NORMS, f"{name}.norm")
            require(part.reduction, (nn.Linear,), f"{name}.reduction")
            continue
        require(part, (timm_swin.SwinTransformerBlock,), name)
        require(part.attn, (timm_swin.WindowAttention,), f"{name}.attn")
        require(part.mlp, (timm.layers.Mlp,), f"{name}.mlp")
        require(part.mlp.act, _GELU, f"{name}.mlp.act")
        require(part.mlp.norm, (nn.Identity,), f"{name}.mlp.norm")
        for leaf in ("norm1", "norm2"):
            require(getattr(part, leaf), _NORMS, f"{name}.{leaf}")
        for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            require(part.get_submodule(leaf), (nn.Linear,), f"{name}.{leaf}")

"""Adapter for torchvision's VisionTransformer: vit_b_16 and its like."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vision_transformer as torchvision_vit

from erq.models.attention import Attention
from erq.models.residual import Mlp, ResidualBlock, block_halves, run_half
from erq.models.sites import Block, Site, UnsupportedModelError
from erq.models.structure import check_multihead, check_patches, check_twin, require


class TorchvisionVit:
    """torchvision VisionTransformer; its `nn.MultiheadAttention` becomes `Attention`."""

    family = "torchvision_vit"
    raw_sites = False  # MultiheadAttention has no layer for q, k and v

    def matches(self, model: Any) -> bool:
        """Whether `model` is of exactly the class this adapter knows."""
        return type(model) is torchvision_vit.VisionTransformer

    def prepare(self, model: Any) -> None:
        """Replace every block; see `ModelAdapter.prepare`."""
        self.describe(model)  # refuses what it does not understand before anything changes
        for name, block in list(model.encoder.layers.named_children()):
            attn = Attention.from_multihead(block.self_attention)
            mlp = Mlp(block.mlp[0], block.mlp[1], block.mlp[3])
            setattr(model.encoder.layers, name, ResidualBlock(block.ln_1, attn, block.ln_2, mlp))

    def blocks(self, model: Any) -> list[Block]:
        """Embedding, each block's attention and MLP halves, head; see `ModelAdapter.blocks`."""
        out = [Block("conv_proj", (Site("conv_proj", "conv"),))]
        for name in self.pre_norm_blocks(model):
            out += block_halves(model.get_submodule(name), name)
        heads = [n for n, m in model.heads.named_children() if isinstance(m, nn.Linear)]
        out.append(Block("heads", tuple(Site(f"heads.{n}", "linear") for n in heads)))
        return out

    def run_block(self, model: Any, index: int, x: Tensor) -> Tensor:
        """One block of a prepared model; see `ModelAdapter.run_block`."""
        layers = model.encoder.layers
        if index == 0:
            x = model._process_input(x)
            token = model.class_token.expand(len(x), -1, -1)
            return torch.cat([token, x], dim=1) + model.encoder.pos_embedding  # type: ignore[no-any-return]
        if index > 2 * len(layers):
            return model.heads(model.encoder.ln(x)[:, 0])  # type: ignore[no-any-return]
        return run_half(layers[(index - 1) // 2], (index - 1) % 2, x)

    def pre_norm_blocks(self, model: Any) -> list[str]:
        """Every transformer block; see `ModelAdapter.pre_norm_blocks`."""
        return [f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children()]

    def input_shape(self, model: Any) -> tuple[int, int | None, int | None]:
        """(channels, height, width); see `ModelAdapter.input_shape`."""
        return int(model.conv_proj.in_channels), int(model.image_size), int(model.image_size)

    def describe(self, model: Any) -> dict[str, Any]:
        """Constructor arguments of the model; see `ModelAdapter.describe`.

        Raises:
            UnsupportedModelError: a part that is not understood, by its path.
        """
        if not self.matches(model):
            raise UnsupportedModelError(
                f"{type(model).__name__}: only torchvision's VisionTransformer itself is "
                "understood, not subclasses"
            )
        _check_structure(model)
        first = next(iter(model.encoder.layers.children()))
        pre_logits = getattr(model.heads, "pre_logits", None)
        kwargs: dict[str, Any] = {
            "image_size": int(model.image_size),
            "patch_size": int(model.patch_size),
            "depth": len(model.encoder.layers),
            "num_heads": int(first.self_attention.num_heads),
            "hidden_dim": int(model.hidden_dim),
            "mlp_dim": int(first.mlp[0].out_features),
            "num_classes": int(model.heads[-1].out_features),
            "representation_size": None if pre_logits is None else int(pre_logits.out_features),
            "norm_eps": float(first.ln_1.eps),
        }
        with torch.device("meta"):
            twin = self.build(kwargs)
        check_twin(model, twin)
        return kwargs

    def build(self, kwargs: dict[str, Any]) -> nn.Module:
        """A float model of `describe`'s architecture; see `ModelAdapter.build`."""
        k = dict(kwargs)
        norm = partial(nn.LayerNorm, eps=k.pop("norm_eps"))
        return torchvision_vit.VisionTransformer(  # type: ignore[no-any-return]
            num_layers=k.pop("depth"), norm_layer=norm, **k
        )


def _check_structure(model: Any) -> None:
    """Raise UnsupportedModelError at the first part that is not understood."""
    check_patches(model.conv_proj, "conv_proj")
    require(model.encoder, (torchvision_vit.Encoder,), "encoder")
    require(model.encoder.ln, (nn.LayerNorm,), "encoder.ln")
    for name, layer in model.heads.named_children():
        require(layer, (nn.Linear, nn.Tanh), f"heads.{name}")
    if not len(model.encoder.layers):
        raise UnsupportedModelError("a model without transformer blocks")
    if not isinstance(model.heads[-1], nn.Linear):
        raise UnsupportedModelError("heads: the last layer must be an nn.Linear")
    for leaf, block in model.encoder.layers.named_children():
        name = f"encoder.layers.{leaf}"
        require(block, (torchvision_vit.EncoderBlock,), name)
        require(block.ln_1, (nn.LayerNorm,), f"{name}.ln_1")
        require(block.ln_2, (nn.LayerNorm,), f"{name}.ln_2")
        require(block.mlp, (torchvision_vit.MLPBlock,), f"{name}.mlp")
        parts = [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout]
        if [type(m) for m in block.mlp] != parts:
            raise UnsupportedModelError(f"{name}.mlp: expected Linear, GELU, Linear with dropout")
        check_multihead(block.self_attention, f"{name}.self_attention")

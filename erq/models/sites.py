"""The vocabulary of adapters: sites, blocks, and what an adapter must be able to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

SiteKind = Literal["conv", "linear", "matmul_qk", "matmul_av"]


class UnsupportedModelError(ValueError):
    """A model, or a part of one, that cannot be quantized exactly; the message names the part."""


@dataclass(frozen=True)
class Site:
    """One place where quantizers go.

    Args:
        name: path of the module in the prepared model, e.g. `blocks.0.attn.qkv`.
        kind: conv (patch embedding), linear, matmul_qk (q·kᵀ) or matmul_av (softmax·v).
        norm: path of the LayerNorm whose output feeds this linear layer and only layers of the same
            block with the same `norm`; None if there is none or it cannot be folded.
        merging: whether it is Swin's patch merging, which ERQ as published does not reparameterize.
        hidden: whether the MLP's activation function feeds this linear layer, and it alone.
    """

    name: str
    kind: SiteKind
    norm: str | None = None
    merging: bool = False
    hidden: bool = field(default=False, compare=False)  # of use to calibration alone


@dataclass(frozen=True)
class Block:
    """A part of the model that maps one tensor to one tensor, with its sites in forward order."""

    name: str
    sites: tuple[Site, ...]


class ModelAdapter(Protocol):
    """What the pipeline needs to know of a model family.

    A model is a list of blocks: the embedding (images → tokens), the residual halves of the
    transformer blocks (tokens → tokens: attention, MLP, …) and the head (tokens → logits).
    `run_block` over all of them is the model. Small blocks make calibration fast: what stands
    before a site in its block is computed again for that site.

    Attributes:
        family: the name that checkpoints carry.
        raw_sites: whether in an unprepared model, too, every linear site is a module of that name
            which the same rows enter.
    """

    family: str
    raw_sites: bool

    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter knows the class of `model`."""

    def prepare(self, model: nn.Module) -> None:
        """Rewrite `model` in place so that every site is a module; its output stays the same.

        Raises:
            UnsupportedModelError: names what is not understood; the model is then unchanged.
        """

    def blocks(self, model: nn.Module) -> list[Block]:
        """The blocks of a prepared model, in forward order; of a raw one, too, if `raw_sites`."""

    def run_block(self, model: nn.Module, index: int, x: Tensor) -> Tensor:
        """Output of block `index` for its input `x`; of raw models, too, if `raw_sites`."""

    def pre_norm_blocks(self, model: nn.Module) -> list[str]:
        """Paths of the blocks that are x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def input_shape(self, model: nn.Module) -> tuple[int, int | None, int | None]:
        """(channels, height, width) of the images the model takes; None where any size goes."""

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """JSON-able constructor arguments from which `build` makes the same architecture."""

    def build(self, kwargs: dict[str, Any]) -> nn.Module:
        """An unprepared float model of the architecture that `describe` gave; random weights."""

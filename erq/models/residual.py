"""The pre-norm transformer block that other libraries' blocks are rewritten to."""

from __future__ import annotations

from torch import Tensor, nn

from erq.models.attention import Attention
from erq.models.sites import Block, Site
from erq.models.structure import foldable


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, fc1: nn.Module, act: nn.Module, fc2: nn.Module) -> None:
        """Take over the given submodules."""
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), halves that can be run apart."""

    def __init__(
        self,
        norm1: nn.Module,
        attn: Attention,
        norm2: nn.Module,
        mlp: nn.Module,
        ls1: nn.Module | None = None,
        ls2: nn.Module | None = None,
    ) -> None:
        """Take over the given submodules."""
        super().__init__()
        self.norm1, self.attn, self.ls1 = norm1, attn, ls1 or nn.Identity()
        self.norm2, self.mlp, self.ls2 = norm2, mlp, ls2 or nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        """The attention half."""
        return x + self.ls1(self.attn(self.norm1(x)))  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP half."""
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """[B, …, C] → [B, …, C]."""
        return self.feed_forward(self.attend(x))


def block_halves(block: nn.Module, name: str) -> list[Block]:
    """The two halves of a `ResidualBlock` at the path `name`, with their sites."""
    assert isinstance(block, ResidualBlock)
    attention = (
        Site(f"{name}.attn.qkv", "linear", foldable(block.norm1, f"{name}.norm1")),
        Site(f"{name}.attn.qk", "matmul_qk"),
        Site(f"{name}.attn.av", "matmul_av"),
        Site(f"{name}.attn.proj", "linear"),
    )
    mlp = (
        Site(f"{name}.mlp.fc1", "linear", foldable(block.norm2, f"{name}.norm2")),
        Site(f"{name}.mlp.fc2", "linear", hidden=True),
    )
    return [Block(f"{name}.attn", attention), Block(f"{name}.mlp", mlp)]


def run_half(block: nn.Module, half: int, x: Tensor) -> Tensor:
    """The attention half (0) or the MLP half (1) of a `ResidualBlock`."""
    assert isinstance(block, ResidualBlock)
    return block.feed_forward(x) if half else block.attend(x)

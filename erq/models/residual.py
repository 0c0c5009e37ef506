"""The pre-norm transformer block that other libraries' blocks are rewritten to."""

from __future__ import annotations

from torch import Tensor, nn

from erq.models.attention import Attention


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

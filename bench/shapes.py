"""The kernels that a deployed model runs, with the sizes of each: what benchmarks loop over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["layer_norm", "gemm", "attention"]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a pass.

    Args:
        name: where it stands in a block. kind: which op it is.
        m, n, k: rows, output and input channels of a GEMM; rows and channels (n = k) of a norm.
        out: what it writes: codes (1 byte) or half (2 bytes). residual: whether it reads [m, n].
        windows, heads, tokens, head_dim: of an attention.
        calls: how often a pass runs it.
    """

    name: str
    kind: Kind
    m: int = 0
    n: int = 0
    k: int = 0
    out: Literal["codes", "half"] = "codes"
    residual: bool = False
    windows: int = 0
    heads: int = 0
    tokens: int = 0
    head_dim: int = 0
    calls: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions of the matrix products of one call."""
        if self.kind == "gemm":
            return 2 * self.m * self.n * self.k
        return 4 * self.windows * self.heads * self.tokens**2 * self.head_dim

    def bytes_moved(self, act: float, weight: float) -> int:
        """Bytes of one call: each tensor once, activations between layers of `act` bytes."""
        out = act if self.out == "codes" else 2
        if self.kind == "layer_norm":
            return int(self.m * self.n * (2 + out))
        if self.kind == "gemm":
            residual = 2 if self.residual else 0
            rows = self.m * (self.k * act + self.n * (out + residual))
            return int(rows + self.n * self.k * weight)
        return int(self.windows * self.heads * self.tokens * self.head_dim * 4 * act)


@dataclass(frozen=True)
class Stage:
    """Blocks of one width: `depth` of them, on `tokens` tokens an image in windows of `window`."""

    depth: int
    dim: int
    heads: int
    tokens: int
    window: int


MODELS: dict[str, tuple[Stage, ...]] = {
    "deit_tiny": (Stage(12, 192, 3, 197, 197),),
    "deit_small": (Stage(12, 384, 6, 197, 197),),
    "deit_base": (Stage(12, 768, 12, 197, 197),),
    "vit_large": (Stage(24, 1024, 16, 197, 197),),
    "swin_tiny": tuple(
        Stage(d, 96 << i, 3 << i, 3136 >> (2 * i), 49) for i, d in enumerate((2, 2, 6, 2))
    ),
    "swin_base": tuple(
        Stage(d, 128 << i, 4 << i, 3136 >> (2 * i), 49) for i, d in enumerate((2, 2, 18, 2))
    ),
}
"""By name, at 224×224. Sizes: the papers' (Touvron et al. 2021, Dosovitskiy et al. 2021, Liu et al.
2021)."""


def block_kernels(stage: Stage, batch: int) -> Iterator[Kernel]:
    """The seven kernels of a block."""
    m, c = batch * stage.tokens, stage.dim
    yield Kernel("norm1 + quantize", "layer_norm", m, c, c)
    yield Kernel("qkv", "gemm", m, 3 * c, c)
    yield Kernel(
        "attention",
        "attention",
        windows=m // stage.window,
        heads=stage.heads,
        tokens=stage.window,
        head_dim=c // stage.heads,
    )
    yield Kernel("proj + residual", "gemm", m, c, c, "half", residual=True)
    yield Kernel("norm2 + quantize", "layer_norm", m, c, c)
    yield Kernel("fc1 + GELU", "gemm", m, 4 * c, c)
    yield Kernel("fc2 + residual", "gemm", m, c, 4 * c, "half", residual=True)


def model_kernels(name: str, batch: int) -> list[Kernel]:
    """Every kernel of a pass but the patch embedding and the head (under 2 % of the operations)."""
    kernels = []
    for i, stage in enumerate(MODELS[name]):
        prefix = f"stage {i} " if len(MODELS[name]) > 1 else ""
        if i:  # patch merging: four tokens to one, 4C → 2C channels
            m, k = batch * stage.tokens, 2 * stage.dim
            kernels.append(Kernel(f"{prefix}merge norm + quantize", "layer_norm", m, k, k))
            kernels.append(Kernel(f"{prefix}merge", "gemm", m, stage.dim, k, "half"))
        kernels += [
            replace(kernel, name=prefix + kernel.name, calls=stage.depth)
            for kernel in block_kernels(stage, batch)
        ]
    return kernels

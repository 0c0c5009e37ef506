"""One thread, one seed, and the builders that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from erq.quant import AffineParams
from erq.reduce.gram import Gram

torch.set_num_threads(1)
# The same examples on every run, however busy the machine is.
hypothesis.settings.register_profile(
    "erq", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("erq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def affine() -> Callable[..., AffineParams]:
    """Affine params of numbers: affine(0.5, 3, bits=4) or affine([0.5, 1.0], [3, -2], bits=4)."""

    def build(scale: Any, zero_point: Any, bits: int = 4) -> AffineParams:
        return AffineParams(
            torch.tensor(scale, dtype=torch.float32),
            torch.tensor(zero_point, dtype=torch.int32),
            bits,
        )

    return build


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., VisionTransformer]:
    """A ViT of 2 blocks, 24 channels and 17 tokens whose every parameter is random."""

    def build(cls: type[VisionTransformer] = VisionTransformer, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "img_size": 16,
            "patch_size": 4,
            "num_classes": 5,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2.0,
        }
        return randomize(cls(**{**settings, **changes}))

    return build


@torch.no_grad()
def randomize(model: Any) -> Any:
    """Every parameter random: timm starts with zero biases and unit norms, under which half of all
    mistakes hide."""
    for name, p in model.named_parameters():
        noise = torch.randn_like(p) * (0.2 if p.dim() < 2 else p.shape[-1] ** -0.5)
        is_gain = "norm" in name and name.endswith("weight")
        p.copy_(noise.add(1) if is_gain or name.endswith("gamma") else noise)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_swin() -> Callable[..., SwinTransformer]:
    """A Swin of two stages, 32 and 64 channels, windows of 4×4, whose every parameter is random."""

    def build(cls: type[SwinTransformer] = SwinTransformer, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "img_size": 16,
            "patch_size": 2,
            "num_classes": 5,
            "embed_dim": 32,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": 4,
            "mlp_ratio": 2.0,
        }
        return randomize(cls(**{**settings, **changes}))

    return build


@dataclass(frozen=True)
class Layer:
    """Rows and weight of a linear layer, fp64, and Gram matrices straight from the definition.

    Args:
        x: [rows, D]. a: [rows, D + 1], x quantized, and a constant 1.
        weight: [N, D + 1], bias last.
    """

    x: Tensor
    a: Tensor
    weight: Tensor
    gram: Gram

    def error(self, weight: Tensor) -> Tensor:
        """‖(W − Ŵ) Aᵀ‖² per row of another weight Ŵ in this layer's place."""
        return ((self.weight - weight) @ self.a.t()).square().sum(dim=1)


@pytest.fixture(scope="session")
def layer() -> Callable[..., Layer]:
    """A random layer with correlated inputs of different sizes and means; rank < D if asked."""

    def build(d: int, n: int, rows: int = 200, rank: int | None = None) -> Layer:
        rank = rank or d
        mix = torch.randn(rank, d).double() * torch.rand(d).add(0.2)
        x = torch.randn(rows, rank).double() @ mix / rank**0.5
        if rank == d:
            x += torch.randn(d)
        step = float(x.max() - x.min()) / 15
        a = torch.cat([(x / step).round() * step, torch.ones(rows, 1).double()], dim=1)
        if rank < d:
            a[:, :-1] = x  # rounding would fill the rank up
        e = x - a[:, :-1]
        gram = Gram(d, torch.device("cpu"))
        gram.rows, gram.g, gram.c, gram.p = rows, a.t() @ a, a.t() @ e, e.t() @ e
        return Layer(x, a, torch.randn(n, d + 1).double() * 0.2, gram)

    return build

"""Scenes of digits, and the small networks that tell them apart.

The demo's network forgives nearly every rounding error and ranks no methods. These have a harder
task: up to nine of scikit-learn's digits in one frame of 24 × 24 noisy pixels; one has a bright dot
in its upper left corner, others have it in the lower right one, which means nothing; the class is
the first one's digit. A network has to fetch what belongs to one dot and to ignore the rest, which
attention does. The weights in bench/models come from bench/train_small.py; a scene follows from its
split and seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cases import ROOT, Task
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MODELS = ROOT / "bench" / "models"
SIDE, DIGIT = 24, 8
MEAN, STD = 0.2, 0.3
TEST_DIGITS = 797
TEST_SCENES, CALIBRATION_SCENES = 2000, 512
# Seeds of the scenes that are not for training; training takes those from 1000 on.
TEST_SEED, CALIBRATION_SEED, TRAIN_SEED = 1, 2, 1000


@dataclass(frozen=True)
class Recipe:
    """A small network and how it is trained.

    Args:
        build: its class. arguments: of the class. steps, batch, peak_lr: the schedule's.
        vector_lr: learning rate of norms, biases and embeddings over that of matrices.
        weight_decay: of matrices. start: the network whose weights it begins with.
    """

    build: type[nn.Module]
    arguments: dict[str, Any]
    steps: int
    batch: int = 40
    peak_lr: float = 1.5e-3
    vector_lr: float = 2.0
    weight_decay: float = 0.05
    start: str = ""


_VIT: dict[str, Any] = {
    "img_size": SIDE,
    "in_chans": 1,
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 7,
    "num_heads": 3,
}
_SWIN: dict[str, Any] = {
    "img_size": SIDE,
    "in_chans": 1,
    "patch_size": 4,
    "window_size": 3,
    "num_classes": 10,
    "embed_dim": 64,
    "depths": (4, 2),
    "num_heads": (2, 4),
}
RECIPES = {
    "vit": Recipe(VisionTransformer, _VIT, steps=1500),
    # On from there in large steps of norms and biases, without decay: channels grow out of line,
    # as those of larger networks do.
    "vit-outliers": Recipe(
        VisionTransformer, _VIT, 600, peak_lr=1e-3, vector_lr=30.0, weight_decay=0.0, start="vit"
    ),
    "swin": Recipe(SwinTransformer, _SWIN, steps=1200),
}


@cache
def _digits() -> dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """scikit-learn's digits, float [N, 8, 8] in 0..1 with labels, in two parts."""
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images, labels = (bunch.images[order] / 16).astype(np.float32), bunch.target[order]
    return {
        "test": (images[:TEST_DIGITS], labels[:TEST_DIGITS]),
        "train": (images[TEST_DIGITS:], labels[TEST_DIGITS:]),
    }


def scenes(split: str, count: int, seed: int, clutter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scenes that follow from the arguments alone.

    Args:
        split: `train` or `test`: whose digits they show. clutter: contrast of the other digits over
            that of the marked one.

    Returns:
        float32 [count, 1, 24, 24], normalised, and the classes, int64 [count].
    """
    images, labels = _digits()[split]
    random = np.random.RandomState(seed)
    grid = SIDE // DIGIT
    cells = grid**2
    chosen = random.randint(len(images), size=(count, cells))
    contrast = random.uniform(0.5, 1.0, size=(count, cells))
    there = random.uniform(size=(count, cells)) < 0.6
    dotted = random.uniform(size=(count, cells)) < 0.5
    marked = np.eye(cells, dtype=bool)[random.randint(cells, size=count)]
    contrast *= np.where(marked, 1.0, clutter * there)
    digits = images[chosen] * contrast[:, :, None, None]
    digits[marked, :2, :2] += 1.0
    digits[dotted & there & ~marked, -2:, -2:] += 1.0
    frame = digits.reshape(count, grid, grid, DIGIT, DIGIT).transpose(0, 1, 3, 2, 4)
    frame = frame.reshape(count, SIDE, SIDE) + random.normal(0.0, 0.1, size=(count, SIDE, SIDE))
    classes = labels[chosen[marked]]
    x = (torch.from_numpy(frame.astype(np.float32))[:, None] - MEAN) / STD
    return x, torch.from_numpy(classes).long()


def load_network(name: str, folder: Path = MODELS) -> nn.Module:
    """A recipe's network from its file in `folder`, fp32, eval."""
    recipe = RECIPES[name]
    model = recipe.build(**recipe.arguments)
    state = load_file(folder / f"{name}.safetensors")
    model.load_state_dict({key: t.float() for key, t in state.items()})
    return model.eval()


def scenes_task(name: str, folder: Path = MODELS) -> Task:
    """A network of bench/models with its scenes; calibration scenes show training digits.

    Args:
        name: of a recipe. folder: with its weights.
    """
    model = load_network(name, folder)
    test, labels = scenes("test", TEST_SCENES, TEST_SEED)
    calibration, _ = scenes("train", CALIBRATION_SCENES, CALIBRATION_SEED)
    return Task(f"{name}: scenes", model, calibration, test, labels, (MEAN,), (STD,))

"""Train the small vision transformer that ``erq demo`` quantizes, and write it with its data.

Writes two files into ``erq/demo/``:

- ``vit_digits.safetensors``: fp16 weights of a timm ``VisionTransformer``. The metadata key
  ``erq_demo`` holds JSON: ``arch_kwargs``, ``mean``, ``std``, ``trained_on``, ``test_top1``
  (percent).
- ``digits.npz``: ``images`` and ``labels`` (test split, never trained on), ``calib_images`` and
  ``calib_labels`` (part of the training split). Images are gray uint8 ``[N,32,32]``.

Usage: ``python bench/train_demo.py``. It needs scikit-learn, for the data alone, and takes a few
minutes on two CPU cores. The seed is fixed but the order of float sums is not: another machine or
thread count gives other weights of about the same accuracy.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

DEMO_DIR = Path(__file__).resolve().parent.parent / "erq" / "demo"
SEED = 0
IMAGE_SIZE = 32
N_TEST = 597
N_CALIB = 256
MAX_WEIGHT_BYTES = 2_900_000
MAX_DATA_BYTES = 1_000_000
TRAINED_ON = (
    "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning "
    "Repository, doi:10.24432/C50P49, CC BY 4.0): the 1797 images of sklearn.datasets.load_digits, "
    f"scaled from 0..16 to 0..255 and resized (bicubic) to {IMAGE_SIZE}x{IMAGE_SIZE}, "
    f"{1797 - N_TEST} of them for training"
)

ARCH_KWARGS: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 8,
    "num_heads": 2,
}


@dataclass(frozen=True)
class Recipe:
    """How the demo model is trained."""

    epochs: int = 60
    batch: int = 32
    peak_lr: float = 2e-3
    warmup_epochs: int = 5
    weight_decay: float = 0.05
    vector_lr_factor: float = 2.0  # LayerNorm, biases, embeddings: gains spread as in larger nets
    label_smoothing: float = 0.0
    max_shift: float = 0.08  # of the image's width
    max_degrees: float = 12.0
    max_zoom: float = 0.12
    noise_std: float = 0.0  # of the full range of gray values


@dataclass(frozen=True)
class Digits:
    """The fixed split: images uint8 ``[N,32,32]``, labels int64 ``[N]``."""

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]


def load_split() -> Digits:
    """Load scikit-learn's digits, resize them and split them by a seeded shuffle."""
    bunch = load_digits()
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = np.stack(
        [np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC)) for s in small]
    )
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(labels))
    test, train = order[:N_TEST], order[N_TEST:]
    return Digits(images[train], labels[train], images[test], labels[test])


def augment(x: Tensor, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Rotate, zoom and shift every image by its own random amount, then add noise.

    Args:
        x: gray images ``[N,1,32,32]`` in 0..1.
        recipe: the sizes of the changes.
        rng: source of the random numbers.

    Returns:
        New images, same shape; noise may leave 0..1.
    """
    n = x.shape[0]

    def uniform(bound: float) -> Tensor:
        return (torch.rand(n, generator=rng) * 2 - 1) * bound

    angle = uniform(math.radians(recipe.max_degrees))
    zoom = 1 + uniform(recipe.max_zoom)
    # affine_grid spans -1..1 over the width, hence the factor 2 on a shift given in widths.
    dx, dy = uniform(2 * recipe.max_shift), uniform(2 * recipe.max_shift)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    return moved + torch.randn(moved.shape, generator=rng) * recipe.noise_std


def to_model_input(gray: Tensor, mean: float, std: float) -> Tensor:
    """Normalise gray images ``[N,1,H,W]`` in 0..1 and repeat them to three equal channels."""
    return ((gray - mean) / std).expand(-1, 3, -1, -1)


def to_unit_range(images: npt.NDArray[np.uint8]) -> Tensor:
    """Turn uint8 ``[N,H,W]`` into float32 ``[N,1,H,W]`` in 0..1."""
    return torch.from_numpy(images).float().div(255).unsqueeze(1)


def train(
    gray: Tensor, labels: Tensor, mean: float, std: float, recipe: Recipe
) -> VisionTransformer:
    """Train the demo model from scratch.

    Args:
        gray: training images float32 ``[N,1,32,32]`` in 0..1.
        labels: int64 ``[N]`` in 0..9.
        mean, std: normalisation of the gray values.
        recipe: schedule, optimiser and augmentation.

    Returns:
        The trained model in eval mode.
    """
    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    model = VisionTransformer(**ARCH_KWARGS)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0, "lr": recipe.peak_lr * recipe.vector_lr_factor},
        ],
        lr=recipe.peak_lr,
    )
    steps_per_epoch = len(labels) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[g["lr"] for g in optimizer.param_groups],
        total_steps=recipe.epochs * steps_per_epoch,
        pct_start=recipe.warmup_epochs / recipe.epochs,
        cycle_momentum=False,
    )
    for epoch in range(recipe.epochs):
        losses = []
        order = torch.randperm(len(labels), generator=rng)
        # The last, shorter batch is dropped: every epoch leaves out other images.
        for index in order[: steps_per_epoch * recipe.batch].split(recipe.batch):
            x = to_model_input(augment(gray[index], recipe, rng), mean, std)
            loss = F.cross_entropy(model(x), labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1:3d}/{recipe.epochs}  loss {np.mean(losses):.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def measure_top1(
    model: VisionTransformer, gray: Tensor, labels: Tensor, mean: float, std: float
) -> float:
    """Return the share of right answers in percent."""
    logits = torch.cat([model(to_model_input(part, mean, std)) for part in gray.split(128)])
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train, save, reload what was saved, measure it, and record the result beside the weights."""
    parser = argparse.ArgumentParser(description="Train the model that `erq demo` quantizes.")
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="folder for the two files")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    digits = load_split()
    gray = to_unit_range(digits.train_images)
    mean, std = round(gray.mean().item(), 4), round(gray.std().item(), 4)
    start = time.perf_counter()
    model = train(gray, torch.from_numpy(digits.train_labels), mean, std, Recipe())
    print(f"trained in {time.perf_counter() - start:.0f} s")

    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / "vit_digits.safetensors"
    test = to_unit_range(digits.test_images), torch.from_numpy(digits.test_labels)
    half = {name: t.half().contiguous() for name, t in model.state_dict().items()}
    model.load_state_dict({name: t.float() for name, t in half.items()})
    header = {
        "arch_kwargs": ARCH_KWARGS,
        "mean": [mean] * 3,
        "std": [std] * 3,
        "trained_on": TRAINED_ON,
        "test_top1": round(measure_top1(model, *test, mean, std), 2),
    }
    save_file(half, weights, metadata={"erq_demo": json.dumps(header, sort_keys=True)})
    images = args.out / "digits.npz"
    np.savez_compressed(
        images,
        images=digits.test_images,
        labels=digits.test_labels,
        calib_images=digits.train_images[:N_CALIB],
        calib_labels=digits.train_labels[:N_CALIB],
    )
    for file, limit in ((weights, MAX_WEIGHT_BYTES), (images, MAX_DATA_BYTES)):
        size = file.stat().st_size
        print(f"{file.name}: {size:,} bytes")
        if size > limit:
            raise SystemExit(f"{file.name} must stay below {limit:,} bytes")
    print(f"top-1 of the saved weights on {N_TEST} test images: {header['test_top1']} %")


if __name__ == "__main__":
    main()

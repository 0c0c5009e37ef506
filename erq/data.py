"""Images in: iterables, tensors, folders and tensor files, checked once, as batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CHUNK_IMAGES = 16
"""Images of one forward pass during calibration."""

Images = Tensor | Iterable[Any]


def check_images(x: Any, shape: tuple[int, int | None, int | None]) -> Tensor:
    """`x` as a float tensor [N, C, H, W] that the model takes.

    Args:
        shape: (channels, height, width) of the model, None where any size goes.

    Raises:
        ValueError: not images, wrong channels or size, NaN or infinite values.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"images must be a float tensor [N, C, H, W], already normalised, got {got}"
        )
    channels, height, width = shape
    if x.shape[1] != channels:
        raise ValueError(f"images have {x.shape[1]} channels, the model takes {channels}")
    if height is not None and tuple(x.shape[2:]) != (height, width):
        raise ValueError(
            f"images are {x.shape[2]}×{x.shape[3]}, the model takes {height}×{width}: resize them"
        )
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x.flatten(1))).any(dim=1).nonzero()[:, 0]
        raise ValueError(
            f"images hold NaN or infinite values, first in image {int(bad[0])} of this batch"
        )
    return x


def batches(images: Images) -> Iterable[tuple[Any, Any]]:
    """(batch, labels or None) of every source of images that the Python calls take."""
    if isinstance(images, Tensor):
        yield from ((x, None) for x in images.split(64))
        return
    for item in images:
        if isinstance(item, tuple | list) and len(item) == 2:
            yield item[0], item[1]
        else:
            yield item, None


def calibration_chunks(
    images: Images, shape: tuple[int, int | None, int | None], device: torch.device
) -> list[Tensor]:
    """All calibration images in chunks of at most CHUNK_IMAGES, checked, fp32, on `device`.

    Raises:
        ValueError: no images, fewer than two, or images that the model does not take.
    """
    chunks: list[Tensor] = []
    for batch, _ in batches(images):
        checked = check_images(batch, shape)
        chunks.extend(c.to(device, torch.float32) for c in checked.split(CHUNK_IMAGES) if len(c))
    count = sum(len(c) for c in chunks)
    if count < 2:
        raise ValueError(f"calibration needs at least 2 images, 32 are usual, got {count}")
    return chunks

"""Calibration images: all that the Python calls take, and one clear error for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from erq.data import (
    CHUNK_IMAGES,
    ImageSource,
    Preprocessing,
    Selection,
    batches,
    calibration_chunks,
    check_images,
    own_batches,
)
from erq.ranks import Ranks

SHAPE = (3, 8, 6)
CPU = torch.device("cpu")


def images(n: int) -> Tensor:
    return torch.randn(n, *SHAPE)


def spoilt(value: float) -> Tensor:
    x = images(4)
    x[2, 1, 3, 3] = value
    return x


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: spoilt(float("nan")), r"NaN or infinite values, first in image 2 of this batch"),
    (lambda: spoilt(float("inf")), r"NaN or infinite values, first in image 2 of this batch"),
    (lambda: spoilt(-float("inf")), r"NaN or infinite values"),
    (lambda: images(1), r"at least 2 images, 32 are usual, got 1"),
    (lambda: images(0), r"at least 2 images, 32 are usual, got 0"),
    (lambda: [], r"at least 2 images, 32 are usual, got 0"),
    (lambda: [images(1), images(0)], r"got 1"),
    (lambda: images(4)[:, :1], r"images have 1 channels, the model takes 3"),
    (lambda: images(4)[..., :5], r"images are 8×5, the model takes 8×6: resize them"),
    (lambda: images(4).mT, r"images are 6×8, the model takes 8×6"),
    (lambda: images(4).mul(255).to(torch.uint8), r"already normalised, got torch\.uint8 \[4, 3, 8"),
    (lambda: images(4).long(), r"float tensor .* got torch\.int64"),
    (lambda: images(4).to(torch.complex64), r"float tensor .* got torch\.complex64"),
    (lambda: images(4)[0], r"float tensor \[N, C, H, W\].* got torch\.float32 \[3, 8, 6\]"),
    (lambda: torch.tensor(1.0), r"float tensor .* got torch\.float32 \[\]"),
    (lambda: images(4).numpy(), r"float tensor .* got ndarray"),
    (lambda: [images(4), None], r"float tensor .* got NoneType"),
    (lambda: [(images(4), 1, 2)], r"float tensor .* got tuple"),
    (lambda: "photos", r"float tensor .* got str"),
    (lambda: None, r"images must be .* got NoneType"),
    (lambda: 32, r"images must be .* got int"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_the_model_does_not_take_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_chunks(make(), SHAPE, CPU)


def loader(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in x.split(3):
        yield part, torch.zeros(len(part))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: list(x.split(7)),
        lambda x: [*x.split(7), x[:0]],
        loader,
        lambda x: [(x[:5], None), [x[5:], torch.zeros(4)]],
        lambda x: (part for part in x.split(1)),
    ],
)
def test_every_source_gives_the_same_images_in_order(wrap: Callable[[Tensor], Any]) -> None:
    x = images(2 * CHUNK_IMAGES + 5)
    chunks = calibration_chunks(wrap(x), SHAPE, CPU)
    assert torch.equal(torch.cat(chunks), x)
    assert all(0 < len(c) <= CHUNK_IMAGES for c in chunks)


def test_labels_come_along() -> None:
    x, y = images(7), torch.arange(7)
    pairs = list(batches([(x[:4], y[:4]), (x[4:], y[4:])]))
    assert torch.equal(torch.cat([labels for _, labels in pairs]), y)
    assert [labels for _, labels in batches(x)] == [None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_fp32(dtype: torch.dtype) -> None:
    x = images(4).to(dtype)
    [chunk] = calibration_chunks(x, SHAPE, CPU)
    assert chunk.dtype == torch.float32
    assert torch.equal(chunk, x.float())


def test_a_model_of_any_size_takes_any_size_but_its_channels() -> None:
    assert check_images(torch.randn(2, 3, 5, 9), (3, None, None)).shape == (2, 3, 5, 9)
    with pytest.raises(ValueError, match="1 channels"):
        check_images(torch.randn(2, 1, 5, 9), (3, None, None))
    mixed = [torch.randn(2, 3, 5, 9), torch.randn(2, 3, 4, 9)]
    with pytest.raises(ValueError, match="all have one size, got 4×9 and 5×9"):
        calibration_chunks(mixed, (3, None, None), CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_read_their_own_chunks_alone(size: int) -> None:
    read: list[int] = []

    def image(i: int) -> Tensor:
        read.append(i)
        return torch.full((3, 4, 4), float(i))

    indices = list(range(70, 0, -1))
    source = ImageSource("numbers", 80, image)
    recipe = Preprocessing((3, 4, 4), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    chosen = Selection(source, recipe, indices)
    assert torch.cat([x for x, _ in chosen])[:, 0, 0, 0].tolist() == indices
    found: dict[int, list[float]] = {}
    for rank in range(size):
        read.clear()
        for number, (batch, _) in chosen.own(Ranks(rank, size), CHUNK_IMAGES):
            assert number % size == rank
            found[number] = batch[:, 0, 0, 0].tolist()
        assert len(read) == sum(len(v) for n, v in found.items() if n % size == rank)
    assert [found[n] for n in sorted(found)] == [indices[i : i + 16] for i in range(0, 70, 16)]


@pytest.mark.parametrize("as_selection", [True, False])
def test_ranks_share_batches(as_selection: bool) -> None:
    images = torch.arange(70.0)[:, None, None, None].expand(70, 3, 4, 4)
    given: Any = list(images.split(32))
    if as_selection:
        recipe = Preprocessing((3, 4, 4), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
        given = Selection(ImageSource("tensor", 70, lambda i: images[i]), recipe, range(70))
    found = {n: x for r in (0, 1) for n, (x, _) in own_batches(given, Ranks(r, 2))}
    assert [len(found[n]) for n in sorted(found)] == [32, 32, 6]
    assert torch.equal(torch.cat([found[n] for n in sorted(found)]), images)

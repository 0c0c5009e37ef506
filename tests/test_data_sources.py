"""Images behind a SRC: folders, .npz and .safetensors, through timm's own transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

from erq.data import BATCH_IMAGES, ImageSource, Preprocessing, open_files, open_images

CONFIG = {
    "input_size": (3, 24, 24),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
RECIPE = Preprocessing.from_config(CONFIG, (3, 24, 24))


def pixels(n: int, *shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def save_pictures(folder: Path, arrays: Any, names: list[str] | None = None) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / (names[i] if names else f"{i}.png") for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


def all_images(source: ImageSource, recipe: Preprocessing = RECIPE) -> torch.Tensor:
    return torch.cat([x for x, _ in source.batches(recipe)])


def test_recipe_is_timms_at_the_models_size() -> None:
    recipe = Preprocessing.from_config({**CONFIG, "input_size": (3, 224, 224)}, (3, 24, 20))
    assert recipe.shape == (3, 24, 20)
    assert (recipe.mean, recipe.crop_pct) == ((0.5, 0.4, 0.3), 0.9)
    assert Preprocessing.from_config(CONFIG, (3, None, None)).shape == (3, 24, 24)
    assert Preprocessing.from_config({}, (3, None, None)).shape == (3, 224, 224)


def test_folder_and_array_go_through_timms_transform(tmp_path: Path) -> None:
    arrays = pixels(3, 30, 41, 3)
    save_pictures(tmp_path / "pictures", arrays)
    np.savez(tmp_path / "a.npz", images=arrays)
    save_file({"images": torch.from_numpy(arrays)}, tmp_path / "a.safetensors")
    apply = create_transform(
        input_size=(3, 24, 24), interpolation="bicubic", mean=CONFIG["mean"], std=CONFIG["std"],
        crop_pct=0.9, crop_mode="center",
    )  # fmt: skip
    expected = torch.stack([apply(Image.fromarray(a)) for a in arrays])
    for name in ("pictures", "a.npz", "a.safetensors"):
        assert torch.equal(all_images(open_images(str(tmp_path / name))), expected), name


@pytest.mark.parametrize("shape", [(30, 41), (30, 41, 1)])
def test_gray_arrays_fill_three_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = pixels(2, *shape)
    np.savez(tmp_path / "a.npz", images=arrays)
    flat = Preprocessing.from_config(
        {**CONFIG, "mean": (0.5,) * 3, "std": (0.5,) * 3}, RECIPE.shape
    )
    images = all_images(open_images(str(tmp_path / "a.npz")), flat)
    assert images.shape == (2, 3, 24, 24)
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert not torch.equal(images[0], images[1])


def test_gray_model_takes_colour_pictures_with_the_mean_normalisation(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels(2, 24, 24, 3))
    recipe = Preprocessing.from_config(CONFIG, (1, 24, 24))
    assert recipe.mean == pytest.approx((0.4,))
    assert all_images(open_images(str(tmp_path)), recipe).shape == (2, 1, 24, 24)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_float_arrays_are_taken_as_they_are(tmp_path: Path, suffix: str, dtype: str) -> None:
    images = torch.randn(3, 3, 5, 7).to(getattr(torch, dtype))
    labels = torch.tensor([2, 0, 1])
    path = tmp_path / f"a.{suffix}"
    if suffix == "npz":
        np.savez(path, images=images.numpy(), labels=labels.numpy().astype(np.uint8))
    else:
        save_file({"images": images, "labels": labels}, path)
    source = open_images(str(path))
    assert torch.equal(all_images(source), images.float())
    assert source.labels is not None and source.labels.dtype == torch.int64
    assert source.labels.tolist() == [2, 0, 1]


def test_another_array_by_name_with_its_own_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(
        path, images=pixels(2, 8, 8), labels=np.array([5, 5]), calib_images=pixels(4, 8, 8),
        calib_labels=np.array([0, 1, 2, 3]),
    )  # fmt: skip
    assert open_images(str(path)).size == 2
    other = open_images(f"{path}:calib_images")
    assert other.size == 4 and other.labels is not None
    assert other.labels.tolist() == [0, 1, 2, 3]


def test_class_folders_are_numbered_in_the_order_of_their_names(tmp_path: Path) -> None:
    arrays = pixels(3, 8, 8, 3)
    for name in ("10", "2", "1"):
        save_pictures(tmp_path / name, arrays[:2])
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "2" / "notes.txt").write_text("not an image")
    source = open_images(str(tmp_path))
    assert source.classes == ("1", "2", "10", "empty")
    assert source.labels is not None and source.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_plain_folder_has_no_labels_and_a_natural_order(tmp_path: Path) -> None:
    arrays = pixels(3, 24, 24, 3)
    save_pictures(tmp_path, arrays, ["10.png", "9.PNG", "1.bmp"])
    source = open_images(str(tmp_path))
    assert source.labels is None and source.classes == ()
    read = [np.asarray(source.read(i)) for i in range(3)]
    for got, expected in zip(read, (arrays[2], arrays[1], arrays[0]), strict=True):
        assert np.array_equal(got, expected)


def test_images_are_read_when_they_are_asked_for() -> None:
    seen: list[int] = []

    def read(i: int) -> torch.Tensor:
        seen.append(i)
        return torch.full((3, 4, 4), float(i))

    source = ImageSource("made up", 1000, read, torch.arange(1000))
    batches = source.batches(RECIPE, [7, 3] * BATCH_IMAGES)
    assert seen == []
    x, labels = next(batches)
    assert len(seen) == len(x) == BATCH_IMAGES
    assert x[:2, 0, 0, 0].tolist() == [7, 3] and labels is not None
    assert labels[:2].tolist() == [7, 3]


def test_draw_is_random_distinct_and_repeatable() -> None:
    source = ImageSource("made up", 50, lambda i: torch.zeros(3, 1, 1))
    first = source.draw(20, seed=3)
    assert first == source.draw(20, seed=3) != source.draw(20, seed=4)
    assert len(set(first)) == 20 and first != sorted(first)
    assert sorted(source.draw(99, seed=0)) == list(range(50))


def test_palette_with_transparency_reads_as_its_colours(tmp_path: Path) -> None:
    colour = Image.fromarray(pixels(1, 24, 24, 3)[0]).quantize(16)
    colour.save(tmp_path / "plain.png")
    colour.save(tmp_path / "transparent.png", transparency=bytes(range(16)))
    plain, transparent = all_images(open_images(str(tmp_path)))
    assert torch.equal(plain, transparent)


def bad_folder(path: Path) -> str:
    (path / "train" / "cat").mkdir(parents=True)
    return str(path)


def mixed_folder(path: Path) -> str:
    save_pictures(path, pixels(1, 8, 8, 3))
    save_pictures(path / "cat", pixels(1, 8, 8, 3))
    return str(path)


def npz(**arrays: Any) -> Any:
    def build(path: Path) -> str:
        np.savez(path / "a.npz", **arrays)
        return str(path / "a.npz")

    return build


def tensors(**values: torch.Tensor) -> Any:
    def build(path: Path) -> str:
        save_file(values, path / "a.safetensors")
        return str(path / "a.safetensors")

    return build


def raw(name: str, content: bytes) -> Any:
    def build(path: Path) -> str:
        (path / name).write_bytes(content)
        return str(path / name)

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: str(p / "nowhere"), "no such folder or file"),
        (lambda p: str(p / "nowhere.npz:images"), "no such folder or file"),
        (lambda p: str(p), "no images"),
        (bad_folder, "it holds the folders train"),
        (mixed_folder, "both images and folders"),
        (raw("a.tar", b"x"), "not a .tar file"),
        (raw("a.npz", b"PK\x03\x04 cut off"), "not a readable .npz"),
        (raw("a.safetensors", b"\xff" * 20), "not a readable .safetensors"),
        (npz(pictures=pixels(2, 8, 8)), "no array 'images', it has pictures"),
        (npz(images=pixels(2, 3, 8, 8)), "move the channels to the end"),
        (npz(images=pixels(2, 8, 8, 4)), r"\[N, H, W, 3\].*got uint8 \[2, 8, 8, 4\]"),
        (npz(images=np.zeros((2, 8, 8), np.int64)), "got int64"),
        (npz(images=np.zeros((2, 8, 8), np.float32)), r"got float32 \[2, 8, 8\]"),
        (npz(images=pixels(0, 8, 8)), r"empty: \[0, 8, 8\]"),
        (npz(images=pixels(2, 8, 8), labels=np.array([1])), r"need labels \[2\], got \[1\]"),
        (npz(images=pixels(2, 8, 8), labels=np.array([1.0, 2.0])), "must be integers"),
        (npz(images=pixels(2, 8, 8), labels=np.array([0, -1])), "class indices >= 0, got -1"),
        (npz(images=np.array([{}, {}], dtype=object)), "plain arrays"),
        (tensors(images=torch.zeros(2, 3, 8, 8, dtype=torch.int32)), "got I32"),
        (tensors(images=torch.zeros(2, 3, 8, 8), labels=torch.zeros(2)), "must be integers"),
        (tensors(images=torch.zeros(2, 3, 8, 8), labels=torch.zeros(3).long()), "need labels"),
        (tensors(weight=torch.zeros(2)), "no array 'images', it has weight"),
    ],
)
def test_bad_source_is_one_clear_error(tmp_path: Path, build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(build(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no picture at all", "not a readable image"), (None, "not a readable image")],
)
def test_unreadable_picture_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    [path] = save_pictures(tmp_path, pixels(1, 64, 64, 3))
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=f"0.png: {message}"):
        all_images(open_images(str(tmp_path)))


def test_sixteen_bit_picture_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: pixels of mode I.*8 bits"):
        all_images(open_images(str(tmp_path)))


def test_pictures_do_not_fit_a_model_of_five_channels(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels(1, 8, 8, 3))
    recipe = Preprocessing.from_config(CONFIG, (5, 24, 24))
    with pytest.raises(ValueError, match="1 or 3 channels, the model takes 5"):
        all_images(open_images(str(tmp_path)), recipe)


def test_missing_file_is_named(tmp_path: Path) -> None:
    [path] = save_pictures(tmp_path, pixels(1, 8, 8, 3))
    assert open_files([path]).size == 1
    with pytest.raises(ValueError, match=r"gone.png: no such image file"):
        open_files([path, tmp_path / "gone.png"])


def test_synthetic_images_have_the_input_statistics_of_the_model() -> None:
    recipe = Preprocessing.from_config(CONFIG | {"input_size": (3, 64, 48)}, (3, 64, 48))
    source = open_images("synthetic")
    x = all_images_of(source.batches(recipe, source.draw(96, seed=0)))
    assert x.shape == (96, 3, 64, 48)
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    pixels = x * std[:, None, None] + mean[:, None, None]
    assert float(pixels.min()) > -1e-6 and float(pixels.max()) < 1 + 1e-6
    inside = (pixels > 1e-6) & (pixels < 1 - 1e-6)
    assert float(inside.float().mean()) > 0.8
    assert x.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (x.std(dim=(0, 2, 3)) - 0.95).abs().max() < 0.15
    # Neighbours are alike, as in pictures, and so are channels.
    assert float((x[..., 1:] * x[..., :-1]).mean() / x.square().mean()) > 0.7
    assert float((x[:, 0] * x[:, 1]).mean() / x.square().mean()) > 0.7


def all_images_of(batches: Any) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def test_synthetic_images_are_drawn_by_seed() -> None:
    source = open_images("synthetic")
    first, again, other = (
        all_images_of(source.batches(RECIPE, source.draw(40, seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    flat = torch.cat([first, other]).flatten(1)
    assert len(flat.unique(dim=0)) == 80
    with pytest.raises(ValueError, match="has no size of its own"):
        source.read(3)


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(tmp_path / "synthetic", pixels(2, 24, 24, 3))
    monkeypatch.chdir(tmp_path)
    assert open_images("synthetic").size == 2

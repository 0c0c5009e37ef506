"""Images in: tensors, iterables, folders and tensor files, checked once, as batches."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from erq.messages import shown
from erq.ranks import ALONE, Ranks

CHUNK_IMAGES = 16
"""Images of one forward pass during calibration."""

BATCH_IMAGES = 32
"""Images of one batch of a source."""

DEMO_FOLDER = Path(__file__).parent / "demo"
"""The shipped model and its images."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

Images = Tensor | Iterable[Any]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_SIDE = 1 << 14
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROP_MODES = ("center", "squash", "border")


def check_images(x: Any, shape: tuple[int, int | None, int | None]) -> Tensor:
    """`x` as a float tensor [N, C, H, W] that the model takes.

    Args:
        shape: (channels, height, width) of the model, None where any size goes.

    Raises:
        ValueError: not images, wrong channels or size, NaN or infinite values.
    """
    check_image_shape(x, shape)
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x.flatten(1))).any(dim=1).nonzero()[:, 0]
        raise ValueError(
            f"images hold NaN or infinite values, first in image {int(bad[0])} of this batch"
        )
    assert isinstance(x, Tensor)
    return x


def check_image_shape(x: Any, shape: tuple[int, int | None, int | None]) -> None:
    """Raise ValueError unless `x` is a float tensor [N, C, H, W] that the model takes; its values
    are not read.

    Args:
        shape: as in `check_images`.
    """
    is_dense = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta
    if not is_dense or x.dim() != 4 or x.dtype not in _FLOATS:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        got += "" if is_dense else " that is not dense or has no data"
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


def batches(images: Images) -> Iterable[tuple[Any, Any]]:
    """(batch, labels or None) of every source of images that the Python calls take."""
    if isinstance(images, Tensor):
        yield from ((x, None) for x in (images.split(64) if images.dim() else (images,)))
        return
    if not isinstance(images, Iterable):
        raise ValueError(
            "images must be a float tensor [N, C, H, W] or an iterable of such batches, got "
            f"{type(images).__name__}"
        )
    for item in images:
        if isinstance(item, tuple | list) and len(item) == 2:
            yield item[0], item[1]
        else:
            yield item, None


def calibration_chunks(
    images: Images,
    shape: tuple[int, int | None, int | None],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[Tensor]:
    """All calibration images in chunks of at most CHUNK_IMAGES, checked, fp32, on `device`.

    Args:
        ranks: keeps those chunks that are this rank's; the others are on the meta device, without
            data. Of a `Selection` only this rank's images are read.

    Raises:
        ValueError: fewer than two images, of different sizes, or that the model does not take.
    """
    own: dict[int, Tensor] = {}
    for number, batch in _own_chunks(images, shape, ranks):
        own[number] = batch.to(device, torch.float32)
    shapes = ranks.merge({number: tuple(c.shape) for number, c in own.items()})
    chunks = [own[n] if n in own else torch.empty(s, device="meta") for n, s in shapes.items()]
    count = sum(len(c) for c in chunks)
    if count < 2:
        raise ValueError(f"calibration needs at least 2 images, 32 are usual, got {count}")
    sizes = sorted({tuple(c.shape[2:]) for c in chunks})
    if len(sizes) > 1:
        shown = " and ".join(f"{h}×{w}" for h, w in sizes[:2])
        raise ValueError(f"calibration images must all have one size, got {shown}: resize them")
    return chunks


def _own_chunks(
    images: Images, shape: tuple[int, int | None, int | None], ranks: Ranks
) -> Iterator[tuple[int, Tensor]]:
    """Number and images of this rank's chunks, checked."""
    if isinstance(images, Selection):
        for number, (batch, _) in images.own(ranks, CHUNK_IMAGES):
            yield number, check_images(batch, shape)
        return
    count = 0
    for batch, _ in batches(images):
        for chunk in check_images(batch, shape).split(CHUNK_IMAGES):
            if len(chunk):
                if ranks.owns(count):
                    yield count, chunk
                count += 1


def own_batches(images: Images, ranks: Ranks) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Number and (batch, labels or None) of the batches that are this rank's.

    Of a `Selection` only these are read; every other source must give each rank the same batches.
    """
    if isinstance(images, Selection):
        yield from images.own(ranks, BATCH_IMAGES)
    else:
        yield from (item for item in enumerate(batches(images)) if ranks.owns(item[0]))


@dataclass(frozen=True)
class Preprocessing:
    """What turns a picture into a model's input: timm's data config, at the size the model takes.

    Args:
        shape: (channels, height, width) of the input.
        mean, std: per channel, of values in 0..1.
        interpolation, crop_pct, crop_mode: timm's names and meaning.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def from_config(
        cls, pretrained_cfg: Mapping[str, Any], shape: tuple[int, int | None, int | None]
    ) -> Preprocessing:
        """That of a model with timm's `pretrained_cfg`; timm's defaults where it says nothing.

        Args:
            shape: what the model takes; the config's own size where it is None.

        Raises:
            ValueError: a config that describes no preprocessing; it may come from a file.
        """
        from timm.data import resolve_data_config

        channels = shape[0]
        try:
            size = pretrained_cfg.get("input_size") or (channels, 224, 224)
            height, width = shape[1] or int(size[1]), shape[2] or int(size[2])
            config = resolve_data_config(
                {"input_size": (channels, height, width)}, pretrained_cfg=dict(pretrained_cfg)
            )
            made = cls(
                shape=(channels, height, width),
                mean=_per_channel(config["mean"], channels),
                std=_per_channel(config["std"], channels),
                interpolation=str(config["interpolation"]),
                crop_pct=float(config["crop_pct"]),
                crop_mode=str(config["crop_mode"]),
            )
        except Exception as error:  # timm checks nothing: whatever wrong types and sizes break
            raise ValueError(
                f"the model's data config describes no preprocessing ({shown(error)})"
            ) from error
        made._check()
        return made

    def _check(self) -> None:
        """Raise ValueError at the first field that prepares no picture."""
        fits: dict[str, tuple[bool, str]] = {
            "shape": (
                all(0 < n <= _LARGEST_SIDE for n in self.shape[1:]),
                f"sides from 1 to {_LARGEST_SIDE:,}",
            ),
            "mean": (all(map(math.isfinite, self.mean)), "finite numbers"),
            "std": (all(0 < v < math.inf for v in self.std), "finite numbers > 0"),
            "interpolation": (self.interpolation in _INTERPOLATIONS, " or ".join(_INTERPOLATIONS)),
            "crop_pct": (0.05 <= self.crop_pct <= 2, "a share from 0.05 to 2"),
            "crop_mode": (self.crop_mode in _CROP_MODES, " or ".join(_CROP_MODES)),
        }
        for name, (good, what) in fits.items():
            if not good:
                raise ValueError(
                    f"the model's data config: {name} must be {what}, got "
                    f"{shown(getattr(self, name))}"
                )

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's evaluation transform: picture → float [C, H, W], normalised.

        Raises:
            ValueError: a model that takes neither gray nor RGB pictures.
        """
        from timm.data import create_transform

        channels = self.shape[0]
        if channels not in (1, 3):
            raise ValueError(
                f"pictures have 1 or 3 channels, the model takes {channels}: give a tensor file "
                f"with float images [N, {channels}, H, W], already normalised"
            )
        apply = create_transform(
            input_size=self.shape,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        mode = "RGB" if channels == 3 else "L"
        return lambda picture: apply(picture.convert(mode))


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """`values`, or their mean in every channel of a model with another number of channels."""
    if len(values) == channels:
        return tuple(float(v) for v in values)
    return (sum(float(v) for v in values) / len(values),) * channels


@dataclass(frozen=True)
class ImageSource:
    """Images and labels behind a SRC; an image is read when it is asked for.

    Args:
        name: the SRC. size: number of images.
        read: image `i` as a picture, or as float [C, H, W] that is already normalised.
        labels: int64 [size], or None. classes: names of the class folders; elsewhere empty.
    """

    name: str
    size: int
    read: Callable[[int], Image.Image | Tensor]
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def draw(self, n: int, seed: int) -> list[int]:
        """Indices of `n` images drawn by `seed`, all in random order if there are no more."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randperm(self.size, generator=rng)[:n].tolist()

    def batches(
        self, preprocessing: Preprocessing, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(float [≤ BATCH_IMAGES, C, H, W], int64 labels or None) of these images, of all if None.

        Raises:
            ValueError: an image that cannot be read, by its name.
        """
        chosen = range(self.size) if indices is None else indices
        transform: Callable[[Image.Image], Tensor] | None = None
        for start in range(0, len(chosen), BATCH_IMAGES):
            part = chosen[start : start + BATCH_IMAGES]
            images = []
            for i in part:
                image = self.read(i)
                if isinstance(image, Image.Image):
                    transform = transform or preprocessing.transform()
                    image = transform(image)
                images.append(image.float())
            labels = None if self.labels is None else self.labels[list(part)]
            yield torch.stack(images), labels


@dataclass(frozen=True)
class Selection:
    """Images of a source, in this order: batches for whoever iterates, or a rank's part of them."""

    source: ImageSource
    preprocessing: Preprocessing
    indices: Sequence[int]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return self.source.batches(self.preprocessing, self.indices)

    def own(self, ranks: Ranks, size: int) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
        """Number and batch, of `size` images but for the last one, of the batches of this rank.

        Args:
            size: 1..BATCH_IMAGES.
        """
        for start in range(ranks.rank * size, len(self.indices), ranks.size * size):
            part = self.indices[start : start + size]
            for batch in self.source.batches(self.preprocessing, part):
                yield start // size, batch


@dataclass(frozen=True)
class SyntheticSource(ImageSource):
    """Noise shaped to whatever input a model takes, for calibration without data."""

    def draw(self, n: int, seed: int) -> list[int]:
        """Names of `n` images: the number of its noise for each."""
        return [seed * self.size + i for i in range(n)]

    def batches(
        self, preprocessing: Preprocessing, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(float [≤ BATCH_IMAGES, C, H, W], None) of these images."""
        chosen = range(self.size) if indices is None else indices
        for start in range(0, len(chosen), BATCH_IMAGES):
            yield synthetic_images(preprocessing, chosen[start : start + BATCH_IMAGES]), None


_SYNTHETIC_SIZE = 1 << 16
# Share of the variance that the channels of a natural picture have in common, roughly.
_GRAY_SHARE = 0.9


def synthetic_images(preprocessing: Preprocessing, indices: Sequence[int]) -> Tensor:
    """Noise with the input statistics of a model, which its data config states, and no data.

    A data config's mean and std are those of the pixels that the model was trained on, so
    normalised images have mean 0 and variance 1; like natural pictures they have an amplitude
    spectrum of 1/f and channels that go together, and no pixel leaves 0..1.

    Args:
        indices: the number of each image; the same number is the same image.

    Returns:
        fp32 [N, C, H, W], normalised.
    """
    channels, height, width = preprocessing.shape
    f = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    amplitude = 1.0 / f.clamp(min=1.0 / max(height, width))
    images = []
    for index in indices:
        rng = torch.Generator().manual_seed(index % (1 << 64))
        noise = torch.randn(channels + 1, height, width, generator=rng)
        noise = _GRAY_SHARE**0.5 * noise[:1] + (1 - _GRAY_SHARE) ** 0.5 * noise[1:]
        image = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
        images.append(image)
    # In expectation, not image by image: pictures differ in brightness and contrast.
    weights = torch.full_like(f, 2.0)
    weights[:, 0] = 1.0
    if width % 2 == 0:
        weights[:, -1] = 1.0
    variance = (amplitude.square() * weights).sum() / (height * width)
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return (torch.stack(images) / variance.sqrt()).clamp((0.0 - mean) / std, (1.0 - mean) / std)


def open_images(src: str) -> ImageSource:
    """The images behind `src`.

    A folder of images, or of one sub-folder of images per class: the classes are numbered in the
    order of their names, as timm does (2 before 10). A `.npz` or `.safetensors` file with `images`
    (uint8 [N, H, W, C] or gray [N, H, W]; or float [N, C, H, W], already normalised) and maybe
    `labels` [N]; `FILE:calib_images` takes that array, with `calib_labels`. `demo` is the shipped
    file; `synthetic` is noise of the model's input statistics, for calibration without any data. A
    `.npz` array is held in memory as it is stored; everything else is read as needed.

    Raises:
        ValueError: what is wrong with the source, and what would be right.
    """
    if src == "synthetic" and not os.path.exists(src):
        return SyntheticSource(src, _SYNTHETIC_SIZE, _no_picture)
    path, array = _locate(src)
    if path.is_dir():
        return _open_folder(src, path)
    if path.suffix == ".npz":
        return _open_npz(src, path, array)
    if path.suffix == ".safetensors":
        return _open_safetensors(src, path, array)
    raise ValueError(
        f"{path}: a source of images is a folder, a .npz or a .safetensors file, not a "
        f"{path.suffix or 'bare'} file"
    )


def _no_picture(index: int) -> Image.Image | Tensor:
    raise ValueError(
        f"synthetic image {index} has no size of its own: batches() makes it for a model"
    )


def open_files(paths: Sequence[Path]) -> ImageSource:
    """These image files, in this order, without labels.

    Raises:
        ValueError: a file that does not exist.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such image file")
    return ImageSource("files", len(paths), lambda i: _read_picture(paths[i]))


def _locate(src: str) -> tuple[Path, str]:
    """Path and array name of PATH[:ARRAY]; a path that exists as written is one."""
    if os.path.exists(src) and src != "demo":
        return Path(src), "images"
    head, colon, array = src.rpartition(":")
    name = head if colon else src
    path = DEMO_FOLDER / "digits.npz" if name == "demo" else Path(name)
    if not os.path.exists(path):  # False, too, for a name that no file can have
        raise ValueError(f"{src}: no such folder or file of images")
    return path, array if colon else "images"


def _open_folder(src: str, folder: Path) -> ImageSource:
    visible = sorted((p for p in folder.iterdir() if p.name[0] != "."), key=_natural)
    plain = [p for p in visible if _is_picture(p)]
    folders = [p for p in visible if p.is_dir()]
    files = [sorted((p for p in f.iterdir() if _is_picture(p)), key=_natural) for f in folders]
    if plain and any(files):
        raise ValueError(
            f"{src} holds both images and folders of images, so it is unclear which have a class: "
            "name a folder with one kind only"
        )
    if plain:
        return ImageSource(src, len(plain), lambda i: _read_picture(plain[i]))
    paths = [p for part in files for p in part]
    if not paths:
        inside = f"; it holds the folders {_some([f.name for f in folders])}" if folders else ""
        raise ValueError(
            f"{src}: no images ({', '.join(IMAGE_SUFFIXES)}) in this folder or in folders directly "
            f"inside it, one per class{inside}"
        )
    labels = [label for label, part in enumerate(files) for _ in part]
    classes = tuple(f.name for f in folders)
    return ImageSource(
        src, len(paths), lambda i: _read_picture(paths[i]), torch.tensor(labels), classes
    )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key under which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)]


def _some(names: Sequence[str]) -> str:
    """The first names of a list."""
    return (", ".join(names[:6]) + (", …" if len(names) > 6 else "")) or "nothing"


def _read_picture(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that have nothing to do with the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
    except Exception as error:  # each of Pillow's readers raises what its format breaks
        raise ValueError(f"{path}: not a readable image ({shown(error)})") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: pixels of mode {picture.mode}; convert it to 8 bits a channel")
    # Pillow warns of transparency in a palette unless it goes through RGBA; same colours.
    return picture.convert("RGBA") if "transparency" in picture.info else picture


def _open_npz(src: str, path: Path, array: str) -> ImageSource:
    import numpy as np

    try:
        # numpy leaves a damaged file open that it has opened itself.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = list(file.files)
            held = {n: file[n] for n in (array, _labels_of(array)) if n in names}
    except Exception as error:  # zipfile, zlib, numpy and the OS each raise their own
        raise ValueError(
            f"{path}: not a readable .npz file of plain arrays ({shown(error)})"
        ) from error
    images = _required(path, array, names, held)
    for name, value in held.items():
        if not isinstance(value, np.ndarray):  # numpy gives the bytes of what is no array
            raise ValueError(f"{path}: {name} is no array")
    kind = images.dtype.kind
    _check_array(f"{path}: {array}", kind == "f", str(images.dtype), images.shape)
    labels = held.get(_labels_of(array))
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels must be integers [N], got {labels.dtype}")
    checked = _checked_labels(path, len(images), None if labels is None else labels.astype("int64"))

    def read(i: int) -> Image.Image | Tensor:
        if kind != "f":
            return _picture(images[i])
        # astype also turns float16, float64 and foreign byte orders into what torch takes; a value
        # beyond float32 becomes infinite, which `check_images` refuses.
        with np.errstate(over="ignore"):
            return torch.from_numpy(images[i].astype("float32"))

    return ImageSource(src, len(images), read, checked)


def _open_safetensors(src: str, path: Path, array: str) -> ImageSource:
    from safetensors import safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        names = list(file.keys())
        held = {n: file.get_slice(n) for n in (array, _labels_of(array)) if n in names}
        labels = file.get_tensor(_labels_of(array)) if _labels_of(array) in names else None
    except Exception as error:  # safetensors raises its own class, OSError and others
        raise ValueError(f"{path}: not a readable .safetensors file ({shown(error)})") from error
    images = _required(path, array, names, held)
    dtype, shape = str(images.get_dtype()), tuple(images.get_shape())
    is_float = dtype in ("F16", "BF16", "F32", "F64")
    _check_array(f"{path}: {array}", is_float, {"U8": "uint8"}.get(dtype, dtype), shape)
    if labels is not None and (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    ):
        raise ValueError(f"{path}: labels must be integers [N], got {labels.dtype}")
    checked = _checked_labels(path, shape[0], labels)

    def read(i: int) -> Image.Image | Tensor:
        image: Tensor = images[i]
        return image if is_float else _picture(image.numpy())

    return ImageSource(src, shape[0], read, checked)


def _labels_of(array: str) -> str:
    """The array of labels that belongs to an array of images: calib_images → calib_labels."""
    return array.removesuffix("images") + "labels"


def _required(path: Path, array: str, names: Sequence[str], held: Mapping[str, Any]) -> Any:
    if array not in held:
        raise ValueError(
            f"{path} has no array {array!r}, it has {_some(names)}; {path}:NAME takes another one"
        )
    return held[array]


def _check_array(what: str, is_float: bool, dtype: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless these are images, and at least one."""
    right = len(shape) == 4 if is_float else len(shape) == 3 or shape[3:] in ((1,), (3,))
    if not right or not (is_float or dtype == "uint8"):
        hint = ""
        if dtype == "uint8" and len(shape) == 4 and shape[1] in (1, 3):
            hint = "; these look like [N, C, H, W]: move the channels to the end"
        raise ValueError(
            f"{what} must be uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W], or float [N, C, H, W] "
            f"already normalised, got {dtype} {list(shape)}{hint}"
        )
    if 0 in shape:
        raise ValueError(f"{what} is empty: {list(shape)}")


def _checked_labels(path: Path, n: int, values: Any) -> Tensor | None:
    if values is None:
        return None
    labels = torch.as_tensor(values)
    if tuple(labels.shape) != (n,):
        raise ValueError(f"{path}: {n} images need labels [{n}], got {list(labels.shape)}")
    labels = labels.long()
    if bool((labels < 0).any()):
        raise ValueError(f"{path}: labels must be class indices >= 0, got {int(labels.min())}")
    return labels


def _picture(pixels: Any) -> Image.Image:
    """A uint8 array [H, W], [H, W, 1] or [H, W, 3] as a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)

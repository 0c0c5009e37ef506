"""Sources of images: picture files, tensor files and folders, damaged or made up."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_bytes
from torch import Tensor

from erq.data import Preprocessing, check_images, open_files, open_images
from tests.fuzz import mutate
from tests.fuzz.files import folder
from tests.fuzz.target import Target, attempt, require

RECIPE = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9, "center")
_TYPES = ("|u1", "|i1", "<i8", ">i4", "<u8", "<f4", ">f4", "<f8", "<f2", "|b1", "<c8", "<U3", "|S4",
          "<M8[s]", "|V3", "<f16")  # fmt: skip
_SIDES = (0, 1, 2, 3, 4, 5, 8)


@cache
def sound() -> dict[str, list[bytes]]:
    """Sound files by suffix."""
    pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    rgb, out = Image.fromarray(pixels), {}
    palette = rgb.convert("P")
    palette.info["transparency"] = 3
    kinds: dict[str, list[tuple[Image.Image, str, dict[str, Any]]]] = {
        "png": [
            (rgb, "PNG", {}), (palette, "PNG", {"transparency": 3}), (rgb.convert("LA"), "PNG", {}),
            (rgb.convert("I;16"), "PNG", {}), (rgb.convert("1"), "PNG", {}),
        ],
        "jpg": [(rgb, "JPEG", {}), (rgb.convert("CMYK"), "JPEG", {}),
                (rgb, "JPEG", {"progressive": True})],
        "bmp": [(rgb, "BMP", {}), (palette, "BMP", {})],
        "ppm": [(rgb, "PPM", {})],
        "pgm": [(rgb.convert("L"), "PPM", {})],
        "tiff": [(rgb, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}),
                 (rgb.convert("F"), "TIFF", {})],
        "webp": [(rgb, "WEBP", {}), (rgb, "WEBP", {"lossless": True})],
        "gif.png": [(palette, "GIF", {})],
    }  # fmt: skip
    for suffix, images in kinds.items():
        out[suffix] = []
        for image, form, options in images:
            held = io.BytesIO()
            image.save(held, form, **options)
            out[suffix].append(held.getvalue())
    return out


def _array(rng: random.Random, images: bool) -> Any:
    """An array as an .npz may hold it."""
    if rng.random() < 0.5:
        base: Any = rng.choice(
            (np.ones((2, 5, 4, 3), np.uint8), np.ones((2, 5, 4), np.uint8),
             np.ones((2, 3, 8, 8), np.float32), np.ones((2, 3, 8, 8), ">f8"))
        ) if images else np.array([0, 1])  # fmt: skip
        if base.dtype.kind == "f" and rng.random() < 0.4:
            base = base.copy()
            with np.errstate(over="ignore"):
                base.reshape(-1)[rng.randrange(base.size)] = rng.choice(mutate.FLOATS)
        return base
    shape = tuple(rng.choice(_SIDES) for _ in range(rng.randrange(6)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.zeros(shape, rng.choice(_TYPES))


def _npz(rng: random.Random) -> bytes:
    held = io.BytesIO()
    arrays = {"images": _array(rng, True), "labels": _array(rng, False)}
    if rng.random() < 0.3:
        del arrays[rng.choice(("images", "labels"))]
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(held, **arrays)
    data = held.getvalue()
    if rng.random() < 0.2:  # a shape that the header promises and the file does not hold
        data = data.replace(b"'shape': (2, ", rng.choice((b"'shape': (9, ", b"'shape': (-1,")))
    return data


def _safetensors(rng: random.Random) -> bytes:
    types = [
        torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64,
        torch.bool, torch.int8, torch.float8_e4m3fn, torch.uint16, torch.complex64,
    ]  # fmt: skip
    tensors = {}
    for name, shape in (("images", (2, 8, 8, 3)), ("labels", (2,))):
        if rng.random() < 0.9:
            if rng.random() < 0.4:
                shape = tuple(rng.choice(_SIDES) for _ in range(rng.randrange(5)))
            dtype = rng.choice(types[:2] if rng.random() < 0.5 else types)
            if name == "labels" and rng.random() < 0.5:
                dtype = torch.int64
            if name == "images" and dtype != torch.uint8 and shape == (2, 8, 8, 3):
                shape = (2, 3, 8, 8)
            tensors[name] = torch.ones(shape).to(dtype)
    return bytes(to_bytes(tensors))


def _huge_png(rng: random.Random) -> bytes:
    """A PNG whose header promises more pixels than there are."""
    sides = struct.pack(
        ">II", rng.choice((1, 4096, 20_000, 2**31 - 1)), rng.choice((1, 9000, 65535))
    )
    chunk = b"IHDR" + sides + bytes((8, 2, 0, 0, 0))
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + sound()["png"][0][33:]


class Pictures(Target):
    """What `open_images` and `open_files` read: float images [N, 3, H, W], or one ValueError."""

    name = "pictures"

    def make(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.55:
            suffix = rng.choice(list(sound()))
            data = rng.choice(sound()[suffix])
            if rng.random() < 0.97:
                others = [d for held in sound().values() for d in held]
                data = mutate.data(rng, data, others)
        elif kind < 0.56:
            suffix, data = "png", _huge_png(rng)
        elif kind < 0.75:
            suffix, data = "npz", _npz(rng)
            if rng.random() < 0.5:
                data = mutate.data(rng, data)
        elif kind < 0.92:
            suffix, data = "safetensors", _safetensors(rng)
            if rng.random() < 0.5:
                data = mutate.data(rng, data)
        else:
            names = ("a.png", "b.jpg", "0/a.png", "1/b.png", "10/c.png", "d/", ".h.png", "t.txt",
                     "x.png/", "1/.png", "é/é.png", "²/1.png", "l.png@a.png", "loop.png@loop.png",
                     "gone.png@nothing", "up@..", "q/z.PNG", "same@.")  # fmt: skip
            chosen = rng.sample(names, rng.randrange(7))
            suffix, data = "", json.dumps(chosen).encode()
        return suffix.encode() + b"\n" + data

    def check(self, case: bytes) -> str:
        suffix, _, data = case.partition(b"\n")
        path = folder() / f"case.{suffix.decode()}"
        if not suffix:
            path = folder() / "folder"
            _build(path, json.loads(data))
        else:
            path.write_bytes(data)
        if suffix and suffix not in (b"npz", b"safetensors"):
            run: Any = lambda: open_files([path])  # noqa: E731
        else:
            run = lambda: open_images(str(path))  # noqa: E731
        source, refused = attempt(run, ValueError)
        if source is None:
            return refused
        found, refused = attempt(lambda: list(source.batches(RECIPE)), ValueError, start=str(path))
        if found is None:
            return refused
        total = 0
        for images, labels in found:
            require(images.dtype == torch.float32 and images.dim() == 4, f"{images.shape}")
            require(labels is None or labels.dtype == torch.int64, "labels are not int64")
            require(labels is None or len(labels) == len(images), "as many labels as images")
            total += len(images)
            if suffix not in (b"npz", b"safetensors"):
                require(tuple(images.shape[1:]) == (3, 8, 8), f"a picture became {images.shape}")
                require(bool(torch.isfinite(images).all()), "a picture became NaN")
            attempt(lambda part=images: check_images(part, (3, 8, 8)), ValueError)
        require(total == source.size, f"{source.size} images, {total} of them came")
        if suffix == b"png" and data == sound()["png"][0]:
            require(torch.equal(found[0][0], _first()), "a sound picture became another one")
        return f"accepted {suffix.decode()}"


@cache
def _first() -> Tensor:
    file = folder() / "first.png"
    file.write_bytes(sound()["png"][0])
    return next(iter(open_files([file]).batches(RECIPE)))[0]


def _build(place: Path, names: list[str]) -> None:
    """A folder with these names: NAME/ is a folder, NAME@TARGET a symbolic link."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in names:
        link, at, target = name.partition("@")
        path = place / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if at:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif not path.exists():
            path.write_bytes(sound()["png"][0])

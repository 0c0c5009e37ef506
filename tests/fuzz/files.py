"""Checkpoints: bytes of files, and headers and tensors whose digests are made to fit."""

from __future__ import annotations

import atexit
import io
import json
import math
import random
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from timm.layers import weight_init
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import erq
from erq.deployment import checkpoint
from erq.hub import describe_checkpoint
from erq.inputs import class_names, image_shape, preprocessing
from erq.page import sections
from erq.report import checkpoint_tables, to_plain
from tests.fuzz import mutate
from tests.fuzz.target import Target, attempt, require

MIXED = {
    "w_bits": 3,
    "a_bits": 6,
    "image_bits": 8,
    "overrides": {"head": {"a_bits": 16}, "*.qk": {"a_bits": 5}, "*.fc2": {"w_bits": 8}},
}


@dataclass(frozen=True)
class Sound:
    """A sound checkpoint, what is in it, and what its network computes."""

    data: bytes
    header: dict[str, Any]
    tensors: dict[str, Tensor]
    x: Tensor
    y: Tensor


def vit() -> nn.Module:
    """A ViT of one block and five tokens."""
    return VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0
    )


def swin() -> nn.Module:
    """A Swin of two stages with one block each."""
    return SwinTransformer(
        img_size=16, patch_size=2, num_classes=5, embed_dim=16, depths=(1, 1), num_heads=(2, 4),
        window_size=4, mlp_ratio=2.0,
    )  # fmt: skip


@cache
def folder() -> Path:
    """Where this process puts its files."""
    place = Path(tempfile.mkdtemp(prefix="erq-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@cache
def networks() -> dict[str, Any]:
    """Deployed networks by name, always the same ones."""
    out = {}
    for name, build, size, config in (
        ("vit", vit, 8, "w4a4"), ("mixed", vit, 8, MIXED), ("swin", swin, 16, "w4a4"),
    ):  # fmt: skip
        torch.manual_seed(7)
        model = build().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        out[name] = erq.deploy(erq.quantize(model, torch.randn(4, 3, size, size), config))
    return out


@cache
def corpus() -> dict[str, Sound]:
    """The checkpoints of `networks`."""
    out = {}
    for name, net in networks().items():
        file = folder() / f"{name}.safetensors"
        erq.save(net, file)
        header, tensors = checkpoint._read(file)
        shape = image_shape(net)
        x = torch.randn(
            1, *(n or 16 for n in shape or ()), generator=torch.Generator().manual_seed(3)
        )
        with torch.no_grad():
            y = erq.load(file, backend="reference")(x)
        out[name] = Sound(file.read_bytes(), header, tensors, x, y)
    return out


def _which(rng: random.Random) -> Sound:
    return corpus()[rng.choice(("vit",) * 6 + ("mixed",) * 3 + ("swin",))]


@contextmanager
def unfilled() -> Iterator[None]:
    """Meta tensors are not filled: that takes longer than all the rest of a case."""
    fill = weight_init._trunc_normal_
    weight_init._trunc_normal_ = lambda tensor, *_: tensor
    try:
        yield
    finally:
        weight_init._trunc_normal_ = fill


def _load(case: bytes) -> tuple[Any, str, Path]:
    """(network or None, the outcome of a refusal, file) of the bytes of a file."""
    file = folder() / "case.safetensors"
    file.write_bytes(case)
    with unfilled():
        net, refused = attempt(
            lambda: erq.load(file, backend="reference"), erq.CheckpointError, start=f"{file}: "
        )
    require(file.read_bytes() == case, "loading changed the file")
    return net, refused, file


class CheckpointBytes(Target):
    """Bytes of a checkpoint, changed anywhere: refused, or the same network bit by bit."""

    name = "checkpoint-bytes"

    def make(self, rng: random.Random) -> bytes:
        sound = _which(rng)
        if rng.random() < 0.02:
            return sound.data
        others = [s.data for s in corpus().values()]
        if rng.random() < 0.3:  # the header alone: JSON in safetensors' own and in ours
            length = struct.unpack("<Q", sound.data[:8])[0]
            head = mutate.data(rng, sound.data[8 : 8 + length], others)
            return struct.pack("<Q", len(head)) + head + sound.data[8 + length :]
        return mutate.data(rng, sound.data, others)

    @torch.no_grad()
    def check(self, case: bytes) -> str:
        net, refused, file = _load(case)
        header, _ = attempt(lambda: erq.inspect(file), erq.CheckpointError, start=f"{file}: ")
        if net is None:
            return refused
        require(header is not None, "load takes what inspect refuses")
        state = net.state_dict()
        for sound in corpus().values():
            if state.keys() == sound.tensors.keys() and all(
                torch.equal(t, sound.tensors[n]) for n, t in state.items()
            ):
                require(torch.equal(net(sound.x), sound.y), "the same tensors, other logits")
                return "accepted, unchanged"
        require(False, "a changed file was taken")
        return ""


class CheckpointHeaders(Target):
    """Headers and tensors changed, digests made to fit: refused, or a network that works."""

    name = "checkpoint-headers"

    def make(self, rng: random.Random) -> bytes:
        sound = _which(rng)
        header, tensors = sound.header, dict(sound.tensors)
        kind = rng.random()
        if kind < 0.75:
            header = mutate.tree(rng, header, skip=("tensors", "sha256"))
        if kind > 0.6:
            for _ in range(rng.choice((1, 1, 2))):
                _change_tensor(rng, tensors)
        header = json.loads(json.dumps(header))
        checkpoint._sign(header, tensors)
        try:
            return bytes(to_bytes(tensors, metadata={"erq": json.dumps(header)}))
        except SafetensorError:  # its header has an upper limit
            return sound.data

    @torch.no_grad()
    def check(self, case: bytes) -> str:
        net, refused, file = _load(case)
        if net is None:
            attempt(lambda: erq.inspect(file), erq.CheckpointError, start=f"{file}: ")
            return refused
        channels, height, width = image_shape(net) or (3, 8, 8)
        shape = (1, channels, height or 16, width or 16)
        x = torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
        y = net(x)
        require(y.shape[0] == 1 and y.dim() == 2, f"logits of shape {list(y.shape)}")
        recipe, no_recipe = attempt(lambda: preprocessing(net), ValueError)
        if recipe is not None:
            attempt(recipe.transform, ValueError)
        class_names(net)
        # What takes longer is done for a part of the cases, decided by their bytes.
        if zlib.crc32(case) % 4 == 0:
            _describe(file)
            erq.summary(net)
            self._round_trip(net, file, x, y)
        return f"accepted {no_recipe}"

    def _round_trip(self, net: Any, file: Path, x: Tensor, y: Tensor) -> None:
        again = folder() / "again.safetensors"
        with unfilled():
            erq.save(net, again)
            twice = erq.load(again, backend="reference")(x)
        saved, given = checkpoint._read(again)[0], checkpoint._read(file)[0]
        for key in ("family", "architecture", "arch_kwargs", "pretrained_cfg", "calibration"):
            same = json.dumps(saved[key]) == json.dumps(given[key])
            require(same, f"{key} changed by loading and saving")
        require(torch.equal(twice.nan_to_num(), y.nan_to_num()), "other logits after saving")


def _change_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        other = rng.choice((f"{name}x", *mutate.TEXTS[:20]))
        tensors[other.encode(errors="replace").decode()] = tensor
    elif kind == 2:
        types = (torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool)
        tensors[name] = tensor.to(rng.choice(types))
    elif kind == 3:
        flat = tensor.reshape(-1)
        tensors[name] = rng.choice((flat[:-1], flat[:0], torch.cat([flat, flat]), tensor[None]))
    elif tensor.numel() and tensor.dtype != torch.bool:
        flat = tensor.reshape(-1)
        at = rng.randrange(len(flat))
        if tensor.is_floating_point():
            number = rng.choice((*mutate.FLOATS, rng.uniform(-3, 3)))
            flat[slice(None) if kind == 4 else at] = torch.tensor(number, dtype=torch.float64)
        else:
            limits = torch.iinfo(tensor.dtype)
            number = rng.choice((limits.min, limits.max, 0, 1, -1, -128, 127, 300, 2**24, 9))
            flat[slice(None) if kind == 4 else at] = min(max(number, limits.min), limits.max)
        tensors[name] = flat.reshape(tensor.shape)


def _describe(file: Path) -> None:
    """What `erq inspect` and `erq report` show of a file."""
    header = describe_checkpoint(file)
    text, table = checkpoint_tables(file, header)
    console = Console(file=io.StringIO(), width=200)
    console.print(Text(text))
    console.print(table)
    json.dumps(to_plain(header), allow_nan=False)
    for section in sections(header, 1000, None, {}, []):
        repr(section)

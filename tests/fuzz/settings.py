"""Settings as Python values and as texts, and command lines."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import typer.testing
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import erq
from erq import cli, demonstration, export, loading, pipeline, timing
from erq.config import PRESETS, QuantConfig, as_config
from erq.options import as_settings
from tests.fuzz import mutate
from tests.fuzz.files import corpus, folder, unfilled, vit
from tests.fuzz.target import Finding, Target, attempt, require

USAGE = typer.BadParameter.__mro__[1]
"""What bad usage is an error of; it moved from click into typer."""
SITES = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.qk", "blocks.11.mlp.fc2", "head")


class Settings(Target):
    """`QuantConfig` from dicts, presets and the texts of `--set`: refused, or the same again."""

    name = "settings"

    def make(self, rng: random.Random) -> bytes:
        start = QuantConfig.preset(rng.choice(PRESETS)).to_dict()
        start["overrides"] = {"head": {"a_bits": 16}, "*.fc?": {"w_bits": 3, "refine": "off"}}
        start["keep_float"] = ["patch_embed.*"]
        how = rng.choice(("dict", "dict", "as_config", "preset", "paper", "texts", "texts"))
        if how == "dict":
            value: Any = mutate.tree(rng, start)
        elif how == "as_config":
            value = rng.choice((mutate.value(rng), mutate.tree(rng, start)))
        elif how in ("preset", "paper"):
            changes = mutate.tree(rng, {"w_bits": 4, "seed": 0, "overrides": {}})
            value = [_preset(rng), changes if rng.random() < 0.5 else {}]
        else:
            value = [_preset(rng), [_assignment(rng) for _ in range(rng.randrange(1, 4))]]
        return json.dumps([how, value]).encode()

    def check(self, case: bytes) -> str:
        how, value = json.loads(case)
        if how == "texts":
            run: Any = lambda: as_settings(value[0], None, value[1], None, False)  # noqa: E731
        elif how == "dict":
            run = lambda: QuantConfig.from_dict(value)  # noqa: E731
        elif how == "as_config":
            run = lambda: as_config(value)  # noqa: E731
        else:
            made = getattr(QuantConfig, how)
            run = lambda: made(value[0], **value[1]) if _keywords(value[1]) else made(value[0])  # noqa: E731
        config, refused = attempt(run, ValueError, USAGE)
        if config is None:
            return refused
        again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        require(again == config, f"{config} came back as {again}")
        for site in SITES:
            own = config.for_site(site)
            require(2 <= own.w_bits <= 8 and own.a_bits in (*range(2, 9), 16), f"{site}: {own}")
            config.keeps_float(site)
            float(own.ridge_act), float(own.ridge_weight)
        torch.Generator().manual_seed(config.seed)
        attempt(lambda: config.check_globs(list(SITES)), ValueError)
        return "accepted"


def _keywords(value: Any) -> bool:
    return isinstance(value, dict)


def _preset(rng: random.Random) -> Any:
    if rng.random() < 0.5:
        return rng.choice(PRESETS)
    return mutate.text(rng, rng.choice(PRESETS)) if rng.random() < 0.7 else mutate.text(rng, "")


def _assignment(rng: random.Random) -> str:
    name = rng.choice(("w_bits", "a_bits", "refine", "dual", "ridge_act", "overrides", "seed",
                       "keep_float", "head.a_bits", "*.fc2.w_bits", "blocks.0.*.aqer"))  # fmt: skip
    value = rng.choice(("4", "16", "'off'", "off", "True", "1e3", "{'head': {'a_bits': 16}}",
                        "['head']", str(mutate.scalar(rng))[:300], "[" * rng.choice((5, 300)),
                        "{[]: 1}", "1" * 5000, "'\\d'", "(1).x", "-" * 2000 + "1"))  # fmt: skip
    text = f"{name}={value}"
    return mutate.text(rng, text) if rng.random() < 0.5 else text


@cache
def _command(app: typer.Typer) -> Any:
    """What typer makes of the functions; it would make it anew for every case."""
    return typer.main.get_command(app)


class Reached(ValueError):
    """What heavy work is replaced by."""


def _reached(*_: Any, **__: Any) -> Any:
    raise Reached("the work that the command line asks for would begin here")


@contextmanager
def _light() -> Iterator[None]:
    """Calibration, timing and downloads are not done; everything before them is."""
    import timm

    def create(name: str, **kwargs: Any) -> nn.Module:
        if kwargs.pop("pretrained", False):
            raise RuntimeError("no connection")
        if kwargs:
            raise TypeError(f"unexpected arguments {', '.join(kwargs)}")
        return vit().eval()

    replaced: list[tuple[Any, str, Any]] = [
        (typer.testing, "_get_command", _command),
        (pipeline, "quantize", _reached), (timing, "benchmark", _reached),
        (timing, "compare", _reached), (demonstration, "demonstrate", _reached),
        (export, "export_onnx", _reached), (loading, "_hub_answers", lambda: False),
        (timm, "create_model", create),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, new in replaced:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


@cache
def _place() -> Path:
    """A folder with a checkpoint, pictures and tensor files."""
    place = folder() / "cli"
    place.mkdir()
    (place / "net.safetensors").write_bytes(corpus()["vit"].data)
    (place / "cut.safetensors").write_bytes(corpus()["vit"].data[:-1])
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    for name in ("pictures/a", "pictures/b", "classes/0/a", "classes/1/b"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{name}.png")
    np.savez(place / "images.npz", images=np.stack([pixels] * 2), labels=np.array([0, 1]))
    np.savez(place / "wide.npz", images=np.zeros((1, 8, 8, 4), np.uint8))
    return place


WORDS = (
    "quantize", "eval", "report", "bench", "inspect", "predict", "export", "models",
    "info", "demo", "demo", "--onnx", "--codes",
    "synthetic", "NET", "CUT", "PICTURE", "PICTURES", "CLASSES", "NPZ", "WIDE", "NPZ:images", "OUT",
    "OUT/x", "vit_tiny_patch16_224", "torchvision:vit_b_16", "swinv2_tiny", "--images", "--out",
    "--bits", "--n", "--set", "--method", "--seed", "--paper", "--json", "--quiet", "--debug",
    "--backend", "--device", "--random-weights", "--weights", "--model-arg", "--target-bits",
    "--reference", "--limit", "--sites", "--no-sites", "--batch", "--seconds", "--against",
    "--resume", "--version", "--help", "cpu", "cuda", "cuda:7", "auto", "reference", "triton",
    "torch", "w4a4", "w4a16", "1", "8", "0", "-1", "1,8", "nan", "1e400", "a_bits=4",
    "head.a_bits=16",
)  # fmt: skip
LINES = (
    ["quantize", "vit_tiny_patch16_224", "--random-weights", "--images", "NPZ", "--out", "OUT"],
    ["quantize", "demo", "--images", "NPZ", "--out", "OUT", "--set", "head.a_bits=16", "--n", "8"],
    ["eval", "NET", "--images", "NPZ", "--limit", "1"],
    ["eval", "NET", "--images", "PICTURES", "--reference", "NET", "--quiet"],
    ["report", "NET", "--images", "CLASSES", "--batch", "0", "--out", "OUT"],
    ["bench", "NET", "--batch", "1", "--seconds", "0.1", "--against", "torch"],
    ["inspect", "NET", "--json"],
    ["predict", "NET", "PICTURE", "PICTURE", "--backend", "reference"],
    ["export", "NET", "--onnx", "OUT"], ["models"], ["info"],
    ["demo", "--bits", "w4a4", "--out", "OUT"],
)  # fmt: skip


class CommandLines(Target):
    """Arguments of `erq`: it does what they say, or says in one line why not."""

    name = "command-lines"

    def make(self, rng: random.Random) -> bytes:
        words = list(rng.choice(LINES))
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            at = rng.randrange(len(words) + 1)
            kind = rng.randrange(6)
            if kind == 0 and words:
                del words[at : at + 1]
            elif kind == 1:
                words.insert(at, rng.choice(WORDS))
            elif kind == 2:
                words[at : at + 1] = [rng.choice(WORDS)]
            elif kind == 3:
                words[at : at + 1] = [str(mutate.scalar(rng))[:2000]]
            elif kind == 4 and at < len(words):
                words[at] = mutate.text(rng, words[at])
            else:
                words.insert(at, _assignment(rng)[:2000])
        return json.dumps(words).encode()

    def check(self, case: bytes) -> str:
        place = _place()
        out = place / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        names = {
            "NET": place / "net.safetensors", "CUT": place / "cut.safetensors",
            "PICTURES": place / "pictures", "PICTURE": place / "pictures/a.png",
            "CLASSES": place / "classes", "NPZ": place / "images.npz", "WIDE": place / "wide.npz",
            "NPZ:images": f"{place / 'images.npz'}:images", "OUT": out / "net.safetensors",
            "OUT/x": out / "none" / "x",
        }  # fmt: skip
        words = [str(names.get(w, w)) for w in json.loads(case)]
        with _light(), unfilled(), _inside(out):
            result = CliRunner().invoke(cli.app, words, prog_name="erq")
        left = sorted(p.name for p in out.rglob("*"))
        require(not any(".tmp" in name for name in left), f"left behind: {left}")
        code, error = result.exit_code, _cause(result.exception)
        require(code in (0, 1, 2), f"exit code {code}")
        if code == 0:
            require(result.stderr.count("\n") <= 3, f"stderr: {result.stderr[:300]}")
            if result.stdout.startswith("{"):
                json.loads(result.stdout)
            return f"accepted {words[0] if words else ''}"
        if not words:
            return "refused nothing"
        said = result.stderr
        if "Traceback" in said:
            require("--debug" in words, "a traceback that was not asked for")
            said = said.splitlines(keepends=True)[-1]
        require(said.startswith("erq") and said.count("\n") == 1, f"said {said[:300]!r}")
        require(len(said) <= 2000, f"a line of {len(said)} characters")
        require(result.stdout == "", f"stdout of a failure: {result.stdout[:200]!r}")
        allowed = (ValueError, erq.BackendError, USAGE)
        if not isinstance(error, allowed):
            raise Finding(f"{type(error).__name__} reached the user: {said[:200]}") from error
        return f"refused {code} {type(error).__name__}"


@contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _cause(error: BaseException | None) -> BaseException | None:
    """What the command raised, behind the exits that it was turned into."""
    while isinstance(error, SystemExit | typer.Exit):
        error = error.__cause__ or error.__context__
    return error

"""What the commands' options mean: their declarations, and from their text to values.

A text that cannot be right, whatever the files and the machine, is bad usage: typer.BadParameter.
"""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from erq.config import QuantConfig
    from erq.loading import TimmOptions


def _note_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.find_root().obj = {"debug": value}
    return value


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")]
Json = Annotated[
    bool, typer.Option("--json", help="Results as JSON on stdout, nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Traceback of a failure.", is_eager=True, callback=_note_debug),
]
Backend = Annotated[str, typer.Option(help="auto, reference, cpu, triton or cuda.")]
Source = Annotated[
    str,
    typer.Option(
        metavar="SRC",
        help="Folder of images (sub-folders are classes), or .npz / .safetensors with `images` and "
        "maybe `labels`; FILE:NAME takes another array; demo is the shipped one, synthetic noise "
        "for calibration without data.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help=".safetensors state dict of the timm model, fp32 or fp16.")
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="timm's initial weights, for a trial.")
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg", metavar="NAME=VALUE", help="For timm.create_model; may be repeated."
    ),
]


def as_device(name: str) -> torch.device:
    """The device that `--device` names, if it is there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"{name!r} is no device; use auto, cpu, cuda or cuda:1", param_hint="--device"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: only cpu and cuda are known", param_hint="--device")
    return device


def as_engines(names: str) -> list[str]:
    """Engine names by commas; none of them unknown."""
    from erq.engines import check_engine

    engines = [name.strip() for name in names.split(",") if name.strip()]
    for name in engines:
        try:
            check_engine(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--against") from error
    return engines


def check_backend_name(name: str) -> None:
    from erq_kernels.dispatch import check_backend

    try:
        check_backend(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from error


def check_out(out: str, license: str | None) -> None:
    """Raise before minutes of work if the file or folder cannot be written there."""
    from erq.hub import check_target, names_folder

    check_target(out, license=license)
    if not names_folder(out):
        check_file(Path(out))


def check_file(out: Path) -> None:
    """Raise before minutes of work if the file cannot be written there."""
    if not os.path.isdir(out.parent):
        raise ValueError(f"{out}: the folder {out.parent} does not exist; create it first")
    try:
        out.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{out}: {reason}; choose another name") from error
    if os.path.isdir(out):
        raise ValueError(f"{out} is a folder; name a file")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out}: the folder {out.parent} is not writable")


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # {[]: 1} is a TypeError; deep brackets are one of the last two


def _assignments(texts: list[str], option: str) -> Iterator[tuple[str, Any]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
        yield name.strip(), _value(value.strip())


def as_settings(
    bits: str, method: str | None, changes: list[str], seed: int | None, paper: bool
) -> QuantConfig:
    """The configuration that the options describe."""
    from erq.config import QuantConfig

    fields: dict[str, Any] = {}
    overrides: dict[str, dict[str, Any]] = {}
    for name, value in _assignments(changes, "--set"):
        glob, dot, field = name.rpartition(".")
        if dot:
            overrides.setdefault(glob, {})[field] = value
        else:
            fields[name] = value
    if method is not None:
        fields["method"] = method
    if seed is not None:
        fields["seed"] = seed
    try:
        base = QuantConfig.paper(bits) if paper else QuantConfig.preset(bits)
        return QuantConfig.from_dict({**base.to_dict(), "overrides": overrides, **fields})
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bits, --method, --set") from error


def as_timm_options(
    names: list[str], weights: Path | None, random_weights: bool, model_args: list[str] | None
) -> TimmOptions:
    """What the options say of those of the models `names` that are timm's."""
    from erq.loading import TimmOptions, is_timm_name

    options = TimmOptions(
        weights, random_weights, dict(_assignments(model_args or [], "--model-arg"))
    )
    if weights is not None and random_weights:
        raise typer.BadParameter("excludes --random-weights", param_hint="--weights")
    if options != TimmOptions() and not any(map(is_timm_name, names)):
        raise typer.BadParameter(
            f"they describe a timm model, {' and '.join(names)} is none",
            param_hint="--weights, --random-weights, --model-arg",
        )
    return options


def as_batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(
            f"{text!r} is no list of sizes >= 1, such as 1,8", param_hint="--batch"
        )
    return sizes


def quantize_command(
    model: str,
    images: str,
    bits: str,
    n: int,
    target_bits: float | None,
    weights: Path | None,
    random_weights: bool,
    model_args: list[str] | None,
    changes: list[str] | None,
    method: str | None,
    paper: bool,
    seed: int | None,
) -> str:
    """The command line that these options of `erq quantize` come from, but for its --out."""
    words = ["erq", "quantize", model, "--images", images, "--bits", bits, "--n", str(n)]
    single = {
        "--target-bits": target_bits, "--weights": weights, "--method": method, "--seed": seed,
    }  # fmt: skip
    for option, value in single.items():
        words += [] if value is None else [option, str(value)]
    for option, values in (("--model-arg", model_args), ("--set", changes)):
        for value in values or []:
            words += [option, value]
    words += ["--random-weights"] * random_weights + ["--paper"] * paper
    return shlex.join(words)

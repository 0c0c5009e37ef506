"""A packed model as one file, or as a folder that can be pushed to a hub as it is.

A folder holds the file, config.json and a model card. The file alone says what the model is:
config.json repeats what a program without a reader of safetensors wants to know, may be missing,
and must not contradict. So a folder whose files are replaced one by one, config.json removed first
and written last, is at every moment the old model or the new one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from erq.deployment import checkpoint
from erq.deployment.checkpoint import CheckpointError, write_atomically

if TYPE_CHECKING:
    from erq.evaluation import Evaluation

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LIBRARY = "erq"

_REPEATED = ("format", "family", "architecture", "pretrained_cfg", "config", "calibration")
"""Fields of the file's header that config.json repeats, besides the header's digest."""

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    evaluation: Evaluation | None = None,
    license: str | None = None,
) -> None:
    """Write a deployed model, byte for byte the same for the same model.

    Args:
        net: what `erq.deploy` or `erq.load` returned. Floats are stored as float32.
        path: a file; or, with a separator at its end or if it is an existing folder, a folder,
            which gets model.safetensors, config.json and README.md, a model card.
        evaluation: what `erq.evaluate` found, for the card.
        license: of the weights, for the card, as hubs write it (apache-2.0, cc-by-4.0, mit …); by
            default what timm says of them.

    What is there already is replaced only once everything new is complete; other files of a folder
    are left alone.

    Raises:
        ValueError: not a deployed model, or one that was changed since so that it would not load;
            an evaluation or a license for a file, which has no card.
        CheckpointError: the file or folder cannot be written; a file of the folder is not erq's, or
            its card was edited.
    """
    folder = Path(path)
    check_target(path, evaluation, license)
    if not names_folder(path):
        checkpoint.save(net, folder)
        return
    exists = os.path.isdir(folder)
    scratch = (folder if exists else folder.parent) / f".erq-{secrets.token_hex(8)}.tmp"
    try:
        scratch.mkdir()
        _write(net, scratch, evaluation, license)
        if exists:
            (folder / CONFIG).unlink(missing_ok=True)
            for name in (WEIGHTS, CARD, CONFIG):
                os.replace(scratch / name, folder / name)
        else:
            os.rename(scratch, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written ({error.strerror})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str | torch.device | None = None,
    weights: str = "int8",
) -> nn.Module:
    """A deployed model; needs neither the full-precision weights nor calibration.

    Args:
        path: what `erq.save` wrote, file or folder.
        backend: auto, reference, cpu, triton or cuda.
        device: where the model goes; the CPU by default.
        weights: how integer GEMMs keep theirs: int8, unpacked once, or packed, which takes less
            memory and is unpacked in the kernel.

    Raises:
        CheckpointError: the file, the tensor and what was expected; a folder without weights, or
            whose config.json contradicts them.
        ValueError: an unknown backend or layout. BackendError: a forced backend that cannot run.
    """
    return checkpoint.load(weights_file(path), backend, device, weights)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a checkpoint whose bytes are sound, with `size_bytes` and `parameters`.

    Args:
        path: what `erq.save` wrote, file or folder.

    Returns:
        The fields of docs/formats.md but the digests; `config` with every field.

    Raises:
        CheckpointError: as `load`.
    """
    return checkpoint.inspect(weights_file(path))


def describe_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Header of a checkpoint after `erq.inspect`'s checks, with the stored bytes of every site.

    Raises:
        CheckpointError: the file and what is wrong with it.
    """
    header = inspect(path)
    with weights_file(path).open("rb") as file:
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, site in header["sites"].items():
        site["bytes"] = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for key, entry in tensors.items()
            if key.startswith(f"{name}.")
        )
    return header


def names_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `save` writes a folder there."""
    ends = tuple(s for s in (os.sep, os.altsep) if s)
    return os.fspath(path).endswith(ends) or os.path.isdir(path)


def check_target(
    path: str | os.PathLike[str], evaluation: Evaluation | None = None, license: str | None = None
) -> None:
    """Raise what `save` would, as far as it can be known without a model and of a folder."""
    folder = Path(path)
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"license must be an identifier such as apache-2.0, got {license!r}")
    if not names_folder(path):
        if evaluation is not None or license is not None:
            raise ValueError(
                f"{folder}: a file has no card for an evaluation or a license; name a folder "
                f"({folder}/)"
            )
        return
    if "\0" in os.fspath(folder):
        raise CheckpointError(f"{folder!r} could not be written: no name has a null character")
    where = folder if os.path.isdir(folder) else folder.parent
    if where == folder:
        for name in (WEIGHTS, CONFIG, CARD):
            _check_own(folder / name)
    elif os.path.lexists(folder):
        raise CheckpointError(f"{folder} is a file; name a folder, or the file without a separator")
    elif not os.path.isdir(where):
        raise CheckpointError(f"{folder}: the folder {where} does not exist; create it first")
    if not os.access(where, os.W_OK):
        raise CheckpointError(f"{folder}: the folder {where} is not writable")


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or that of a folder.

    Raises:
        CheckpointError: a folder without weights, or whose config.json contradicts them.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return folder
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: a folder without {WEIGHTS}; name a file or a folder that erq.save wrote"
        )
    _check_config(folder / CONFIG, _header(file))
    return file


def add_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write what was measured into config.json and the card of a folder that `save` wrote.

    Raises:
        CheckpointError: not such a folder, or its card was edited.
    """
    file = weights_file(folder)
    if file == folder or not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is no folder with a {CONFIG}; erq.save writes one")
    for name in (CONFIG, CARD):
        _check_own(folder / name)
    config = _read_config(folder / CONFIG)
    config["evaluation"] = _plain(evaluation)
    _write_texts(folder, config)


def _write(
    net: nn.Module, folder: Path, evaluation: Evaluation | None, license: str | None
) -> None:
    """The three files of an empty folder."""
    file = folder / WEIGHTS
    checkpoint.save(net, file)
    header = _header(file)
    sites = header["sites"]
    state = net.state_dict()
    others = sum(t.numel() for n, t in state.items() if n.rpartition(".")[0] not in sites)
    shapes = [(*s["shape"], s["bias"]) for s in sites.values() if "shape" in s]
    known = header["pretrained_cfg"].get("license")
    config = {
        "library_name": LIBRARY,
        **{key: header[key] for key in _REPEATED},
        "num_classes": getattr(net, "num_classes", None),
        "created_by": header["created_by"],
        "sha256": header["sha256"],
        "sizes": {
            "file": file.stat().st_size,
            "fp32": 4 * (others + sum(n * k + n * bias for n, k, bias in shapes)),
        },
        "sites": len(sites),
        "license": license or (known if isinstance(known, str) else None),
        "evaluation": None if evaluation is None else _plain(evaluation),
    }
    _write_texts(folder, config)


def _write_texts(folder: Path, config: dict[str, Any]) -> None:
    from erq.card import model_card

    write_atomically(folder / CARD, model_card(config).encode())
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    """JSON knows no infinity, which a SQNR may be."""
    found = evaluation.to_dict()
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in found.items()}


def _header(file: Path) -> dict[str, Any]:
    """A checkpoint's header, or {} where `checkpoint.load` will say what is wrong."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})["erq"])
    except Exception:  # safetensors raises its own, OSError, MemoryError, …
        return {}
    return header if isinstance(header, dict) else {}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise CheckpointError(f"{file} was not written by erq: its library_name is not {LIBRARY!r}")
    return config


def _check_config(file: Path, header: dict[str, Any]) -> None:
    """Raise CheckpointError unless config.json, if it is there, agrees with the header."""
    if not header or not os.path.lexists(file):
        return
    config = _read_config(file)
    for key in (*_REPEATED, "sha256"):
        if config.get(key) != header.get(key):
            raise CheckpointError(
                f"{file}: {key} is {_short(config.get(key))}, but {_short(header.get(key))} in "
                f"{WEIGHTS}: the two do not belong together; take both from one erq.save, or "
                f"delete {CONFIG}, which loading does not need"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _check_own(file: Path) -> None:
    """Raise CheckpointError if a file is there that erq did not write."""
    if not os.path.lexists(file):
        return
    if file.name == CARD:
        from erq.card import is_untouched

        own = is_untouched(file)
    elif file.name == CONFIG:
        _read_config(file)
        own = True
    else:
        own = bool(_header(file))
    if not own:
        raise CheckpointError(
            f"{file} was not written by erq, or was edited since, and is not replaced; move it "
            "away or name another folder"
        )

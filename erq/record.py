"""What a run has decided so far, as bytes: for its other ranks, and in a file to resume from.

The bytes are those of a .safetensors file: tensors, and in the header one JSON value that says what
they are the fields of. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from erq._version import __version__
from erq.calib.heads import Basis, HeadBases
from erq.calib.reparam import Fold
from erq.deployment.checkpoint import write_atomically
from erq.quant import AffineParams, DualAffineParams, LogParams
from erq.ranks import Ranks
from erq.reduce.allocation import SiteBits
from erq.reduce.site import SiteReport, Solution

FORMAT = 1

_CLASSES: dict[str, type] = {
    c.__name__: c
    for c in (
        AffineParams,
        DualAffineParams,
        LogParams,
        Fold,
        Basis,
        HeadBases,
        SiteBits,
        SiteReport,
        Solution,
    )
}


class RecordError(ValueError):
    """A file to resume from that is damaged, or of another run; names it and what differs."""


def encode(value: Any) -> bytes:
    """Bytes of numbers, texts, tensors, lists, tuples, mappings and the dataclasses of this project
    that decisions are made of."""
    tensors: dict[str, Tensor] = {}
    form = _form(value, tensors)
    return to_bytes(tensors, metadata={"erq": json.dumps(form)})


def decode(data: bytes, device: torch.device) -> Any:
    """The value that `encode` was given, its tensors on `device`; a list comes back as a tuple.

    Raises:
        ValueError: bytes that `encode` did not make.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        form = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["erq"])
        tensors = {name: t.to(device) for name, t in from_bytes(data).items()}
        return _value(form, tensors)
    except Exception as error:  # safetensors and the JSON parser each raise their own
        raise ValueError(f"not an encoded value ({type(error).__name__}: {error})") from error


def _form(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under their numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[k, _form(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_form(v, tensors) for v in value]
    if is_dataclass(value):
        held = {f.name: _form(getattr(value, f.name), tensors) for f in fields(value)}
        return {"class": type(value).__name__, "fields": held}
    return value


def _value(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(form, list):
        return tuple(_value(v, tensors) for v in form)
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        return tensors[form["tensor"]]
    if "mapping" in form:
        return {k: _value(v, tensors) for k, v in form["mapping"]}
    held = {name: _value(v, tensors) for name, v in form["fields"].items()}
    return _CLASSES[form["class"]](**held)


class Record:
    """Decisions of one run by name; with a path they are kept in that file, else nowhere.

    Args:
        path: the file. identity: what the decisions follow from, as digests or short texts.
        values: decisions of an interrupted run.
    """

    def __init__(
        self,
        path: Path | None = None,
        identity: Mapping[str, str] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = path
        self._identity = dict(identity or {})
        self._values = dict(values or {})
        self._changed = False

    @classmethod
    def open(
        cls, path: Path, identity: Mapping[str, str], ranks: Ranks, device: torch.device
    ) -> Record:
        """The record of an interrupted run, or an empty one if there is no such file.

        Raises:
            RecordError: a file that is damaged, or whose identity is another.
        """
        data = ranks.share(lambda: _checked(path, identity))
        values = decode(data, device)["values"] if data else {}
        return cls(path if ranks.first else None, identity, values)

    def find(self, name: str) -> Any:
        """The decision `name`, or None."""
        return self._values.get(name)

    def keep(self, name: str, value: Any) -> None:
        """Note a decision, if there is a file."""
        if self._path is not None:
            self._values[name] = value
            self._changed = True

    def drop(self, prefix: str) -> None:
        """Forget decisions whose names begin so."""
        self._values = {n: v for n, v in self._values.items() if not n.startswith(prefix)}

    def save(self) -> None:
        """Write the file, whole or not at all, if there is something new.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._path is None or not self._changed:
            return
        held = {"format": FORMAT, "identity": self._identity, "values": self._values}
        write_atomically(self._path, encode(held), scratch_file(self._path))
        self._changed = False


def scratch_file(path: Path) -> Path:
    """Where the next state of the file `path` is written before it takes its place."""
    return path.with_name(f"{path.name}.tmp")


def remove_record(path: Path) -> None:
    """Remove the file of a run that is done, and what a killed one left beside it."""
    path.unlink(missing_ok=True)
    scratch_file(path).unlink(missing_ok=True)


def model_digest(model: nn.Module, architecture: str, kwargs: Mapping[str, Any]) -> str:
    """SHA-256 over what a model is and all its tensors."""
    digest = hashlib.sha256(f"{architecture} {json.dumps(kwargs, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def environment(device: torch.device) -> str:
    """What besides settings, model and images a decision depends on."""
    return f"erq {__version__}, torch {torch.__version__}, {device.type}"


def _checked(path: Path, identity: Mapping[str, str]) -> bytes:
    """The bytes of a record that belongs to this run; none if there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror})") from error
    try:
        held = decode(data, torch.device("cpu"))
        number, found = held["format"], dict(held["identity"])
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError(
            f"{path} is no state of an interrupted run, or damaged ({error}); delete it to start "
            "anew"
        ) from error
    if number != FORMAT:
        raise RecordError(f"{path} has format {number}, this version reads {FORMAT}; delete it")
    other = [name for name in identity if found.get(name) != identity[name]]
    if other:
        raise RecordError(
            f"{path} is the state of another run, with other {' and '.join(other)}: repeat the "
            "command that was interrupted, or delete the file to start anew"
        )
    return data

"""One .safetensors file with a JSON header: save, load, inspect. docs/formats.md describes it.

Nothing is unpickled. A file is written beside its target and renamed, so the target is old or new,
never half. Everything in it is covered by a digest: a flipped bit is found, not computed with.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from erq._version import __version__
from erq.config import FLOAT_BITS, QuantConfig
from erq.deployment.modules import (
    QuantAttention,
    QuantLinear,
    QuantPatchEmbed,
    QuantScores,
    QuantValues,
)
from erq.deployment.network import set_backend
from erq.models import Site, UnsupportedModelError, adapter_named
from erq.models.info import QuantizedModelInfo

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is not a sound erq checkpoint; names the file, the tensor and what was expected."""


def save(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a deployed model to one .safetensors file.

    Args:
        net: what `erq.deploy` or `erq.load` returned.
        path: the file; an existing one is replaced only once the new one is complete.

    Raises:
        ValueError: not a deployed model. CheckpointError: the file cannot be written.
    """
    if not hasattr(net, "erq_info") or not any(
        isinstance(m, QuantPatchEmbed | QuantLinear) for m in net.modules()
    ):
        raise ValueError(
            f"save takes a deployed model (erq.deploy or erq.load), got a {type(net).__name__}"
        )
    target = Path(path)
    tensors = {n: t.detach().cpu().contiguous() for n, t in net.state_dict().items()}
    header = _header(net)
    header["sha256"] = _digest(header, tensors)
    data = to_bytes(tensors, metadata={"erq": json.dumps(header, sort_keys=True)})
    write_atomically(target, data)


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target` and rename it into place.

    Raises:
        CheckpointError: the folder does not exist, is not writable or is full; nothing is left.
    """
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{target}: the folder {target.parent} does not exist; create it first"
        )
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # The temporary file is private to its owner; the result gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error.strerror or error}); {len(data):,} bytes are "
            "needed, and the old file, if any, is untouched"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], backend: str = "auto", device: str | torch.device | None = None
) -> nn.Module:
    """A deployed model from a file; needs neither the full-precision weights nor calibration.

    Args:
        path: what `erq.save` wrote.
        backend: auto, reference, cpu, triton or cuda.
        device: where the model goes; the CPU by default.

    Raises:
        CheckpointError: the file, the tensor and what was expected.
        ValueError: an unknown backend. BackendError: a forced backend that cannot run.
    """
    file = Path(path)
    net: Any
    header, tensors = _read(file)
    info = _info(file, header)
    try:
        net = _skeleton(info, header["sites"])
    except CheckpointError:
        raise
    except Exception as error:  # a header that parses but describes no model, in whatever way
        raise CheckpointError(f"{file}: the header describes no model: {error}") from error
    _check_tensors(file, net.state_dict(), tensors)
    net.load_state_dict(tensors, strict=True, assign=True)
    net.requires_grad_(False).eval().to(device or "cpu")
    for name, module in net.named_modules():
        if hasattr(module, "repack"):
            try:
                module.repack()
            except ValueError as error:
                raise CheckpointError(f"{file}: {name}: {error}") from error
    net.erq_info = info
    net.erq_report = [
        s["errors"] | {"name": n} for n, s in header["sites"].items() if s.get("errors")
    ]
    set_backend(net, backend)
    return net


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a checkpoint, after the same checks as `load` makes of the bytes.

    Raises:
        CheckpointError: the file and what is wrong with it.
    """
    header, tensors = _read(Path(path))
    header["size_bytes"] = Path(path).stat().st_size
    header["parameters"] = sum(t.numel() for t in tensors.values())
    return header


def _header(net: Any) -> dict[str, Any]:
    info: QuantizedModelInfo = net.erq_info
    errors = {
        r["name"]: {k: v for k, v in r.items() if k.startswith("error_")} for r in net.erq_report
    }
    sites = {}
    for site in info.sites:
        module = net.get_submodule(site.name)
        entry: dict[str, Any] = {"kind": site.kind, "norm": site.norm}
        if isinstance(module, QuantLinear | QuantPatchEmbed):
            dual = 0 if module.dual_columns is None else len(module.dual_columns)
            entry |= {
                "bits": module.w_bits,
                "a_bits": module.a_bits if isinstance(module, QuantLinear) else FLOAT_BITS,
                "scheme": module.scheme,
                "shape": [module.out_features, module.in_features],
                "dual": dual,
                "bias": module.bias is not None,
            }
        elif isinstance(module, QuantScores):
            entry |= {"bits": module.bits, "scheme": "affine", "temperature": module.temperature}
        elif isinstance(module, QuantValues):
            scheme = "log_sqrt2_zero" if module.zero_last else "log_sqrt2"
            entry |= {"bits": module.bits, "scheme": scheme}
        sites[site.name] = entry | {"errors": errors.get(site.name, {})}
    return {
        "format": FORMAT,
        "version": __version__,
        "family": info.family,
        "architecture": info.architecture,
        "arch_kwargs": info.arch_kwargs,
        "pretrained_cfg": info.pretrained_cfg,
        "config": info.config.to_dict(),
        "calibration": info.calibration,
        "sites": sites,
        "created_by": f"erq {__version__}",
    }


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header without its digest and over every tensor's name and bytes."""
    plain = {k: v for k, v in header.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose bytes are sound."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own, OSError, MemoryError, …
        raise CheckpointError(
            f"{file}: not a readable .safetensors file, cut off or damaged ({error})"
        ) from error
    if "erq" not in metadata:
        raise CheckpointError(
            f"{file}: a .safetensors file without an erq header; erq.save and erq quantize write one"
        )
    try:
        header = json.loads(metadata["erq"])
        number = header["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: the erq header is not the expected JSON object") from error
    if not isinstance(number, int) or number > FORMAT or number < 1:
        raise CheckpointError(
            f"{file}: format {number!r}, this version reads up to {FORMAT}: upgrade erq"
        )
    if header.get("sha256") != _digest(header, tensors):
        raise CheckpointError(
            f"{file}: contents do not match their digest: the header or a tensor was changed or "
            f"damaged{_first_difference(header, tensors)}"
        )
    return header, tensors


def _first_difference(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A hint at what is wrong with a damaged file: a site without its tensors."""
    sites = header.get("sites")
    if isinstance(sites, dict):
        for name, entry in sites.items():
            key = f"{name}.packed"
            if isinstance(entry, dict) and "shape" in entry and key not in tensors:
                return f" ({key} is missing)"
    return ""


def _info(file: Path, header: Mapping[str, Any]) -> QuantizedModelInfo:
    try:
        return QuantizedModelInfo(
            family=header["family"],
            architecture=header["architecture"],
            arch_kwargs=header["arch_kwargs"],
            pretrained_cfg=header["pretrained_cfg"],
            config=QuantConfig.from_dict(header["config"]),
            calibration=header["calibration"],
            sites=tuple(
                Site(name, entry["kind"], entry["norm"]) for name, entry in header["sites"].items()
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: the erq header is incomplete or wrong: {error}") from error


def _skeleton(info: QuantizedModelInfo, sites: Mapping[str, Any]) -> nn.Module:
    """The deployed model with empty buffers, on the meta device where it is large."""
    adapter = adapter_named(info.family)
    with torch.device("meta"):
        net = adapter.build(info.arch_kwargs)
    adapter.prepare(net)
    for name, entry in sites.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = net.get_submodule(parent_name)
        old = getattr(parent, leaf)
        if entry["kind"] == "linear":
            n, k = entry["shape"]
            new: nn.Module = QuantLinear(
                k, n, entry["bits"], entry["a_bits"], entry["dual"], entry["bias"]
            )
        elif entry["kind"] == "conv":
            kernel = (int(old.kernel_size[0]), int(old.kernel_size[1]))
            new = QuantPatchEmbed(
                old.in_channels, entry["shape"][0], kernel, entry["bits"], entry["bias"]
            )
        elif entry["kind"] == "matmul_qk":
            new = QuantScores(entry["bits"], float(entry["temperature"]))
        elif entry["kind"] == "matmul_av":
            new = QuantValues(entry["bits"], entry["scheme"] == "log_sqrt2_zero")
        else:
            raise UnsupportedModelError(f"{name}: unknown kind {entry['kind']!r}")
        setattr(parent, leaf, new)
    for name in [n for n, e in sites.items() if e["kind"] == "matmul_qk"]:
        path = name.rpartition(".")[0]
        attention = net.get_submodule(path)
        parent_name, _, leaf = path.rpartition(".")
        setattr(
            net.get_submodule(parent_name),
            leaf,
            QuantAttention.from_attention(attention, attention.qk, attention.av),  # type: ignore[arg-type]
        )
    return net


def _check_tensors(
    file: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError at the first missing, unknown or misshapen tensor."""
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(
            f"{file}: tensor {name} is missing, expected {list(expected[name].shape)} "
            f"{expected[name].dtype}"
        )
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{file}: tensor {name} is unknown to {file.name}'s architecture")
    for name, want in expected.items():
        got = tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise CheckpointError(
                f"{file}: tensor {name} is {got.dtype} {list(got.shape)}, expected {want.dtype} "
                f"{list(want.shape)}"
            )

"""One .safetensors file with a JSON header: save, load, inspect. docs/formats.md describes it.

Nothing is unpickled. A file is written beside its target and renamed, so the target is old or new,
never half. Everything in it is covered by a digest: a flipped bit is found, not computed with.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from erq._version import __version__
from erq.config import FLOAT_BITS, QuantConfig
from erq.deployment.blocks import fuse_blocks
from erq.deployment.modules import (
    QuantAttention,
    QuantLinear,
    QuantPatchEmbed,
    QuantScores,
    QuantValues,
    _Deployed,
    check_layout,
)
from erq.deployment.network import InputCheck, set_backend, set_layout
from erq.messages import shown
from erq.models import Site, adapter_named
from erq.models.attention import ScaledScores, WeightedValues
from erq.models.info import QuantizedModelInfo
from erq.quant.params import MAX_BITS, MIN_BITS
from erq_kernels.dispatch import check_backend

FORMAT = 2
# What a file of format 1 does not say of its settings: fields that came later, as they were then.
_FORMAT_1_SETTINGS = {
    "rotate_heads": False,
    "ranges": "official",
    "reparameterize_hidden": False,
}

_LONGEST = 1000
"""Characters of an error's message, which repeats names and values of the file."""


class CheckpointError(ValueError):
    """A file that is no sound erq checkpoint; names the file, the tensor and what was expected."""

    def __init__(self, message: str) -> None:
        """Keep the beginning of a message that a hostile file made long."""
        text = " ".join(message.split())
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def save(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a deployed model to one .safetensors file, byte for byte the same for the same model.

    Args:
        net: what `erq.deploy` or `erq.load` returned. Floats are stored as float32.
        path: the file; an existing one is replaced only once the new one is complete.

    Raises:
        ValueError: not a deployed model, or one that was changed since so that it would not load.
        CheckpointError: the file cannot be written.
    """
    if not hasattr(net, "erq_info") or not any(isinstance(m, _Deployed) for m in net.modules()):
        raise ValueError(
            f"save takes a deployed model (erq.deploy or erq.load), got a {type(net).__name__}"
        )
    tensors = {n: _stored(t) for n, t in net.state_dict().items()}
    info: Any = net.erq_info
    try:
        header = _header(net)
        _check_structure(_skeleton(info, header["sites"], len(tensors)).state_dict(), tensors)
        _check_floats(tensors)
    except Exception as error:  # whatever the change broke
        raise ValueError(
            "the model was changed since it was deployed and would not load again: "
            f"{_one_line(error)}"
        ) from error
    _sign(header, tensors)
    data = to_bytes(tensors, metadata={"erq": json.dumps(header)})
    write_atomically(Path(path), data)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _stored(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    # A copy: safetensors refuses tensors that share memory, as those of tied layers do.
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def write_atomically(target: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write `data` beside `target` and rename it into place.

    Args:
        scratch: the file to write first, which may be there from a killed process; by default one
            that no other process has.

    Raises:
        CheckpointError: the folder does not exist, is not writable or is full; nothing is left.
    """
    if not os.path.isdir(target.parent):
        raise CheckpointError(
            f"{target}: the folder {target.parent} does not exist; create it first"
        )
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{target} is a folder or a device; name a file")
    temporary = scratch or target.with_name(f".erq-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb" if scratch is None else "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target} could not be written ({reason}); {len(data):,} bytes are needed, and the "
            "old file, if any, is untouched"
        ) from error
    finally:  # Ctrl-C too; nothing is there once it has been renamed
        temporary.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str | torch.device | None = None,
    weights: str = "int8",
) -> nn.Module:
    """A deployed model from a file; needs neither the full-precision weights nor calibration.

    Args:
        path: what `erq.save` wrote.
        backend: auto, reference, cpu, triton or cuda.
        device: where the model goes; the CPU by default.
        weights: how integer GEMMs keep theirs: int8, unpacked once, or packed, which takes less
            memory and is unpacked in the kernel.

    Raises:
        CheckpointError: the file, the tensor and what was expected.
        ValueError: an unknown backend or layout. BackendError: a forced backend that cannot run.
    """
    check_backend(backend)
    check_layout(weights)
    file = Path(path)
    header, tensors = _read(file)
    try:
        info = _info(header)
        net: Any = _skeleton(info, header["sites"], len(tensors))
    except Exception as error:  # a header that parses but describes no model, in whatever way
        raise CheckpointError(
            f"{file}: the header describes no model: {_one_line(error)}"
        ) from error
    try:
        _check_structure(net.state_dict(), tensors)
        _check_digests(header, tensors)
        _check_floats(tensors)
        set_layout(net, weights)
        # First to the device: there the layouts that its kernels read are made.
        moved = {name: tensor.to(device or "cpu") for name, tensor in tensors.items()}
        net.load_state_dict(moved, strict=True, assign=True)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    adapter = adapter_named(info.family)
    fuse_blocks(net, adapter.pre_norm_blocks(net))
    net.register_forward_pre_hook(InputCheck(adapter.input_shape(net)))
    net.requires_grad_(False).eval().to(device or "cpu")
    net.erq_info = info
    net.erq_report = [
        s["errors"] | {"name": n} for n, s in header["sites"].items() if s.get("errors")
    ]
    set_backend(net, backend)
    return net  # type: ignore[no-any-return]


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a checkpoint whose bytes are sound, with `size_bytes` and `parameters`.

    Args:
        path: what `erq.save` wrote.

    Returns:
        The fields of docs/formats.md but the digests; `config` with every field.

    Raises:
        CheckpointError: the file and what is wrong with it.
    """
    file = Path(path)
    header, tensors = _read(file)
    try:
        header["config"] = _info(header).config.to_dict()
        _check_digests(header, tensors)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    del header["tensors"], header["sha256"]
    header["size_bytes"] = file.stat().st_size
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
        if isinstance(module, QuantLinear):
            dual = 0 if module.dual_columns is None else len(module.dual_columns)
            entry |= {
                "bits": module.w_bits,
                "a_bits": module.a_bits,
                "scheme": module.scheme,
                "shape": [module.out_features, module.in_features],
                "dual": dual,
                "bias": module.bias is not None,
                "channels": module.x_channel_scale is not None,
            }
        elif isinstance(module, QuantScores):
            entry |= {"bits": module.bits, "scheme": "affine", "temperature": module.temperature}
        elif isinstance(module, QuantValues):
            scheme = "log_sqrt2_zero" if module.zero_last else "log_sqrt2"
            entry |= {"bits": module.bits, "scheme": scheme}
        else:
            raise ValueError(f"{site.name} is a {type(module).__name__} now")
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


def _sign(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the digest of every tensor, and that of the whole header, into the header."""
    header["tensors"] = {name: _tensor_digest(tensors[name]) for name in sorted(tensors)}
    header["sha256"] = _header_digest(header)


def _header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 over the header without its own digest."""
    plain = {k: v for k, v in header.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file; the header is sound, the tensors are not yet checked."""
    if os.path.isdir(file):
        raise CheckpointError(f"{file} is a folder; name a file")
    if not os.path.isfile(file):
        raise CheckpointError(f"{file}: no such file")
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            # Clones: safetensors maps the file, and a model must not change with its file.
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own, OSError, MemoryError, …
        raise CheckpointError(
            f"{file}: not a readable .safetensors file, cut off or damaged ({_one_line(error)})"
        ) from error
    if "erq" not in metadata:
        raise CheckpointError(
            f"{file}: a .safetensors file without an erq header; erq.save writes one"
        )
    try:
        header = json.loads(metadata["erq"])
        number = header["format"]
        sound = header.get("sha256") == _header_digest(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the erq header is not the expected JSON object") from error
    if type(number) is not int or number < 1:
        raise CheckpointError(f"{file}: the header's format must be 1 or more, got {shown(number)}")
    if number > FORMAT:
        raise CheckpointError(
            f"{file}: format {number}, this version reads up to {FORMAT}: upgrade erq"
        )
    if not sound:
        raise CheckpointError(
            f"{file}: the header does not match its digest: it was changed or damaged"
        )
    return header, tensors


_Field = tuple[Callable[[Any], bool], str]
_WIDTH: _Field = (lambda v: type(v) is int and MIN_BITS <= v <= MAX_BITS, "an integer from 2 to 8")
_ERRORS: _Field = (
    lambda v: (
        isinstance(v, dict)
        and all(type(x) is float or (type(x) is int and abs(x) < 1 << 53) for x in v.values())
    ),
    "an object of numbers",
)
_NORM: _Field = (lambda v: v is None or isinstance(v, str), "a name or null")
_LAYER: dict[str, _Field] = {
    "norm": _NORM,
    "bits": _WIDTH,
    "a_bits": (
        lambda v: type(v) is int and (MIN_BITS <= v <= MAX_BITS or v == FLOAT_BITS),
        f"an integer from 2 to 8, or {FLOAT_BITS}",
    ),
    "shape": (
        lambda v: isinstance(v, list) and [type(n) for n in v] == [int, int] and min(v) > 0,
        "two integers > 0",
    ),
    "dual": (lambda v: type(v) is int and v >= 0, "an integer >= 0"),
    "bias": (lambda v: type(v) is bool, "true or false"),
    "channels": (lambda v: type(v) is bool, "true or false"),
    "scheme": (lambda v: v in ("affine", "dual"), "affine or dual"),
    "errors": _ERRORS,
}
_SITE_FIELDS: dict[str, dict[str, _Field]] = {
    "linear": _LAYER,
    "conv": _LAYER
    | {
        "scheme": (lambda v: v == "affine", "affine"),
        "channels": (lambda v: v is False, "false"),
    },
    "matmul_qk": {
        "norm": _NORM,
        "bits": _WIDTH,
        "scheme": (lambda v: v == "affine", "affine"),
        "temperature": (lambda v: type(v) is float and 0 < v < float("inf"), "a number > 0"),
        "errors": _ERRORS,
    },
    "matmul_av": {
        "norm": _NORM,
        "bits": _WIDTH,
        "scheme": (
            lambda v: v in ("log_sqrt2", "log_sqrt2_zero"),
            "log_sqrt2 or log_sqrt2_zero",
        ),
        "errors": _ERRORS,
    },
}


def _check_site(name: str, entry: Any) -> None:
    """Raise ValueError, naming site and field, unless `entry` describes a site of its kind."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in _SITE_FIELDS:
        raise ValueError(
            f"site {name} must be an object whose kind is one of {', '.join(_SITE_FIELDS)}, got "
            f"{shown(kind)}"
        )
    for key, (allowed, what) in _SITE_FIELDS[kind].items():
        if key not in entry:
            raise ValueError(f"site {name} lacks {key!r}, expected {what}")
        if not allowed(entry[key]):
            raise ValueError(f"site {name}: {key} must be {what}, got {shown(entry[key])}")
    if kind in ("linear", "conv"):
        dual = entry["dual"]
        if (entry["scheme"] == "dual") != (dual > 0) or dual >= entry["shape"][1]:
            raise ValueError(
                f"site {name}: dual must be 0 in the affine scheme and inside "
                f"1..{entry['shape'][1] - 1} in the dual one, got {dual} ({entry['scheme']})"
            )
        if entry["channels"] and entry["a_bits"] == FLOAT_BITS:
            raise ValueError(f"site {name}: channels must be false with float activations")


def _info(header: Mapping[str, Any]) -> QuantizedModelInfo:
    """What the header says of the model.

    Raises:
        ValueError: names the field that is missing or wrong.
    """
    strings = ("family", "architecture", "version", "created_by")
    objects = ("arch_kwargs", "pretrained_cfg", "config", "calibration", "sites", "tensors")
    for key in (*strings, *objects):
        if not isinstance(header.get(key), str if key in strings else dict):
            what = "a string" if key in strings else "an object"
            got = shown(header[key]) if key in header else "nothing"
            raise ValueError(f"the header's {key} must be {what}, got {got}")
    for name, entry in header["sites"].items():
        if header["format"] == 1 and isinstance(entry, dict) and "a_bits" in entry:
            entry.setdefault("channels", False)
        _check_site(name, entry)
    images = header["calibration"]
    if type(images.get("n")) is not int or not isinstance(images.get("sha256"), str):
        raise ValueError(
            "the header's calibration must hold an integer n and a string sha256, got "
            f"{shown(images)}"
        )
    return QuantizedModelInfo(
        family=header["family"],
        architecture=header["architecture"],
        arch_kwargs=header["arch_kwargs"],
        pretrained_cfg=header["pretrained_cfg"],
        config=QuantConfig.from_dict(
            (_FORMAT_1_SETTINGS if header["format"] == 1 else {}) | header["config"]
        ),
        calibration=header["calibration"],
        sites=tuple(Site(n, e["kind"], e["norm"]) for n, e in header["sites"].items()),
    )


def _skeleton(info: QuantizedModelInfo, sites: Mapping[str, Any], tensors: int) -> nn.Module:
    """The deployed model without values, on the meta device.

    Args:
        tensors: how many tensors there are to fill it.

    Raises:
        Exception: of any kind, if `info` and `sites` describe no model.
    """
    adapter = adapter_named(info.family)
    # Every block has tensors: without this check a wrong depth would build for hours.
    depths = info.arch_kwargs.get("depths", [info.arch_kwargs.get("depth", 0)])
    if max(len(depths), *depths) > tensors:
        raise ValueError(
            f"arch_kwargs: depth {max(len(depths), *depths)} needs more than the {tensors} tensors "
            "given"
        )
    with torch.device("meta"):
        net = adapter.build(info.arch_kwargs)
        understood = adapter.describe(net)
        for key in sorted(understood.keys() ^ info.arch_kwargs.keys()):
            state = "missing" if key in understood else "unknown"
            raise ValueError(f"arch_kwargs: {key} is {state}")
        for key, value in info.arch_kwargs.items():
            if understood[key] != value:
                raise ValueError(f"arch_kwargs: {key} cannot be {shown(value)}")
        for name, module in net.named_modules():
            if hasattr(module, "eps") and not 0 < module.eps < 1:
                raise ValueError(
                    f"arch_kwargs: {name} has eps {shown(module.eps)}, expected 0..1, both excluded"
                )
        adapter.prepare(net)
        for name, entry in sites.items():
            parent_name, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent_name), leaf, _empty(net, name, entry))
        for name in [n for n, e in sites.items() if e["kind"] in ("matmul_qk", "matmul_av")]:
            path = name.rpartition(".")[0]
            attention: Any = net.get_submodule(path)
            if isinstance(attention, QuantAttention):
                continue
            qk, av = attention.qk, attention.av
            if not isinstance(qk, QuantScores) or not isinstance(av, QuantValues):
                raise ValueError(f"{path}: qk and av must both be sites, or neither")
            parent_name, _, leaf = path.rpartition(".")
            quantized = QuantAttention.from_attention(attention, qk, av)
            setattr(net.get_submodule(parent_name), leaf, quantized)
    return net


def _empty(net: nn.Module, name: str, entry: Mapping[str, Any]) -> nn.Module:
    """The deployed module of a site, without values."""
    old: Any = net.get_submodule(name)
    if entry["kind"] == "linear" and isinstance(old, nn.Linear):
        n, k = _checked_shape(name, entry, [old.out_features, old.in_features])
        layer = (k, n, entry["bits"], entry["a_bits"], entry["dual"], entry["bias"])
        return QuantLinear(*layer, entry["channels"])
    if entry["kind"] == "conv" and isinstance(old, nn.Conv2d):
        kernel = (old.kernel_size[0], old.kernel_size[1])
        wanted = [old.out_channels, old.in_channels * kernel[0] * kernel[1]]
        n, _ = _checked_shape(name, entry, wanted)
        return QuantPatchEmbed(
            old.in_channels, n, kernel, entry["bits"], entry["bias"], entry["a_bits"]
        )
    if entry["kind"] == "matmul_qk" and isinstance(old, ScaledScores):
        return QuantScores(entry["bits"], entry["temperature"])
    if entry["kind"] == "matmul_av" and isinstance(old, WeightedValues):
        return QuantValues(entry["bits"], entry["scheme"] == "log_sqrt2_zero")
    raise ValueError(f"site {name}: a {type(old).__name__} is no {entry['kind']}")


def _checked_shape(name: str, entry: Mapping[str, Any], wanted: list[int]) -> list[int]:
    if entry["shape"] != wanted:
        raise ValueError(f"site {name}: shape must be {wanted}, got {entry['shape']}")
    return wanted


def _check_structure(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError at the first missing, unknown or misshapen tensor."""
    for name in sorted(expected.keys() - tensors.keys()):
        want = expected[name]
        raise ValueError(f"tensor {name} is missing, expected {want.dtype} {list(want.shape)}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"tensor {name} is unknown to the architecture")
    for name, want in expected.items():
        got = tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"tensor {name} is {got.dtype} {list(got.shape)}, expected {want.dtype} "
                f"{list(want.shape)}"
            )


def _check_digests(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError at the first tensor that is not the one the header was written for."""
    digests = header["tensors"]
    for name in sorted(digests.keys() ^ tensors.keys()):
        state = "missing" if name in digests else "unknown to the header"
        raise ValueError(f"tensor {name} is {state}")
    for name, tensor in tensors.items():
        if digests[name] != _tensor_digest(tensor):
            raise ValueError(f"tensor {name} does not match its digest: it was changed or damaged")


def _check_floats(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError at the first float tensor that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name} holds NaN or infinite values")

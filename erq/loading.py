"""From a name on the command line to a model: timm's, torchvision's, a checkpoint, or the demo's.

Weights are read from safetensors alone, never unpickled, and a model never starts with random
weights unless that was asked for.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from torch import Tensor, nn

from erq.data import DEMO_FOLDER
from erq.hub import WEIGHTS, load
from erq.models import adapter_named

DEMO_METADATA = "erq_demo"
"""Metadata key of a .safetensors file that describes a full-precision VisionTransformer."""

_TORCHVISION = "torchvision:"
_HUB_SECONDS = 3.0
_RANDOM_SEED = 0


@dataclass(frozen=True)
class TimmOptions:
    """How a timm model is made.

    Args:
        weights: a .safetensors state dict; timm's pretrained weights if None.
        random_weights: leave the weights as timm initialises them, always the same ones.
        model_args: further arguments of `timm.create_model`.
    """

    weights: Path | None = None
    random_weights: bool = False
    model_args: dict[str, Any] = field(default_factory=dict)


def is_timm_name(name: str) -> bool:
    """Whether `name` means one of timm's or torchvision's models, no file or shipped model."""
    if name == "demo" or name.endswith((".safetensors", os.sep)):
        return False
    # os.path, which takes names that no file can have.
    return ":" in name or not (os.path.isfile(name) or os.path.isfile(os.path.join(name, WEIGHTS)))


def load_model(
    name: str,
    options: TimmOptions | None = None,
    device: torch.device | None = None,
    backend: str = "auto",
) -> nn.Module:
    """The model `name` in evaluation mode on `device`.

    Args:
        name: a checkpoint of erq, file or folder, a timm name, `torchvision:` and a name, `demo`,
            or a file as the demo's.
        options: for a timm name only.
        backend: for a checkpoint only.

    Raises:
        ValueError: an unknown name, weights that cannot be had or do not fit.
        CheckpointError: a file that is not a sound checkpoint.
    """
    where = device or torch.device("cpu")
    if is_timm_name(name):
        return _timm_model(name, options or TimmOptions()).to(where)
    path = DEMO_FOLDER / "vit_digits.safetensors" if name == "demo" else Path(name)
    description = _description(path)
    if description is None:
        return load(path, backend=backend, device=where)
    return _described_model(path, description).to(where)


def full_precision_twin(net: nn.Module) -> nn.Module:
    """A float model of a deployed model's architecture, with random weights: for timing."""
    info: Any = net.erq_info
    twin = adapter_named(info.family).build(info.arch_kwargs)
    twin.pretrained_cfg = info.pretrained_cfg
    return twin.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Replace all weights of `model` by those of a .safetensors file, in the model's own dtype.

    Raises:
        ValueError: a file that cannot be read, or tensors that are not exactly the model's.
    """
    tensors = _read_tensors(path)
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or unknown:
        lacks = f"lacks {_some(missing)}" if missing else ""
        has = f"has {_some(unknown)}, unknown to the model" if unknown else ""
        raise ValueError(
            f"{path} does not fit the model: it {' and '.join(filter(None, (lacks, has)))}; the "
            "keys must be those of the timm model, whose shape --model-arg sets (num_classes=10, …)"
        )
    for key, tensor in tensors.items():
        want = list(expected[key].shape)
        if list(tensor.shape) != want:
            raise ValueError(
                f"{path}: {key} is {list(tensor.shape)}, the model has {want}; --model-arg sets "
                "the model's shape (img_size=112, num_classes=10, …)"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {key} holds NaN or infinite values")
    model.load_state_dict({k: t.to(expected[k].dtype) for k, t in tensors.items()})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file of weights")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: weights are read from .safetensors alone (other files can run code when they "
            "are loaded); convert with safetensors.torch.save_file(model.state_dict(), …)"
        )
    try:
        file: Any = safe_open(path, framework="pt")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class, OSError and others
        raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error


def _description(path: Path) -> str | None:
    """What a demo file says of its model, as JSON; None for every other file, readable or not."""
    try:
        file: Any = safe_open(path, framework="pt")
        return (file.metadata() or {}).get(DEMO_METADATA)
    except Exception:  # `load` says what is wrong with it
        return None


def _described_model(path: Path, text: str) -> nn.Module:
    """A VisionTransformer from its own file, with the data config that goes with it."""
    from timm.models.vision_transformer import VisionTransformer

    try:
        description = json.loads(text)
        arguments = dict(description["arch_kwargs"])
        model: nn.Module = VisionTransformer(**arguments)
        size = int(arguments["img_size"])
        channels, classes = int(arguments.get("in_chans", 3)), int(arguments["num_classes"])
        normalise = {k: _values(description[k], channels) for k in ("mean", "std")}
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{path}: its {DEMO_METADATA} metadata describe no model ({error})"
        ) from error
    load_weights(model, path)
    config: Any = {
        "architecture": path.name.partition(".")[0],
        "input_size": (channels, size, size),
        "num_classes": classes,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        **normalise,
    }
    model.pretrained_cfg = config
    return model.eval()


def _values(value: Any, channels: int) -> tuple[float, ...]:
    """One number for all channels, or one each."""
    values = value if isinstance(value, list) else [value] * channels
    return tuple(float(v) for v in values)


def _timm_model(name: str, options: TimmOptions) -> nn.Module:
    pretrained = options.weights is None and not options.random_weights
    if name.startswith(_TORCHVISION):
        return _torchvision_model(name, options)
    if pretrained and not name.startswith("local-dir:") and not _hub_answers():
        # Read when huggingface_hub is first imported: then a cached file is used, or none, at once.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import timm

    for logger in ("timm", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if not name.startswith(("hf-hub:", "local-dir:")):
        _check_name(name, timm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        model = _create(name, options, pretrained, timm)
    if options.weights is not None:
        load_weights(model, options.weights)
    elif pretrained:
        trained = int(getattr(model, "pretrained_cfg", {}).get("num_classes") or 0)
        classes = int(getattr(model, "num_classes", trained))
        if classes not in (0, trained):
            raise ValueError(
                f"{name}: timm's pretrained weights have {trained} classes, so a head with "
                f"{classes} would be random; give --weights FILE.safetensors"
            )
    return model.eval()


def _torchvision_model(name: str, options: TimmOptions) -> nn.Module:
    """torchvision's model behind `torchvision:NAME`, with the data config of its own presets."""
    from torchvision import models

    leaf = name.removeprefix(_TORCHVISION)
    known = [n for n in models.list_models(module=models) if n.startswith("vit_")]
    if leaf not in known:
        raise ValueError(f"{name}: torchvision's covered models are {', '.join(known)}")
    if options.weights is None and not options.random_weights:
        raise ValueError(
            f"{name}: torchvision's own weights are pickles, which are not loaded; give --weights "
            "FILE.safetensors (safetensors.torch.save_file(model.state_dict(), …)), or "
            "--random-weights for a trial"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        try:
            model: nn.Module = models.get_model(leaf, weights=None, **options.model_args)
        except Exception as error:  # torchvision's asserts and whatever an argument breaks
            raise ValueError(
                f"torchvision cannot create {leaf} with {options.model_args}: "
                f"{_first_sentence(error)}"
            ) from error
    if options.weights is not None:
        load_weights(model, options.weights)
    size = int(getattr(model, "image_size", 224))
    config: Any = {
        "architecture": name,
        "input_size": (3, size, size),
        "num_classes": int(getattr(model, "num_classes", 0)),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    model.pretrained_cfg = config
    return model.eval()


def _create(name: str, options: TimmOptions, pretrained: bool, timm: Any) -> nn.Module:
    """timm's model, or one ValueError."""
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options.model_args)
    except Exception as error:  # timm, the hub and the model's own asserts all raise what they like
        reason = _first_sentence(error)
        if not pretrained:
            shown = ", ".join(f"{k}={v}" for k, v in options.model_args.items())
            raise ValueError(
                f"timm cannot create {name} with {shown or 'defaults'}: {reason}"
            ) from error
        raise ValueError(
            f"{name}: timm's pretrained weights cannot be had ({reason}); give --weights "
            "FILE.safetensors, download them into the Hugging Face cache with a connection, or use "
            "--random-weights for a trial"
        ) from error
    return model


def _check_name(name: str, timm: Any) -> None:
    """Raise ValueError for a name that is none of timm's, with the closest ones."""
    architecture = name.partition(".")[0]
    if timm.is_model(architecture):
        return
    close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"; close names: {', '.join(close)}" if close else ""
    raise ValueError(f"{name}: neither a file nor one of timm's models{hint}")


def _hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; a proxy is taken at its word.

    Its client would otherwise try for most of a minute and write a line for every attempt.
    """
    if any(os.environ.get(n) for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=_HUB_SECONDS):
            return True
    except OSError:
        return False


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

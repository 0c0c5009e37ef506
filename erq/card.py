"""The model card of a folder: what a hub shows, in Markdown behind YAML that it understands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erq.messages import megabytes

_SEAL = re.compile(r"<!-- erq: sha256 of the text above: ([0-9a-f]{64}) -->\n")


def model_card(config: Mapping[str, Any]) -> str:
    """The card of a folder with this config.json.

    Args:
        config: as `erq.hub` writes it.
    """
    text = "\n".join([*_front_matter(config), "", *_body(config), "", ""])
    return f"{text}<!-- erq: sha256 of the text above: {_digest(text)} -->\n"


def is_untouched(file: Path) -> bool:
    """Whether a card is as `model_card` gave it."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    seal = re.search(_SEAL.pattern + r"\Z", text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _width(config: Mapping[str, Any]) -> str:
    settings = config["config"]
    return f"W{settings['w_bits']}A{settings['a_bits']}"


def _front_matter(config: Mapping[str, Any]) -> list[str]:
    """YAML; every value is written as JSON, which YAML includes."""
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    origin = config["pretrained_cfg"].get("hf_hub_id")
    values: dict[str, Any] = {
        "library_name": "erq",
        "pipeline_tag": task,
        "tags": ["quantization", "vision-transformer", _width(config).lower()],
    }
    if config["license"]:
        values["license"] = config["license"]
    if isinstance(origin, str) and origin.count("/") == 1 and not origin.endswith("/"):
        values |= {"base_model": origin, "base_model_relation": "quantized"}
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"]


def _body(config: Mapping[str, Any]) -> list[str]:
    rows = {
        "Bits": _bits(config["config"]),
        "Method": f"`{config['config']['method']}`, {config['sites']} quantized sites",
        "Calibration": _calibration(config["calibration"]),
        "Accuracy": _accuracy(config["evaluation"]),
        "Size": _size(config["sizes"]),
        "Input": _input(config["pretrained_cfg"]),
        "License of the weights": config["license"]
        or "that of the full-precision weights, unknown to erq: name it before publishing",
        "Written by": config["created_by"],
    }
    return [
        f"# {config['architecture']}, {_width(config)}",
        "",
        f"`{config['architecture']}` on packed integer codes, quantized after training by "
        "[ERQ](https://arxiv.org/abs/2407.06794) (error reduction, no back-propagation).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
        "",
        "## Use",
        "",
        "```python",
        "import erq",
        "",
        'net = erq.load("path/to/this/folder")  # huggingface_hub.snapshot_download(...) gives one',
        "logits = net(images)  # float [N, C, H, W], normalised as above",
        "```",
        "",
        "```",
        "erq predict path/to/this/folder picture.jpg",
        "erq eval path/to/this/folder --images folder/of/classes",
        "```",
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _bits(settings: Mapping[str, Any]) -> str:
    activations = settings["a_bits"]
    acts = "float activations" if activations == 16 else f"{activations}-bit activations"
    text = f"{settings['w_bits']}-bit weights, {acts}"
    return text + ("; other widths for some layers" if settings["overrides"] else "")


def _calibration(calibration: Mapping[str, Any]) -> str:
    text = f"{calibration['n']} unlabelled images, sha256 `{calibration['sha256'][:16]}…`"
    command = calibration.get("command")
    return f"{text}, by `{command}`" if isinstance(command, str) else text


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not measured yet; `erq eval FOLDER --images … --card` writes it here"
    parts = []
    if found["top1"] is not None:
        full = found["reference_top1"]
        beside = "" if full is None else f" (full precision {full:.2f} %)"
        parts.append(f"top-1 {found['top1']:.2f} %{beside}")
    if found["agreement"] is not None:
        parts.append(f"same class as full precision {found['agreement']:.2f} %")
    return f"{', '.join(parts) or 'without labels and reference'}, on {found['n']} images"


def _size(sizes: Mapping[str, int]) -> str:
    ratio = sizes["fp32"] / sizes["file"]
    return f"{megabytes(sizes['file'])}, {ratio:.1f}× less than fp32's {megabytes(sizes['fp32'])}"


def _input(cfg: Mapping[str, Any]) -> str:
    if not cfg.get("input_size"):
        return "as the full-precision model's"
    size = "×".join(str(n) for n in cfg["input_size"])
    rest = [
        f"{key} {_values(cfg[key])}"
        for key in ("mean", "std", "interpolation", "crop_pct")
        if cfg.get(key) is not None
    ]
    return ", ".join([size, *rest])


def _values(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)

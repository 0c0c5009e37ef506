"""Models, images and result files that the benchmarks share."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import triton
from safetensors.torch import load_file
from torch import Tensor, nn

from erq.data import DEMO_FOLDER, open_images
from erq.inputs import preprocessing
from erq.loading import load_model

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Task:
    """A trained model with images that it was trained for.

    Args:
        name: what tables call it. model: fp32, eval.
        calib: float [N, C, H, W], normalised images to calibrate on. test, labels: to measure on.
        mean, std: of the normalisation, per channel.
    """

    name: str
    model: nn.Module
    calib: Tensor
    test: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def draw(self, count: int, seed: int) -> Tensor:
        """`count` calibration images, the seed's choice."""
        order = np.random.RandomState(seed).permutation(len(self.calib))[:count]
        return self.calib[order]


def real_task(folder: Path = REAL) -> Task:
    """DINOv2 ViT-S/14 with a linear head for scikit-learn's digits, 65 tokens; full precision 95.98
    %.

    Raises:
        SystemExit: the folder is not there.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: name the folder of the real model with --real")
    model = timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=10)
    state = load_file(folder / "vits14_digits_112.fp16.safetensors")
    model.load_state_dict({name: t.float() for name, t in state.items()})
    digits = np.load(folder / "digits.npz", allow_pickle=False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def images(name: str) -> Tensor:
        x = torch.from_numpy(digits[name]).float().div(255)[:, None].expand(-1, 3, -1, -1)
        x = nn.functional.interpolate(x, size=(112, 112), mode="bicubic", align_corners=False)
        return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    labels = torch.from_numpy(digits["test_labels"]).long()
    return Task(
        "DINOv2 ViT-S/14, digits",
        model.eval(),
        images("calib_images"),
        images("test_images"),
        labels,
        mean,
        std,
    )


def demo_task() -> Task:
    """The network that `erq demo` quantizes, with its images."""
    model = load_model(str(DEMO_FOLDER / "vit_digits.safetensors"))
    recipe = preprocessing(model)

    def images(array: str) -> tuple[Tensor, Tensor]:
        pairs: Any = open_images(f"{DEMO_FOLDER / 'digits.npz'}:{array}").batches(recipe)
        x, labels = zip(*pairs, strict=True)
        return torch.cat(x), torch.cat(labels)

    test, labels = images("images")
    return Task(
        "demo: ViT, digits", model, images("calib_images")[0], test, labels, recipe.mean, recipe.std
    )


@dataclass(frozen=True)
class Spread:
    """Times of one way to do something, in ms: median, and the quarters below and above it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """The spread of measured times."""
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high), len(times))


def device_name() -> str:
    """A short name of the machine's processor or GPU, fit for a folder."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-")
    flags = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{platform.machine()}-{flags}"


def versions() -> dict[str, Any]:
    """What a result depends on besides the code."""
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "device": device_name(),
        **_gpu_state(),
    }


def _gpu_state() -> dict[str, str]:
    """Triton's version and the clocks and power of a GPU, as its driver says; empty without one."""
    if not torch.cuda.is_available():
        return {}
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return {"triton": triton.__version__} | dict(zip(query.split(","), values, strict=True))


class ResultFile:
    """JSON lines under bench/results/<device>/; each row carries the versions."""

    def __init__(self, name: str, resume: bool = False, smoke: bool = False) -> None:
        """Open results/<device>/<name>.jsonl, empty unless `resume`.

        Args:
            smoke: a trial run, whose rows go to a temporary folder.

        The environment variable ERQ_RESULTS names another folder than bench/results.
        """
        root = Path(os.environ.get("ERQ_RESULTS") or (tempfile.mkdtemp() if smoke else RESULTS))
        folder = root / device_name()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        if not (resume and self.path.exists()):
            self.path.write_text("")

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row | versions(), sort_keys=True) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows written so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

"""The whole path on the shipped model: quantize, pack, write, reload in a new process, measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from erq.config import QuantConfig
from erq.data import DEMO_FOLDER, open_images
from erq.deployment.checkpoint import load, save
from erq.deployment.convert import deploy
from erq.evaluation import Evaluation, evaluate
from erq.inputs import preprocessing
from erq.loading import load_model
from erq.messages import megabytes
from erq.pipeline import quantize
from erq.progress import Progress
from erq.report import make_table, number
from erq.timing import Timing, benchmark

N_CALIBRATION = 32
BATCH_SIZES = (1, 8)
METHODS = {"round to nearest": "rtn", "RepQ": "repq", "ERQ": "erq"}
"""Row of the table → method; the last one is packed and written."""

_TIMING_SECONDS = 0.7

_THREADS = 1
"""The net is so small that more threads would mostly wait for each other."""


@dataclass(frozen=True)
class Demonstration:
    """What the demo found.

    Args:
        bits: preset. n_calibration, n_test: images, none of them in both.
        evaluations: by network, full precision first; ERQ's comes from the process that reloaded
            the file.
        file: where the packed model was left, or None if it was not kept.
        file_bytes, fp32_bytes, fp16_bytes: sizes of the packed file and of the plain weights.
        timings: of the full-precision model and of the reloaded file.
        seconds: all of it.
    """

    bits: str
    n_calibration: int
    n_test: int
    evaluations: dict[str, Evaluation]
    file: Path | None
    file_bytes: int
    fp32_bytes: int
    fp16_bytes: int
    timings: list[Timing]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


def demonstrate(
    folder: Path | None = None,
    bits: str = "w4a4",
    out: Path | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> Demonstration:
    """Quantize the shipped model by three methods and measure them on its test images.

    Args:
        folder: another one with `vit_digits.safetensors` and `digits.npz`, as bench/train_demo.py
            writes them.
        out: keep ERQ's packed file there.
        progress: a bar on a terminal.

    Raises:
        ValueError: files that are not as expected. CheckpointError: `out` cannot be written.
    """
    start = time.perf_counter()
    where = device or torch.device("cpu")
    source = folder or DEMO_FOLDER
    weights, data = source / "vit_digits.safetensors", source / "digits.npz"
    model = load_model(str(weights), device=where)
    test, calibration = open_images(str(data)), open_images(f"{data}:calib_images")
    recipe = preprocessing(model)
    drawn = calibration.draw(N_CALIBRATION, seed=0)

    stages = 2 * len(METHODS) + 3
    scratch = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out.parent))
    with _threads(_THREADS), scratch as parent, Progress(stages, enabled=progress) as bar:
        bar.update("full precision: evaluate")
        evaluations = {"full precision": evaluate(model, test.batches(recipe))}
        sim: nn.Module = model
        for name, method in METHODS.items():
            bar.update(f"{name}: quantize")
            config = QuantConfig.preset(bits, method=method)
            sim = quantize(model, calibration.batches(recipe, drawn), config)
            if method != "erq":
                bar.update(f"{name}: evaluate")
                evaluations[name] = evaluate(sim, test.batches(recipe), reference=model)
        bar.update("ERQ: pack and write")
        file = Path(parent) / (f"vit_digits_{bits}.safetensors" if out is None else out.name)
        save(deploy(sim), file)
        bar.update("ERQ: reload in a new process")
        evaluations["ERQ"] = _evaluate_in_new_process(file, data, weights, where)
        bar.update("time")
        timings = benchmark(model, BATCH_SIZES, seconds=_TIMING_SECONDS, name="full precision")
        net = load(file, device=where)
        timings += benchmark(net, BATCH_SIZES, seconds=_TIMING_SECONDS, name="ERQ")
        size = file.stat().st_size

    parameters = sum(p.numel() for p in model.state_dict().values())
    return Demonstration(
        bits=bits,
        n_calibration=len(drawn),
        n_test=test.size,
        evaluations=evaluations,
        file=out,
        file_bytes=size,
        fp32_bytes=4 * parameters,
        fp16_bytes=2 * parameters,
        timings=timings,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads of torch inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _evaluate_in_new_process(
    file: Path, data: Path, reference: Path, device: torch.device
) -> Evaluation:
    """`erq eval` on the written file, in a process that has seen nothing else."""
    command = [
        sys.executable, "-m", "erq", "eval", str(file), "--images", str(data),
        "--reference", str(reference), "--device", str(device), "--json", "--quiet",
    ]  # fmt: skip
    package_root = str(Path(__file__).parents[1])
    paths = [package_root, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": str(_THREADS),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"evaluating {file} in a new process failed: {done.stderr.strip()}")
    return Evaluation(**json.loads(done.stdout)["evaluation"])


def demo_table(demo: Demonstration) -> Table:
    """One table: accuracy, size and time of every network."""
    columns = (
        "", "top-1 %", "agreement %", "SQNR dB", "size", "vs fp32", "vs fp16",
        *(f"batch {b} ms" for b in BATCH_SIZES), "kernel",
    )  # fmt: skip
    rows = []
    for name, evaluation in demo.evaluations.items():
        timings = [t for t in demo.timings if t.name == name]
        size = {"full precision": demo.fp32_bytes, "ERQ": demo.file_bytes}.get(name)
        rows.append(
            (
                name,
                number(evaluation.top1),
                number(evaluation.agreement),
                number(evaluation.sqnr_db),
                "" if size is None else megabytes(size),
                "" if size is None else f"{size / demo.fp32_bytes:.2f}×",
                "" if size is None else f"{size / demo.fp16_bytes:.2f}×",
                *([f"{t.median_ms:.2f}" for t in timings] or [""] * len(BATCH_SIZES)),
                timings[0].kernel if timings else "",
            )
        )
    threads = "" if demo.timings[0].threads is None else f", {_THREADS} thread"
    title = (
        f"{demo.bits.upper()} from {demo.n_calibration} unlabelled images, measured on "
        f"{demo.n_test} others · {demo.timings[0].hardware}{threads}"
    )
    return make_table(title, columns, rows)


def demo_remarks(demo: Demonstration) -> str:
    """What the table does not say by itself."""
    kernel = demo.timings[-1].kernel
    lines = [
        "Agreement and SQNR (signal over quantization noise, of the logits) compare with full "
        "precision. This small net is easy: --bits w2a4 shows the methods further apart.",
        "ERQ's accuracy is that of the packed file, as a new process reloads it; full-precision "
        "weights are there for the comparison alone.",
    ]
    if kernel == "reference":
        lines.append(
            "The reference kernels say what every code must be: on a CPU they are for exactness, "
            "not for speed."
        )
    if demo.file is not None:
        lines.append(f"The packed file is {demo.file}.")
    lines.append(f"All of it took {demo.seconds:.0f} s.")
    return "\n".join(lines)

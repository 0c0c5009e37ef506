"""Top-1 of every method on a real model: `python bench/accuracy.py` (72 runs of about 1 minute).

Prints a table of mean ± spread over calibration draws and writes one JSON line per run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product
from pathlib import Path

import torch
from cases import REAL, ResultFile, Task, real_task
from rich.console import Console
from rich.table import Table
from torch import Tensor

from erq.config import QuantConfig
from erq.pipeline import quantize

BITS = ("w3a4", "w4a4", "w4a8", "w6a6")
# name → (config of a width, calibration images)
SETTINGS = {
    "rtn": (lambda bits: QuantConfig.preset(bits, method="rtn"), 32),
    "repq": (lambda bits: QuantConfig.preset(bits, method="repq"), 32),
    "gptq": (lambda bits: QuantConfig.preset(bits, method="gptq"), 32),
    "paper": (QuantConfig.paper, 32),
    "erq": (QuantConfig.preset, 32),
    "erq-256": (QuantConfig.preset, 256),
    "paper-256": (QuantConfig.paper, 256),
}
DEFAULT = ("erq", "paper", "repq", "rtn", "gptq", "erq-256")


@torch.inference_mode()
def logits(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Outputs [N, classes] in batches of 64."""
    return torch.cat([model(x) for x in images.split(64)])


def run(task: Task, name: str, bits: str, draw: int, full: Tensor) -> dict[str, object]:
    """One quantization and its evaluation."""
    make, count = SETTINGS[name]
    start = time.perf_counter()
    sim = quantize(task.model, task.draw(count, draw), make(bits))
    seconds = time.perf_counter() - start
    out = logits(sim, task.test)
    right = (out.argmax(1) == task.labels).float().mean()
    kl = torch.nn.functional.kl_div(
        out.log_softmax(1), full.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return {
        "task": task.name,
        "method": name,
        "bits": bits,
        "images": count,
        "draw": draw,
        "top1": round(100 * float(right), 2),
        "agreement": round(100 * float((out.argmax(1) == full.argmax(1)).float().mean()), 2),
        "kl": float(kl),
        "logit_error": float((out - full).square().sum() / full.square().sum()),
        "calibration_s": round(seconds, 1),
    }


def main() -> None:
    """Run what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, default=REAL, help="folder of the real model")
    parser.add_argument("--methods", default=",".join(DEFAULT))
    parser.add_argument("--bits", default=",".join(BITS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--name", default="accuracy", help="of the result file")
    parser.add_argument("--resume", action="store_true", help="keep the runs already in that file")
    args = parser.parse_args()
    methods, widths = args.methods.split(","), args.bits.split(",")

    task = real_task(args.real)
    full = logits(task.model, task.test)
    top1 = 100 * float((full.argmax(1) == task.labels).float().mean())
    results = ResultFile(args.name, args.resume)
    if not results.rows():
        results.add({"task": task.name, "method": "full precision", "top1": round(top1, 2)})
    for bits, draw, name in product(widths, range(args.draws), methods):
        done = {(r["method"], r.get("bits"), r.get("draw")) for r in results.rows()}
        if (name, bits, draw) in done:
            continue
        row = run(task, name, bits, draw, full)
        results.add(row)
        print(f"{name:8} {bits} draw {draw}: {row['top1']:.2f}", flush=True)

    table = Table(title=f"{task.name}: top-1 %, mean ± standard deviation of {args.draws} draws")
    for column in ("method", "images", *widths):
        table.add_column(column)
    table.add_row("full precision", "", *[f"{top1:.2f}"] * len(widths))
    for name in methods:
        cells = []
        for bits in widths:
            values = [
                r["top1"] for r in results.rows() if r["method"] == name and r.get("bits") == bits
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        table.add_row(name, str(SETTINGS[name][1]), *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

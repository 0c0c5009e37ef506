"""Top-1 on a real model: of every method, or of every setting.

    python bench/accuracy.py                     methods at six widths, three draws (108 runs)
    python bench/accuracy.py --suite settings    widths, mixed bits, variants (39 runs a draw)
    python bench/accuracy.py --suite settings --docs    …and put the tables into docs/accuracy.md

A run takes about a minute and adds one JSON line to bench/results/; --resume keeps those there are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import REAL, RESULTS, ROOT, ResultFile, Task, device_name, real_task
from torch import Tensor, nn

from erq.config import QuantConfig
from erq.data import Preprocessing, synthetic_images
from erq.pipeline import quantize


@dataclass(frozen=True)
class Setting:
    """How a row of a table is made.

    Args:
        title: what a table calls it. make: config of a width. images: to calibrate on.
        synthetic: calibrate on noise.
    """

    title: str
    make: Callable[[str], QuantConfig] = QuantConfig.preset
    images: int = 32
    synthetic: bool = False


def preset(**changes: Any) -> Callable[[str], QuantConfig]:
    """Configs of a preset with these changes."""
    return lambda bits: QuantConfig.preset(bits, **changes)


def first(**changes: Any) -> Callable[[str], QuantConfig]:
    """The first default, before heads had a basis of their own, with these changes."""
    return preset(rotate_heads=False, ranges="official", reparameterize_hidden=False, **changes)


SETTINGS = {
    "rtn": Setting("round to nearest", preset(method="rtn", ranges="official")),
    "repq": Setting("RepQ stage, round to nearest", preset(method="repq", ranges="official")),
    "gptq": Setting("GPTQ on the RepQ stage", preset(method="gptq", ranges="official")),
    "paper": Setting("ERQ as published", QuantConfig.paper),
    "erq": Setting("ERQ sequential (default)"),
    "erq-256": Setting("ERQ sequential, 256 images", images=256),
    "erq-first": Setting("ERQ sequential, first default", first()),
    "erq-first-256": Setting("ERQ sequential, first default, 256 images", first(), images=256),
    "paper-256": Setting("ERQ as published, 256 images", QuantConfig.paper, images=256),
    "float-attention": Setting("q, k, softmax and v in float", preset(attention="float")),
    "patch-8": Setting(
        "patch embedding at 8 bits", preset(overrides={"patch_embed.proj": {"w_bits": 8}})
    ),
    "synthetic": Setting("calibrated on noise", synthetic=True),
    "rtn-synthetic": Setting(
        "calibrated on noise, round to nearest",
        preset(method="rtn", ranges="official"),
        synthetic=True,
    ),
}
METHODS = ("rtn", "repq", "gptq", "paper", "erq-first", "erq", "erq-first-256", "erq-256")
METHOD_BITS = ("w2a4", "w3a3", "w3a4", "w4a4", "w4a8", "w6a6")
LOW_BITS = {"w2a4": ("erq-first", "erq"), "w3a3": ("erq-first", "erq")}
"""The methods that come far enough at these widths to be compared."""
GRID_WEIGHTS, GRID_ACTIVATIONS = ("w2", "w3", "w4", "w6", "w8"), ("a3", "a4", "a6", "a8", "a16")
VARIANTS = ("float-attention", "patch-8", "synthetic", "rtn-synthetic")
VARIANT_BITS = ("w3a4", "w4a4", "w4a8")
TARGETS = ("w3.5a4", "w4.5a4")


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [N, classes] in batches of 64."""
    return torch.cat([model(x) for x in images.split(64)])


def calibration_images(task: Task, setting: Setting, draw: int) -> Tensor:
    """What a setting is calibrated on."""
    if not setting.synthetic:
        return task.draw(setting.images, draw)
    channels, height, width = task.calib.shape[1:]
    shape = {"input_size": (channels, height, width), "mean": task.mean, "std": task.std}
    recipe = Preprocessing.from_config(shape, (channels, height, width))
    return synthetic_images(recipe, [draw * setting.images + i for i in range(setting.images)])


def measure(
    task: Task, images: Tensor, config: QuantConfig, full: Tensor, target: float | None = None
) -> tuple[dict[str, Any], nn.Module]:
    """One quantization and its evaluation.

    Args:
        images: to calibrate on. full: full-precision logits of the test images.
        target: average bits of a weight, chosen layer by layer.

    Returns:
        Figures of a row, and the simulated network.
    """
    start = time.perf_counter()
    sim = quantize(task.model, images, config, target_bits=target)
    seconds = time.perf_counter() - start
    out = logits(sim, task.test)
    right = (out.argmax(1) == task.labels).float().mean()
    kl = nn.functional.kl_div(
        out.log_softmax(1), full.log_softmax(1), log_target=True, reduction="batchmean"
    )
    row: dict[str, Any] = {
        "task": task.name,
        "images": len(images),
        "top1": round(100 * float(right), 2),
        "agreement": round(100 * float((out.argmax(1) == full.argmax(1)).float().mean()), 2),
        "kl": float(kl),
        "logit_error": float((out - full).square().sum() / full.square().sum()),
        "calibration_s": round(seconds, 1),
    }
    return row, sim


def run(task: Task, name: str, bits: str, draw: int, full: Tensor) -> dict[str, Any]:
    """A row of one setting.

    Args:
        bits: as w4a4; as w3.5a4 for an average of 3.5, chosen layer by layer from a first run at
            the nearest whole width.
    """
    setting = SETTINGS[name]
    width, activations = re.fullmatch(r"w([\d.]+)(a\d+)", bits).groups()  # type: ignore[union-attr]
    target = None if width.isdigit() else float(width)
    config = setting.make(f"w{int(float(width) + 0.5)}{activations}")
    images = calibration_images(task, setting, draw)
    row, sim = measure(task, images, config, full, target)
    row |= {"method": name, "bits": bits, "draw": draw}
    if target is not None:
        chosen: Any = sim.erq_bits
        row["widths"] = {s.name: s.w_bits for s in chosen}
    return row


def cell(rows: list[dict[str, Any]], name: str, bits: str) -> str:
    """Mean and, over several draws, standard deviation of one setting at one width."""
    mine = [r for r in rows if r["method"] == name and r.get("bits") == bits]
    values = list({r["draw"]: r["top1"] for r in mine}.values())  # a draw may stand in two files
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def method_tables(rows: list[dict[str, Any]], methods: list[str], widths: list[str]) -> str:
    """A row per method, a column per width."""
    body = [
        [SETTINGS[m].title, str(SETTINGS[m].images), *(cell(rows, m, b) for b in widths)]
        for m in methods
    ]
    return markdown(["top-1 %", "images", *(b.upper() for b in widths)], body)


def setting_tables(rows: list[dict[str, Any]]) -> str:
    """The grid of widths; mixed bits; the variants."""
    grid = [
        [w.upper(), *(cell(rows, "erq", w + a) for a in GRID_ACTIVATIONS)] for w in GRID_WEIGHTS
    ]
    mixed = [
        [f"{float(b[1:4]):g} on average", cell(rows, "erq", b), _spread_of_widths(rows, b)]
        for b in TARGETS
    ]
    variants = [
        [SETTINGS[v].title, *(cell(rows, v, b) for b in VARIANT_BITS)] for v in ("erq", *VARIANTS)
    ]
    return "\n\n".join(
        (
            markdown(["top-1 %", *(a.upper() for a in GRID_ACTIVATIONS)], grid),
            markdown(["weights, A4", "top-1 %", "layers at each width"], mixed),
            markdown(["top-1 %", *(b.upper() for b in VARIANT_BITS)], variants),
        )
    )


def _spread_of_widths(rows: list[dict[str, Any]], bits: str) -> str:
    """Layers per width of the first draw."""
    for row in rows:
        if row.get("bits") == bits and "widths" in row:
            widths = list(row["widths"].values())
            return ", ".join(f"{widths.count(w)} at {w}" for w in sorted(set(widths)))
    return ""


def methods_rows(draws: int) -> list[dict[str, Any]]:
    """The default method's runs of the suite of methods, of the first draws."""
    path = RESULTS / device_name() / "accuracy.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [r for r in rows if r["method"] == "erq" and r["draw"] < draws]


def write_docs(tables: str, suite: str) -> None:
    """Put the tables between the markers of docs/accuracy.md."""
    path = ROOT / "docs" / "accuracy.md"
    start, end = f"<!-- {suite} -->", f"<!-- /{suite} -->"
    before, rest = path.read_text().split(start)
    path.write_text(f"{before}{start}\n{tables}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Run what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, default=REAL, help="folder of the real model")
    parser.add_argument("--suite", choices=("methods", "settings"), default="methods")
    parser.add_argument("--methods", default=",".join(METHODS), help="of the suite methods")
    parser.add_argument("--bits", default=",".join(METHOD_BITS), help="of the suite methods")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--name", help="of the result file; accuracy, or settings")
    parser.add_argument("--resume", action="store_true", help="keep the runs already in that file")
    parser.add_argument("--no-run", action="store_true", help="tables of what was run, no more")
    parser.add_argument("--docs", action="store_true", help="write the tables to docs/accuracy.md")
    args = parser.parse_args()
    methods, widths = args.methods.split(","), args.bits.split(",")

    if args.suite == "methods":
        cells = [(m, b) for b in widths for m in methods if m in LOW_BITS.get(b, METHODS)]
    else:
        cells = [("erq", b) for b in TARGETS]
        cells += [(v, b) for b in VARIANT_BITS for v in VARIANTS]
        cells += [("erq", w + a) for w, a in product(GRID_WEIGHTS, GRID_ACTIVATIONS)]
    task = real_task(args.real)
    full = logits(task.model, task.test)
    top1 = 100 * float((full.argmax(1) == task.labels).float().mean())
    results = ResultFile(
        args.name or {"methods": "accuracy"}.get(args.suite, args.suite),
        args.resume or args.no_run,
    )
    if not results.rows():
        results.add({"task": task.name, "method": "full precision", "top1": round(top1, 2)})
    # What the suite of methods has run already is not run again.
    before = [] if args.suite == "methods" else methods_rows(args.draws)
    for draw, (name, bits) in product(range(args.draws), cells):
        rows = before + results.rows()
        done = {(r["method"], r.get("bits"), r.get("draw")) for r in rows}
        if args.no_run or (name, bits, draw) in done:
            continue
        row = run(task, name, bits, draw, full)
        results.add(row)
        print(f"{name:8} {bits} draw {draw}: {row['top1']:.2f}", flush=True)

    rows = before + results.rows()
    if args.suite == "settings":
        tables = setting_tables(rows)
    else:
        tables = method_tables(rows, methods, widths)
    print(f"{task.name}, full precision {top1:.2f} %\n\n{tables}")
    if args.docs:
        write_docs(tables, args.suite)


if __name__ == "__main__":
    main()

"""What a process that dies leaves behind, and what one that lives long takes.

    python bench/reliability.py kills      SIGKILL at random moments of save and of erq quantize
    python bench/reliability.py memory     resident memory over many passes of a deployed network
    python bench/reliability.py marks      what it takes to bring NaN and infinity to the logits

docs/reliability.md shows the results. Linux only: it forks and reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import ResultFile
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import erq
from erq import cli
from erq.deployment import blocks, modules
from erq.loading import DEMO_METADATA, TimmOptions, load_model

ARCHITECTURE: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "mlp_ratio": 2.0,
}  # fmt: skip
MODES = ("save", "quantize", "quantize --resume")


class Broken(Exception):
    """A killed process left something that is neither the old file nor the new one."""


def inputs(folder: Path) -> list[str]:
    """Write a small model and images; the words of an `erq quantize` but for its --out."""
    torch.manual_seed(0)
    model = VisionTransformer(**ARCHITECTURE)
    description = {"arch_kwargs": ARCHITECTURE, "mean": 0.5, "std": 0.25}
    file = folder / "model.safetensors"
    save_file(model.state_dict(), file, metadata={DEMO_METADATA: json.dumps(description)})
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    return ["quantize", str(file), "--images", str(folder / "images.npz"), "--n", "8", "--quiet"]


def run_command(words: list[str]) -> None:
    """`erq` with these words, its output dropped."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        cli.app(words, standalone_mode=False)


def forked(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Whether `work`, in a process of its own, came to its end before it was killed.

    Args:
        kill_after: seconds from its start to the SIGKILL; None: never.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise Broken("the work failed by itself")
    return True


def kill_at_random(mode: str, times: int, seed: int) -> dict[str, Any]:
    """Kill `mode` so many times, each at a moment drawn from its whole duration.

    Raises:
        Broken: the target is neither old nor new, or a run that was resumed gives another file.
    """
    rng = random.Random(f"{mode} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = inputs(folder)
        old_file, target = folder / "old.safetensors", folder / "target" / "net.safetensors"
        target.parent.mkdir()
        run_command([*words, "--out", str(old_file), "--bits", "w3a4"])
        old = old_file.read_bytes()
        words += ["--out", str(target), *(["--resume"] if "--resume" in mode else [])]
        run_command(words)
        new = target.read_bytes()
        net = erq.load(target)

        def work() -> None:
            if mode == "save":
                erq.save(net, target)
            else:
                run_command(words)

        durations = []
        for _ in range(3):
            start = time.perf_counter()
            forked(work)
            durations.append(time.perf_counter() - start)
        whole = statistics.median(durations)
        found: Counter[str] = Counter()
        for _ in range(times):
            for left in target.parent.iterdir():
                left.unlink()
            target.write_bytes(old)
            if forked(work, kill_after=rng.uniform(0.0, 1.05 * whole)):
                found["ended before the kill"] += 1
            now = target.read_bytes() if target.exists() else b""
            if now not in (old, new):
                raise Broken(f"{mode}: {len(now)} bytes, neither the old file nor the new one")
            found["new" if now == new else "old"] += 1
            rest = [p.name for p in target.parent.iterdir() if p != target]
            found["with a scratch file beside it"] += any(n.endswith(".tmp") for n in rest)
            found["with a state to resume from"] += any(n.endswith(".resume") for n in rest)
            if "--resume" in mode:
                forked(work)
                if target.read_bytes() != new:
                    raise Broken("the run that was resumed gives another file")
                # The killed process cannot remove what it was writing; the next one must not add.
                scratch = [n for n in rest if n.startswith(".erq-") and n.endswith(".tmp")]
                left = sorted(p.name for p in target.parent.iterdir() if p.name not in scratch)
                if left != [target.name]:
                    raise Broken(f"the run that was resumed leaves {left}")
                found["resumed to the same bytes"] += 1
    return {"mode": mode, "kills": times, "seconds_whole": round(whole, 3), "seed": seed, **found}


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_series(inferences: int, points: int) -> dict[str, Any]:
    """Resident memory of a process that runs the shipped network again and again.

    Batches of 1, 2, 3 and 8 images in turn, so that what is kept per shape would show.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "net.safetensors"

        def make() -> None:
            sim = erq.quantize(load_model("demo"), torch.randn(16, 3, 32, 32), "w4a4")
            erq.save(erq.deploy(sim), file)

        forked(make)  # elsewhere: calibration leaves memory to the process, which would hide growth
        net: Any = erq.load(file)
        batches = [torch.randn(n, 3, 32, 32) for n in (1, 2, 3, 8)]
        every = inferences // points
        series, start = [], time.perf_counter()
        with torch.inference_mode():
            first = [net(x) for x in batches]
            for i in range(inferences):
                y = net(batches[i % len(batches)])
                if (i + 1) % every == 0:
                    series.append(round(resident_mb(), 2))
            same = all(torch.equal(net(x), y) for x, y in zip(batches, first, strict=True))
        del y
    settled = series[len(series) // 10 :]
    return {
        "inferences": inferences, "seconds": round(time.perf_counter() - start, 1),
        "resident_mb": series,
        "growth_mb_after_the_first_tenth": round(settled[-1] - settled[0], 2),
        "spread_mb_after_the_first_tenth": round(max(settled) - min(settled), 2),
        "same_logits_at_the_end": same,
    }  # fmt: skip


def cost_of_marks(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Median time of a pass with and without what carries NaN and infinity around codes, in turns.

    Args:
        name: a timm model; its weights are random, no time depends on them.
    """
    model = load_model(name, TimmOptions(random_weights=True))
    sim = erq.quantize(model, torch.randn(2, 3, 224, 224), {"method": "rtn"})
    net: Any = erq.deploy(sim)
    x = torch.randn(batch, 3, 224, 224)
    found: dict[bool, list[float]] = {True: [], False: []}
    marks = modules.not_finite
    with torch.inference_mode():
        for _ in range(3):
            net(x)
        for i in range(2 * rounds):
            marked = i % 2 == 0
            modules.not_finite = blocks.not_finite = marks if marked else lambda *_: 0.0
            for block in net.modules():
                if isinstance(block, blocks.QuantBlock):
                    block.first = marked and block is net.blocks[0]
            start = time.perf_counter()
            net(x)
            found[marked].append(time.perf_counter() - start)
    modules.not_finite = blocks.not_finite = marks
    with_marks, without = (1000 * statistics.median(found[m]) for m in (True, False))
    return {
        "model": name, "batch": batch, "rounds": rounds, "ms_with": round(with_marks, 3),
        "ms_without": round(without, 3), "percent": round(100 * (with_marks / without - 1), 2),
    }  # fmt: skip


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kills", "memory", "marks"))
    parser.add_argument("--times", type=int, default=200, help="kills, shared among the modes")
    parser.add_argument("--inferences", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # before a fork: other threads would be missing in the child
    results = ResultFile(f"reliability-{args.what}")
    if args.what == "memory":
        row = memory_series(args.inferences, 100)
        results.add(row)
        print({k: v for k, v in row.items() if k != "resident_mb"})
        return
    if args.what == "marks":
        for model, batch in (("vit_tiny_patch16_224", 1), ("vit_tiny_patch16_224", 8)):
            row = cost_of_marks(model, batch, 200 // batch)
            results.add(row)
            print(row)
        return
    for i, mode in enumerate(MODES):
        times = args.times // len(MODES) + (i < args.times % len(MODES))
        row = kill_at_random(mode, times, args.seed)
        results.add(row)
        print(row)


if __name__ == "__main__":
    main()

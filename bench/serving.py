"""Whether a deployed model serves: `python bench/serving.py`; exit status 1 if it does not.

- threads and batch sizes, odd ones too: time, and that an image's answer depends on neither where
  the pixels are codes as well (`image_bits`; torch's fp32 patch embedding sums in an order of the
  batch size's);
- two models of one process, called in turns, and by several threads at once: calls a second, and
  that each gives what it gave alone;
- thousands of calls of a small model in every form of its weights: that resident memory stays.

Answers are compared bit by bit. On a CPU; weights are random, quantized with the RepQ stage alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from cases import ResultFile, Spread
from torch import Tensor, nn

import erq
from erq.deployment.network import set_layout
from erq.timing import interleave

BATCHES = (1, 3, 5, 7, 8, 13)
CALIBRATION_IMAGES = 8
CALLERS = 4
GROWTH_BYTES = 1 << 20
"""Of resident memory between the first tenth of the calls and the last: what is left of the
allocator's own ups and downs; 9,000 calls that keep 128 bytes each pass it."""

SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 10,
}  # fmt: skip
CPU = torch.device("cpu")


def deployed(name: str, bits: str, seed: int, backend: str, **options: Any) -> nn.Module:
    """A deployed timm model of random weights, the seed's choice."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **options).eval()
    images = torch.randn(CALIBRATION_IMAGES, 3, *model.patch_embed.img_size)
    pixels = {} if bits.endswith("a16") else {"image_bits": 8}
    config = erq.QuantConfig.preset(bits, method="repq", **pixels)
    return erq.deploy(erq.quantize(model, images, config), backend)


def resident_bytes() -> int:
    """Of this process, as the kernel counts them."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Judge:
    """Collects rows and what is wrong.

    Args:
        results: where rows go.
    """

    def __init__(self, results: ResultFile) -> None:
        self.results = results
        self.problems: list[str] = []

    def add(self, part: str, case: str, shown: str, wrong: str | None, **fields: Any) -> None:
        """Print and keep a row; `wrong` says what is wrong with it, if anything is."""
        print(f"{part:<12}{case:<48}{shown:<46}{wrong or 'same answers'}", flush=True)
        self.results.add({"part": part, "case": case, "wrong": wrong} | fields)
        if wrong:
            self.problems.append(f"{part}, {case}: {wrong}")


def compare(got: Tensor, want: Tensor) -> str | None:
    """What is wrong with an answer, or None."""
    if torch.equal(got, want):
        return None
    wrong = int((got != want).flatten(1).any(1).sum())
    return f"{wrong} of {len(want)} answers differ, by up to {(got - want).abs().max():.2g}"


def check_batches(
    judge: Judge, net: nn.Module, x: Tensor, threads: Sequence[int], seconds: float
) -> None:
    """Time every batch size on every number of threads, in turns."""
    torch.set_num_threads(1)
    alone = torch.cat([net(image[None]) for image in x])

    def call(count: int, batch: Tensor) -> Tensor:
        torch.set_num_threads(count)
        return net(batch)

    for size in [b for b in BATCHES if b <= len(x)]:
        calls = {f"{n} thread" + "s" * (n > 1): partial(call, n, x[:size]) for n in threads}
        wrong = {name: compare(run(), alone[:size]) for name, run in calls.items()}
        times = {name: Spread.of(ms) for name, ms in interleave(calls, CPU, seconds).items()}
        base = times[next(iter(calls))].median
        for name, spread in times.items():
            rate, ratio = 1000 * size / spread.median, base / spread.median
            judge.add(
                "batches",
                f"batch {size}, {name}",
                f"{spread.median:8.2f} ms {rate:7.1f} img/s {ratio:5.2f} × 1 thread",
                wrong[name],
                **{"batch": size, "ms": spread.median, "low": spread.low, "high": spread.high},
                **{"images_per_s": round(rate, 1), "ran_on": name, "baseline": "1 thread"},
                **{"ratio": round(ratio, 3)},
            )


Work = Sequence[tuple[str, nn.Module, Tensor, Tensor]]


def plan(nets: Mapping[str, nn.Module], x: Tensor) -> Work:
    """(name, model, batch, its answer) for odd batch sizes, the models in turns."""
    batches = [x[len(x) - b :] for b in BATCHES if b % 2 and b <= len(x)]
    with torch.inference_mode():
        return [(name, net, batch, net(batch)) for batch in batches for name, net in nets.items()]


def serve(work: Work, calls: int) -> str | None:
    """Call after call of `work`, again and again; what is wrong with an answer, or None."""
    wrong = None
    with torch.inference_mode():
        for _, (name, net, batch, want) in zip(range(calls), itertools.cycle(work), strict=False):
            found = compare(net(batch), want)
            wrong = wrong or (found and f"{name}: {found}")
    return wrong


def check_callers(judge: Judge, what: str, work: Work, calls: int) -> None:
    """One caller, then several threads that call the same models at once."""
    rates: list[float] = []
    for callers in (1, CALLERS):
        found: list[str | None] = []
        lock = threading.Lock()
        go = threading.Barrier(callers + 1)

        def caller(
            found: list[str | None] = found,
            lock: threading.Lock = lock,
            go: threading.Barrier = go,
        ) -> None:
            go.wait()
            try:
                wrong = serve(work, calls)
            except Exception as error:  # a thread's end must not look like an answer
                wrong = f"{type(error).__name__}: {error}"
            with lock:
                found.append(wrong)

        workers = [threading.Thread(target=caller) for _ in range(callers)]
        for worker in workers:
            worker.start()
        go.wait()
        begin = time.perf_counter()
        for worker in workers:
            worker.join()
        rates.append(callers * calls / (time.perf_counter() - begin))
        judge.add(
            "callers",
            f"{callers} at once, {what}",
            f"{rates[-1]:8.1f} calls/s {rates[-1] / rates[0]:5.2f} × 1 caller",
            next((wrong for wrong in found if wrong), None),
            **{"callers": callers, "calls_per_s": round(rates[-1], 2), "baseline": "1 caller"},
            **{"ratio": round(rates[-1] / rates[0], 3)},
        )


def check_memory(judge: Judge, what: str, run: Callable[[int], str | None], calls: int) -> None:
    """Run a tenth of the calls, note resident memory, and again until all are done."""
    wrong, sizes = None, []
    for _ in range(10):
        wrong = run(calls // 10) or wrong
        sizes.append(resident_bytes())
    growth = sizes[-1] - sizes[0]
    if growth > GROWTH_BYTES:
        wrong = f"memory grew by {growth / 1e6:.1f} MB after the first tenth of the calls"
    judge.add(
        "memory",
        f"{calls} calls, {what}",
        f"{sizes[0] / 1e6:8.1f} MB, at the end {growth / 1e3:+.0f} kB",
        wrong,
        **{"calls": calls, "resident_mb": [round(s / 1e6, 2) for s in sizes]},
    )


def main() -> int:
    """Measure, print a table, write bench/results/<device>/serving.jsonl; 1: it does not serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="most of them")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each batch size")
    parser.add_argument("--calls", type=int, default=10_000, help="of each memory check")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no result file")
    args = parser.parse_args()
    if args.threads < 1 or args.calls < 10:
        parser.error(f"at least 1 thread and 10 calls, got {args.threads} and {args.calls}")
    options = SMALL if args.smoke else {}
    two = {
        "w4a4": deployed(args.model, "w4a4", 0, args.backend, **options),
        "w3a16": deployed(args.model, "w3a16", 1, args.backend, **options),
    }
    small = {b: deployed("vit_tiny_patch16_224", b, 2, args.backend, **SMALL) for b in two}
    size = two["w4a4"].patch_embed.img_size
    x, small_x = torch.randn(max(BATCHES), 3, *size), torch.randn(max(BATCHES), 3, 32, 32)
    judge = Judge(ResultFile("serving", smoke=args.smoke))
    with torch.inference_mode():
        check_batches(judge, two["w4a4"], x, range(1, args.threads + 1), args.seconds)
    torch.set_num_threads(1)  # a thread of its own for each caller
    check_callers(judge, f"{args.model}, two forms", plan(two, x), 10)
    check_callers(judge, "small, two forms", plan(small, small_x), args.calls // 10)
    torch.set_num_threads(args.threads)
    for name, net in small.items():
        for layout in ("int8", "packed"):
            set_layout(net, layout)
            run = partial(serve, plan({name: net}, small_x))
            check_memory(judge, f"{name}, weights as {layout}", run, args.calls)
    print(f"rows in {judge.results.path}")
    for problem in judge.problems:
        print(problem, file=sys.stderr)
    return 1 if judge.problems else 0


if __name__ == "__main__":
    sys.exit(main())

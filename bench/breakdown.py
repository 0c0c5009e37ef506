"""Where a deployed model's time goes on this CPU, op by op: `python bench/breakdown.py`.

Each op of a pass is timed inside whole passes, at the call of its kernel; "outside" is the rest of
the pass: Python, torch's dispatcher, and the ops that stay in floating point. The floor of an
integer product is its multiplications at the rate of this machine's best int8 GEMM, that of other
ops their bytes at the rate of a copy; both are measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import timm
import torch
from cases import ResultFile
from models import CALIBRATION_IMAGES, deployed
from torch import Tensor

from erq.deployment.network import set_backend
from erq_kernels import dispatch


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def best_seconds(call: Any, rounds: int = 15) -> float:
    """Shortest of some runs: what the machine can do."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def int8_rate() -> float:
    """Multiplications and additions per second of torch's int8 GEMM at its best size."""
    a = torch.randint(0, 16, (2048, 1536), dtype=torch.int8)
    b = torch.randint(-8, 8, (1536, 1536), dtype=torch.int8).t()
    return 2 * 2048 * 1536 * 1536 / best_seconds(lambda: torch._int_mm(a, b))


def copy_rate() -> float:
    """Bytes read and written per second by a copy too large for the caches."""
    a = torch.zeros(64 * 2**20, dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * a.numel() / best_seconds(lambda: b.copy_(a))


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def work_of(op: str, args: tuple[Any, ...], result: Tensor) -> tuple[str, int, int]:
    """(label, int8 operations, bytes) of one call."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    moved = size(result, *tensors)
    if op == "qlinear":
        (m, k), n = args[0].shape, args[1].shape[0]
        return f"qlinear {m}×{n}×{k}", 2 * m * n * k, moved
    if op == "qattention":
        b, h, t, d = args[0].shape
        # QKᵀ once, PV once for each parity of the softmax codes.
        return f"qattention {b}×{h}×{t}×{d}", 3 * 2 * b * h * t * t * d, moved
    return f"{op} {'×'.join(map(str, args[0].shape))}", 0, moved


def measure(net: Any, x: Tensor, passes: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Milliseconds per pass of each op and of the whole, and the work of each op in a pass."""
    real = dispatch.call
    spent: dict[str, float] = defaultdict(float)
    work: dict[str, Any] = {}

    def call(op: str, backend: str, *args: Any) -> Any:
        start = time.perf_counter()
        result = real(op, backend, *args)
        seconds = time.perf_counter() - start
        label, operations, moved = work_of(op, args, result)
        spent[label] += seconds
        count, *_ = work.get(label, (0, 0, 0))
        work[label] = (count + 1, operations, moved)
        return result

    columns: dict[str, list[float]] = defaultdict(list)
    dispatch.call = call
    try:
        for i in range(passes + 3):
            spent.clear()
            work.clear()
            start = time.perf_counter()
            net(x)
            total = time.perf_counter() - start
            if i < 3:
                continue
            for label, seconds in spent.items():
                columns[label].append(1000 * seconds)
            columns["outside"].append(1000 * (total - sum(spent.values())))
            columns["whole pass"].append(1000 * total)
    finally:
        dispatch.call = real
    return columns, dict(work)


def main() -> None:
    """Measure, print a table, write bench/results/<device>/breakdown.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--batches", default="1,8", help="by commas")
    parser.add_argument("--bits", default="w4a4", help="a preset")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no result file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2} if args.smoke else {}
    model = timm.create_model(args.model, **options).eval()
    shape = (3, *model.patch_embed.img_size)
    net = deployed(model, args.bits, torch.randn(CALIBRATION_IMAGES, *shape))
    set_backend(net, args.backend)
    results = ResultFile("breakdown", smoke=args.smoke)
    print(f"{'batch':>5}  {'op':<40}{'calls':>6}{'ms':>9}{'floor':>9}{'× floor':>9}{'share':>8}")
    with torch.inference_mode():
        for batch in map(int, args.batches.split(",")):
            columns, work = measure(net, torch.randn(batch, *shape), args.passes)
            operations_rate, byte_rate = int8_rate(), copy_rate()
            whole = median(columns["whole pass"])
            for label in sorted(columns, key=lambda c: -median(columns[c])):
                ms = median(columns[label])
                count, operations, moved = work.get(label, (1, 0, 0))
                floor = 1000 * count * max(operations / operations_rate, moved / byte_rate)
                if label == "whole pass":
                    floor = 1000 * sum(
                        c * max(o / operations_rate, m / byte_rate) for c, o, m in work.values()
                    )
                times_floor = f"{ms / floor:>9.2f}" if floor else f"{'':>9}"
                print(
                    f"{batch:>5}  {label:<40}{count:>6}{ms:>9.3f}{floor:>9.3f}{times_floor}"
                    f"{100 * ms / whole:>7.1f}%"
                )
                results.add(
                    {"model": args.model, "bits": args.bits, "batch": batch, "op": label}
                    | {"backend": args.backend, "calls": count, "ms": round(ms, 4)}
                    | {"floor_ms": round(floor, 4)}
                    | {"int8_gops": round(operations_rate / 1e9), "copy_gb_s": byte_rate / 1e9}
                )
            rates = f"int8 GEMM {operations_rate / 1e9:.0f} GOP/s, copy {byte_rate / 1e9:.0f} GB/s"
            print(f"{'':>7}{rates}")
    print(f"rows in {results.path}")


if __name__ == "__main__":
    main()

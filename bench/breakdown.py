"""Where a deployed model's time goes on this CPU, op by op: `python bench/breakdown.py`.

Each op of a pass is timed inside whole passes, at the call of its kernel; "outside" is the rest of
the pass: Python, torch's dispatcher, and the ops that stay in floating point. The time of a call
for a whole block is divided among its ops as the library measures them inside, over all threads.
The floor of an integer product is its multiplications at the rate of this machine's best int8 GEMM,
that of other ops their bytes at the rate of a copy; both are measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from functools import partial
from typing import Any

import timm
import torch
from cases import ResultFile
from models import CALIBRATION_IMAGES, deployed
from torch import Tensor

from erq.deployment.network import set_backend
from erq_kernels import _cpu, dispatch
from erq_kernels._cpu import BlockArguments


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
    """Multiplications and additions per second of torch's int8 GEMM at its best of some sizes."""
    rates = []
    for m, n, k in ((2048, 1536, 1536), (1024, 1024, 8192), (4096, 4096, 4096)):
        a = torch.randint(0, 16, (m, k), dtype=torch.int8)
        b = torch.randint(-8, 8, (n, k), dtype=torch.int8).t()
        rates.append(2 * m * n * k / best_seconds(partial(torch._int_mm, a, b)))
    return max(rates)


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


def work_of_block(x: Tensor, a: BlockArguments) -> list[tuple[str, int, int]]:
    """As `work_of`, for each of BLOCK_PARTS."""
    b, t, width = x.shape
    m, float_bytes = b * t, x.element_size()
    rows = [m * width * float_bytes, m * width * float_bytes * 2]  # read; read and written

    def product(name: str, operands: dict[str, Any], moved: int) -> tuple[str, int, int]:
        n, k = operands["weight"].shape
        return f"{name} {m}×{n}×{k}", 2 * m * n * k, m * k + n * k + moved

    def norm(columns: int) -> tuple[str, int, int]:
        return f"layer_norm_quantize {m}×{width}", 0, rows[0] + m * columns

    heads = a.heads * a.head_dim
    return [
        norm(a.qkv["weight"].shape[1]),
        product("qkv", a.qkv, 3 * m * heads),
        (f"qattention {b}×{a.heads}×{t}×{a.head_dim}", 6 * b * t * t * heads, 4 * m * heads),
        product("proj", a.proj, rows[1]),
        norm(a.fc1["weight"].shape[1]),
        product("fc1", a.fc1, m * a.fc1["weight"].shape[0]),
        product("fc2", a.fc2, rows[1]),
    ]


def measure(net: Any, x: Tensor, passes: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Milliseconds per pass of each op and of the whole, and the work of each op in a pass."""
    with _cpu.timed_blocks() as times:
        return _measure(net, x, passes, times)


def _measure(
    net: Any, x: Tensor, passes: int, times: Tensor
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """`measure`, with `times` those of the blocks."""
    real = dispatch.call
    spent: dict[str, float] = defaultdict(float)
    work: dict[str, Any] = {}

    def call(op: str, backend: str, *args: Any) -> Any:
        start = time.perf_counter()
        result = real(op, backend, *args)
        seconds = time.perf_counter() - start
        if op == "block":
            parts = times.tolist()
            shares = [seconds * part / sum(parts) for part in parts]
            times.zero_()
            done = list(zip(work_of_block(*args), shares, strict=True))
        else:
            done = [(work_of(op, args, result), seconds)]
        for (label, operations, moved), share in done:
            spent[label] += share
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
                    | {"backend": args.backend, "variant": _cpu.variant(), "calls": count}
                    | {"ms": round(ms, 4)}
                    | {"floor_ms": round(floor, 4)}
                    | {"int8_gops": round(operations_rate / 1e9), "copy_gb_s": byte_rate / 1e9}
                )
            rates = f"int8 GEMM {operations_rate / 1e9:.0f} GOP/s, copy {byte_rate / 1e9:.0f} GB/s"
            print(f"{'':>7}{rates}")
    print(f"rows in {results.path}")


if __name__ == "__main__":
    main()

"""Calibration on several ranks: what it takes on this machine, and what goes over the wire.

    python bench/distributed.py            time: two processes of one thread beside one process
    python bench/distributed.py --plan     bytes per site for 8 ranks, ViT-S and ViT-B; --docs puts
                                           the tables into docs/distributed.md

Random weights: neither time nor bytes depend on them. Each run is a process of its own, or two;
runs take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from cases import ROOT, ResultFile
from torch import Tensor, nn

import erq
from erq.calib.calibrate import MAX_ELEMENTS, RANGE_IMAGES
from erq.calib.heads import rotated_attention
from erq.calib.prepare import insert_simulated
from erq.config import FLOAT_BITS, QuantConfig
from erq.data import CHUNK_IMAGES
from erq.models import adapter_for
from erq.ranks import Ranks, launched
from erq.reduce.gram import Gram
from erq.reduce.shared_gram import WIRE

PLANS = (("vit_small_patch16_224", 1024), ("vit_base_patch16_224", 1024))
DOCS = ROOT / "docs" / "distributed.md"


@dataclass(frozen=True)
class Traffic:
    """Bytes that all ranks together send for one site.

    Args:
        name: the site. rows: its inputs on the images of the range search, to the first rank; with
            a qkv layer also the q, k and v that the heads' basis needs.
        sums: the chunks' matrices, dealt out. whole: their sums, to the first rank.
        decision: codes, scales and bias, from the first rank to the others; without headers.
    """

    name: str
    rows: int = 0
    sums: int = 0
    whole: int = 0
    decision: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.rows + self.sums + self.whole + self.decision


def traffic(model: nn.Module, images: int, size: int, config: QuantConfig) -> list[Traffic]:
    """What `erq.quantize` sends on `size` ranks: the images' digest first, then every site.

    Args:
        model: full precision; its own input size. images: how many there are.
    """
    ranks = Ranks(0, size)
    adapter = adapter_for(model)
    channels, height, width = adapter.input_shape(model)
    image = torch.zeros(1, channels, height or 224, width or 224)
    sim = deepcopy(model).float().eval()
    blocks = insert_simulated(sim, adapter, config)
    sites = [s for b in blocks for s in b.sites]
    inputs = _inputs(sim, image)
    chunks = [min(CHUNK_IMAGES, images - i) for i in range(0, images, CHUNK_IMAGES)]
    away = sum(n for i, n in enumerate(chunks) if not ranks.owns(i))
    found = [Traffic("(digest of the images)", rows=4 * away * image.numel())]
    fitted: set[str] = set()
    for site in sites:
        own = config.for_site(site.name)
        bits = own.image_bits if site.kind == "conv" else own.a_bits
        rows = 0
        if bits != FLOAT_BITS and (site.norm is None or site.norm not in fitted):
            fitted.add(site.norm or site.name)
            rows = _rows(inputs[site.name], chunks, ranks)
        sums = whole = decision = 0
        if site.kind in ("linear", "conv"):
            module: Any = sim.get_submodule(site.name)
            rest = size - 1
            gram = Gram(module.weight.shape[1], torch.device("meta"), module.weight)
            for matrix, wire in zip((gram.g, gram.c, gram.p), WIRE, strict=True):
                n = matrix.numel()
                sums += ranks.rounds(len(chunks)) * rest * n * wire.itemsize
                whole += (n - ranks.pieces(n)[0]) * matrix.element_size()
            decision = rest * (module.weight.numel() + 4 * len(module.weight) * 3)
        if config.rotate_heads and rotated_attention(sim, site.name) is not None:
            owner = site.name.rpartition(".")[0]
            rows += _rows([*inputs[f"{owner}.qk"], *inputs[f"{owner}.av"]], chunks, ranks)
        found.append(Traffic(site.name, rows, sums, whole, decision))
    return found


def _inputs(sim: nn.Module, image: Tensor) -> dict[str, list[int]]:
    """Elements of every tensor that every module is given, for one image."""
    sizes: dict[str, list[int]] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        sizes[name] = [a.numel() for a in args if isinstance(a, Tensor)]

    for name, module in sim.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
    with torch.no_grad():
        sim(image)
    return sizes


def _rows(elements: Sequence[int], chunks: Sequence[int], ranks: Ranks) -> int:
    """Bytes of fp32 rows that the first rank gets from the others for the range search."""
    left, seen, sent = RANGE_IMAGES, 0, 0
    for number, images in enumerate(chunks):
        taken = min(left, images)
        if not taken or seen >= MAX_ELEMENTS:
            break
        sent += 0 if ranks.owns(number) else 4 * taken * sum(elements)
        seen, left = seen + taken * max(elements), left - taken
    return sent


def plan(ranks: int, docs: bool) -> None:
    """Print the tables, and put them into the documentation if asked to."""
    tables = []
    for name, images in PLANS:
        model = timm.create_model(name).eval()
        rows = traffic(model, images, ranks, QuantConfig.preset("w4a4"))
        tables.append(_table(name, images, ranks, rows))
    text = "\n\n".join(tables)
    print(text)
    if docs:
        marked = re.compile(r"(<!-- plan -->\n).*(<!-- end of plan -->)", re.DOTALL)
        DOCS.write_text(marked.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", DOCS.read_text()))


def _table(name: str, images: int, ranks: int, rows: Sequence[Traffic]) -> str:
    """A row per kind of site: sites whose traffic is equal stand together."""
    kinds: dict[str, list[Traffic]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"^blocks\.\d+", "blocks.*", row.name), []).append(row)
    columns = ("rows", "sums", "whole", "decision", "total")

    def cells(label: str, group: Sequence[Traffic]) -> str:
        mb = [f"{sum(getattr(r, c) for r in group) / 1e6:,.1f}" for c in columns]
        return f"| {label} | " + " | ".join(mb) + " |"

    lines = [
        f"{name}, {images} images on {ranks} ranks, MB sent by all ranks together:",
        "",
        "| site | range rows | chunks' sums | whole sums | decisions | total |",
        "|---|---|---|---|---|---|",
    ]
    for kind, group in kinds.items():
        assert len({r.total for r in group}) == 1, f"{kind} differs from block to block"
        lines.append(cells(kind if len(group) == 1 else f"{kind}, each", group[:1]))
    lines.append(cells("**all**", rows))
    return "\n".join(lines)


def child(model_name: str, images: int, threads: int) -> None:
    """One quantization, alone or as a rank; the first rank prints one JSON object."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(model_name).eval()
    x = torch.randn(images, *model.pretrained_cfg["input_size"])
    with launched(torch.device("cpu")) as ranks:
        ranks.merge({ranks.rank: 0})  # all are there
        start, cpu = time.perf_counter(), time.process_time()
        sim: Any = erq.quantize(model, x, "w4a4", ranks=ranks)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        spent = ranks.merge({ranks.rank: (ranks.sent_bytes, ranks.told_bytes, cpu)})
    if ranks.first:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "net.safetensors")
            erq.save(erq.deploy(sim), file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        row = {
            "seconds": round(seconds, 2), "sha256": digest,
            "stages": {k: round(v, 2) for k, v in sim.erq_stages.items()},
            "sent_mb": round(sum(a for a, _, _ in spent.values()) / 1e6, 1),
            "told_mb": round(sum(b for _, b, _ in spent.values()) / 1e6, 1),
            "cpu_seconds": [round(c, 2) for _, _, c in spent.values()],
        }  # fmt: skip
        print(json.dumps(row))


def start(size: int, threads: int, options: list[str]) -> str:
    """Output of the first of `size` processes of this program, which find each other as torchrun's
    do; without torchrun, which would put each into a session of its own, with its own share of the
    machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(size)}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, *options]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **given, "RANK": str(r)}
        )
        for r in range(size)
    ]
    out = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a run failed")
    return out[0]


def measure(model: str, images: int, rounds: int) -> None:
    """Time one process on one and on two threads, and two ranks of one thread, in turns."""
    setups = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 ranks": (2, 1)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in setups}
    for _ in range(rounds):
        for name, (size, threads) in setups.items():
            options = ["--child", str(threads), "--model", model, "--images", str(images)]
            found[name].append(json.loads(start(size, threads, options).splitlines()[-1]))
            print(f"{name}: {found[name][-1]['seconds']} s", flush=True)
    results = ResultFile("distributed")
    first = min(r["seconds"] for r in found["1 process, 1 thread"])
    for name, runs in found.items():
        best = min(runs, key=lambda r: r["seconds"])
        times = [r["seconds"] for r in runs]
        row = {
            "model": model, "bits": "w4a4", "images": images, "setup": name, **best,
            "all_seconds": times, "median_seconds": statistics.median(times),
            "speedup": round(first / best["seconds"], 2),
        }  # fmt: skip
        results.add(row)
        print(f"{name}: best {best['seconds']} s, × {row['speedup']}, {best['stages']}")
    for name, runs in found.items():
        if {r["sha256"] for r in runs} != {found["1 process, 1 thread"][0]["sha256"]}:
            print(f"{name}: another file than that of one process with one thread")


def main() -> None:
    """Measure, or print the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="bytes instead of times")
    parser.add_argument("--ranks", type=int, default=8, help="of the plan")
    parser.add_argument("--docs", action="store_true", help="put the plan into the documentation")
    parser.add_argument("--model", default="vit_small_patch16_224", help="to time")
    parser.add_argument("--images", type=int, default=64, help="to time with")
    parser.add_argument("--rounds", type=int, default=2, help="of runs in turns; the best counts")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.model, args.images, args.child)
    elif args.plan:
        plan(args.ranks, args.docs)
    else:
        measure(args.model, args.images, args.rounds)


if __name__ == "__main__":
    main()

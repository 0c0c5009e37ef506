"""Wall time and memory of calibration: `python bench/calibration.py` (ViT-S, W4A4, 32 and 256
images).

Random weights: time and memory do not depend on them. Each size runs in a process of its own;
memory is the process's peak resident set, read from the operating system, beside that of a process
that only loads the model and the images.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import timm
import torch
from cases import ResultFile

from erq.config import QuantConfig
from erq.pipeline import quantize


def peak_mb() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(model_name: str, bits: str, images: int, upstream: str) -> None:
    """Measure one quantization; print one JSON object."""
    torch.manual_seed(0)
    model = timm.create_model(model_name).eval()
    size = model.patch_embed.img_size[0]
    x = torch.randn(max(images, 1), 3, size, size)
    loaded = peak_mb()
    row: dict[str, object] = {
        "model": model_name, "bits": bits, "images": images, "upstream": upstream,
        "images_mb": round(x.numel() * 4 / 2**20), "loaded_mb": round(loaded),
    }  # fmt: skip
    start = time.perf_counter()
    sim = quantize(model, x, QuantConfig.preset(bits, upstream=upstream))
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["peak_mb"] = round(peak_mb())
    row["stages"] = {k: round(v, 1) for k, v in sim.erq_stages.items()}
    print(json.dumps(row))


def main() -> None:
    """Run every size and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--images", default="32,256")
    parser.add_argument("--upstream", default="quantized")
    parser.add_argument("--name", default="calibration", help="of the result file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.model, args.bits, args.child, args.upstream)
        return
    results = ResultFile(args.name)
    for count in args.images.split(","):
        command = [
            sys.executable, __file__, "--model", args.model, "--bits", args.bits,
            "--upstream", args.upstream, "--child", count,
        ]  # fmt: skip
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(out.splitlines()[-1])
        results.add(row)
        stages = ", ".join(f"{k} {v} s" for k, v in row["stages"].items())
        print(
            f"{row['model']} {row['bits']}, {row['images']} images: {row['seconds']} s, peak "
            f"{row['peak_mb']} MB ({row['loaded_mb']} MB before, images {row['images_mb']} MB); "
            f"{stages}",
            flush=True,
        )


if __name__ == "__main__":
    main()

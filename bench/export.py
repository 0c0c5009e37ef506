"""What the exports of the demo's model come to: `python bench/export.py`.

On all images of the demo: top-1, agreement with the deployed model, the largest difference of a
logit of an image in standard deviations of the logits, and bytes. What runs the kernels of this
project is compared with the model on the same ones, the others with the exact reference. Needs
erq[export].
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import ResultFile
from torch import Tensor

import erq
from erq.data import open_images
from erq.inputs import preprocessing
from erq.loading import load_model

BATCH = 8
CALIBRATION_IMAGES = 32

Run = Callable[[Tensor], Tensor]


def torch_export(net: Any, x: Tensor, folder: Path) -> tuple[Run, Path]:
    """An exported program with a dynamic batch, saved."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    torch.export.save(program, folder / "exported.pt2")
    return program.module(), folder / "exported.pt2"


def aot_inductor(net: Any, x: Tensor, folder: Path) -> tuple[Run, Path]:
    """The program compiled ahead of time and packaged, loaded again."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    file = folder / "compiled.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return torch._inductor.aoti_load_package(str(file)), file


def onnx_runtime(net: Any, codes: str, folder: Path) -> tuple[Run, Path]:
    """The ONNX file in ONNX Runtime, on as many threads as torch has."""
    import onnxruntime

    file = folder / f"{codes}.onnx"
    erq.export_onnx(net, file, codes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return run, file


def main() -> None:
    """Measure, print, write bench/results/<device>/export.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", default="w4a4,w3a4,w8a8,w4a16", help="presets by commas")
    args = parser.parse_args()
    results = ResultFile("export")
    model = load_model("demo")
    source = open_images("demo")
    everything = source.batches(preprocessing(model), list(range(source.size)))
    x, labels = (torch.cat(list(part)) for part in zip(*everything, strict=True))
    drawn = sorted(source.draw(CALIBRATION_IMAGES, seed=0))
    with torch.no_grad():
        for bits in args.bits.split(","):
            sim = erq.quantize(model, x[drawn], bits)
            net: Any = erq.deploy(sim, "reference")
            fast: Any = erq.deploy(sim, "auto")
            exact, own = net(x), fast(x)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                erq.save(net, folder / "packed.safetensors")
                makers: dict[str, Callable[[], tuple[Run, Path]]] = {
                    "erq reference": lambda net=net, f=folder: (net, f / "packed.safetensors"),
                    "erq auto": lambda net=fast, f=folder: (net, f / "packed.safetensors"),
                    "torch.export": lambda net=fast, f=folder: torch_export(net, x[:BATCH], f),
                    "AOTInductor": lambda net=fast, f=folder: aot_inductor(net, x[:BATCH], f),
                    "ONNX int4": lambda net=net, f=folder: onnx_runtime(net, "int4", f),
                    "ONNX int8": lambda net=net, f=folder: onnx_runtime(net, "int8", f),
                }
                for how, make in makers.items():
                    run, file = make()
                    got = run(x)
                    is_torch = how in ("torch.export", "AOTInductor")
                    want = own if is_torch else exact
                    error = (got - want).abs().amax(dim=1) / want.std()
                    row = {
                        "bits": bits,
                        "export": how,
                        "against": "auto" if is_torch else "reference",
                        "images": len(x),
                        "top1": 100 * float((got.argmax(1) == labels).float().mean()),
                        "agreement": 100 * float((got.argmax(1) == want.argmax(1)).float().mean()),
                        "largest_error": float(error.max()),
                        "median_error": float(error.median()),
                        "bytes": file.stat().st_size,
                    }
                    results.add(row)
                    print(
                        f"{bits:6} {how:14} top-1 {row['top1']:6.2f} %  agreement "
                        f"{row['agreement']:6.2f} %  error {row['largest_error']:.1e} (median "
                        f"{row['median_error']:.1e})  {row['bytes']:>9,} bytes",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

"""What each layer costs at least, and what the design expects, on paper:
`python bench/roofline.py`.

Floor: the larger of operations / peak rate and bytes / peak bandwidth, every tensor moved once.
Expected: the same with rates that are reached. A product over K columns reaches REACHED · K / (K +
HALF_K) of the peak, bandwidth 90 % of its peak, and no kernel ends sooner than LAUNCH_US, as under
a CUDA graph. The form and its constants are a fit to published fp8 and bf16 GEMM times on H100 and
H200; for A100 and RTX 4090 the same fractions are an assumption. Nothing here was timed by this
project: it is what a time measured by bench/kernels.py and bench/models.py is to be compared with.

GEMMs multiply int8; on A100 and RTX 4090, which have int4 tensor cores, packed 4-bit codes.
The baseline is the same block in bf16: fused by a compiler (LayerNorm with the residual; GELU and
bias apart), attention by a flash kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from shapes import MODELS, Kernel, model_kernels

LAUNCH_US = 2.0
BANDWIDTH_REACHED = 0.9
BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class Device:
    """Peak rates, dense. Source: the vendor's data sheets.

    Args:
        int8, int4, half: 10^12 operations/s of tensor cores (int4: int8's where there is none;
            half: with fp32 sums). bandwidth: 10^9 bytes/s.
    """

    int8: float
    int4: float
    half: float
    bandwidth: float


DEVICES = {
    "A100": Device(624, 1248, 312, 2039),
    "RTX 4090": Device(661, 1321, 165, 1008),
    "H100": Device(1979, 1979, 989, 3350),
    "H200": Device(1979, 1979, 989, 4800),
}


@dataclass(frozen=True)
class Precision:
    """How GEMMs and attention run, and bytes of an activation between layers and of a weight.

    Args:
        rate: name of the device's rate for GEMMs. reached, half_k: the GEMM fit.
    """

    rate: str
    act: float
    weight: float
    reached: float
    half_k: int


CODES = Precision("int8", 1, 1, 0.76, 400)
PACKED = Precision("int4", 0.5, 0.5, 0.76, 400)
BF16 = Precision("half", 2, 2, 0.80, 200)


@dataclass(frozen=True)
class Row:
    """One kernel on one device.

    Args:
        bytes, operations: of one call. floor_us, expected_us: of one call. bound: what the floor is
            made of. bf16_us: expected for the same step in bf16.
    """

    model: str
    batch: int
    device: str
    kernel: str
    calls: int
    bytes: int
    operations: int
    floor_us: float
    bound: str
    expected_us: float
    bf16_us: float


def math_us(kernel: Kernel, device: Device, precision: Precision, reached: bool) -> float:
    """µs of the matrix products of one call, at the peak or at the rate that is reached."""
    if kernel.kind == "layer_norm":
        return 0.0
    if kernel.kind == "gemm":
        rate = getattr(device, precision.rate)
        share = precision.reached * kernel.k / (kernel.k + precision.half_k) if reached else 1.0
        return float(kernel.operations / rate / share / 1e6)
    half = kernel.operations / 2
    # q·k on codes; softmax codes times v in fp16, twice (even and odd codes), or all in bf16.
    on_codes = precision is not BF16
    first = half / (device.int8 if on_codes else device.half)
    second = half * (2 if on_codes else 1) / device.half
    # Of short rows a flash kernel reaches 35 % of the peak.
    return (first + second) / (0.35 if reached else 1.0) / 1e6


def memory_us(kernel: Kernel, device: Device, precision: Precision, reached: bool) -> float:
    """µs of the bytes of one call."""
    share = BANDWIDTH_REACHED if reached else 1.0
    return kernel.bytes_moved(precision.act, precision.weight) / device.bandwidth / share / 1e3


def expected_us(kernel: Kernel, device: Device, precision: Precision) -> float:
    """µs of one call at the rates that are reached."""
    math = math_us(kernel, device, precision, True)
    return max(math, memory_us(kernel, device, precision, True), LAUNCH_US)


def bf16_us(kernel: Kernel, device: Device) -> float:
    """µs of the same step in bf16, compiled: the norm adds the residual, GELU is its own pass."""
    if kernel.kind == "layer_norm":
        # Read stream and branch, write stream and normalised.
        moved = 4 * 2 * kernel.m * kernel.n
        return max(moved / device.bandwidth / BANDWIDTH_REACHED / 1e3, LAUNCH_US)
    plain = replace(kernel, residual=False)
    time = expected_us(plain, device, BF16)
    if "GELU" in kernel.name:
        moved = 2 * 2 * kernel.m * kernel.n
        time += max(moved / device.bandwidth / BANDWIDTH_REACHED / 1e3, LAUNCH_US)
    return time


def rows(model: str, batch: int, device_name: str) -> list[Row]:
    """Every kernel of a pass on a device; int4 tensor cores where the device has them."""
    device = DEVICES[device_name]
    precision = PACKED if device.int4 > device.int8 else CODES
    found = []
    for kernel in model_kernels(model, batch):
        math = math_us(kernel, device, precision, False)
        memory = memory_us(kernel, device, precision, False)
        found.append(
            Row(
                model,
                batch,
                device_name,
                kernel.name,
                kernel.calls,
                kernel.bytes_moved(precision.act, precision.weight),
                kernel.operations,
                max(math, memory),
                "math" if math > memory else "memory",
                expected_us(kernel, device, precision),
                bf16_us(kernel, device),
            )
        )
    return found


def total(found: Sequence[Row]) -> tuple[float, float, float]:
    """ms of a pass: floor, expected, expected in bf16."""
    sums = [sum(r.calls * v(r) for r in found) / 1e3 for v in (_floor, _expected, _bf16)]
    return sums[0], sums[1], sums[2]


def _floor(row: Row) -> float:
    return row.floor_us


def _expected(row: Row) -> float:
    return row.expected_us


def _bf16(row: Row) -> float:
    return row.bf16_us


def main() -> None:
    """Print a table of layers for one model and batch, or of whole passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", action="store_true", help="every layer, not whole passes")
    parser.add_argument("--model", choices=list(MODELS), help="one model; default: all")
    parser.add_argument("--batch", type=int, help=f"one batch size; default: {BATCHES}")
    parser.add_argument("--device", choices=list(DEVICES), help="one device; default: all")
    parser.add_argument("--json", action="store_true", help="JSON lines, a layer each")
    args = parser.parse_args()
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    cases = [
        (model, batch, device)
        for model in ([args.model] if args.model else MODELS)
        for batch in ([args.batch] if args.batch else BATCHES)
        for device in ([args.device] if args.device else DEVICES)
    ]
    if not args.json:
        columns = ("floor", "expected", "bf16", "bf16 / expected")
        what = "layer" if args.layers else "pass, ms"
        print(f"{what:<44}" + "".join(f"{c:>16}" for c in columns))
    for model, batch, device in cases:
        found = rows(model, batch, device)
        if args.json:
            for row in found:
                print(json.dumps(asdict(row)))
            continue
        name = f"{model} batch {batch} {device}"
        if args.layers:
            print(name)
            for r in found:
                times = f"{r.floor_us:>13.1f} µs{r.expected_us:>13.1f} µs{r.bf16_us:>13.1f} µs"
                label = f"  {r.calls:>2} × {r.kernel} ({r.bound})"
                size = f"{r.bytes / 1e6:9.2f} MB {r.operations / 1e9:8.2f} Gop"
                print(f"{label:<44}{times}{r.bf16_us / r.expected_us:>16.2f}  {size}")
        floor, expected, bf16 = total(found)
        label = "  pass" if args.layers else name
        print(f"{label:<44}{floor:>16.3f}{expected:>16.3f}{bf16:>16.3f}{bf16 / expected:>16.2f}")


if __name__ == "__main__":
    main()

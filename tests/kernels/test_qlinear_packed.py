"""Every backend's GEMM on packed weights against the reference, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erq_kernels import dispatch, explain, formats, ops, reference

# An op's arguments by name.
Call = dict[str, Any]


def build(
    m: int, n: int, k: int, bits: int, device: torch.device, outliers: int = 0, x_bits: int = 4
) -> Call:
    """Random operands; every scale different, zero points inside and outside the codes."""
    columns = torch.randperm(k)[:outliers].sort().values if outliers else None
    packed = formats.pack(torch.randint(0, 2**bits, (n, k)), bits)
    # code − zero point has to fit int8.
    low = max(-6, 2**bits - 128)
    zeros = torch.randint(low, min(2**bits + 6, 129), (2, n), dtype=torch.int32)
    offset = formats.code_offset(x_bits)
    shape = (m, formats.repacked_columns(k, outliers))
    unit = 2.0 ** (x_bits + bits) * max(k, 1) ** 0.5
    call = {
        "x": (torch.randint(0, 2**x_bits, shape) - offset).to(torch.int8),
        "packed": formats.order_packed(packed, bits, n, k, columns),
        "w_bits": bits,
        "k": k,
        "outliers": outliers,
        "w_zero_point": zeros[0],
        "w_zero_point2": zeros[1] if outliers else None,
        "scale": (torch.rand(n) + 0.5) * 8 / unit,
        "scale2": (torch.rand(n) + 0.5) / unit if outliers else None,
        "bias": torch.randn(n),
    }
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in call.items()}


def with_epilogue(call: Call) -> Call:
    """The call with a LayerScale, a residual and 4-bit codes by column."""
    (m, n), device = (call["x"].shape[0], call["bias"].shape[0]), call["x"].device
    return call | {
        "layer_scale": torch.randn(n, device=device),
        "residual": torch.randn(m, n, device=device),
        "out_inv_scale": torch.rand(n, device=device) + 0.2,
        "out_zero_point": torch.randint(-3, 19, (n,), dtype=torch.int32, device=device),
        "out_bits": 4,
    }


def run(call: Call) -> Tensor:
    return ops.qlinear_packed(**call)


def check(call: Call) -> Tensor:
    """Equal to the reference, twice."""
    got = run(call)
    assert torch.equal(got, reference.qlinear_packed(**call))
    assert torch.equal(run(call), got)
    return got


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("k", "outliers"), [(96, 0), (67, 0), (90, 7)])
def test_every_width(bits: int, k: int, outliers: int, device: torch.device, poison: None) -> None:
    call = build(5, 70, k, bits, device, outliers)
    check(call)
    codes = check(with_epilogue(call))
    assert codes.dtype == torch.int8 and codes.unique().numel() > 8


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("m", "n", "k", "outliers"),
    [
        (1, 1, 1, 0),
        (1, 33, 32, 0),
        (17, 8, 200, 0),
        (33, 65, 31, 0),
        (70, 130, 160, 1),
        (3, 40, 200, 199),
        (3, 40, 300, 90),  # a first segment of several steps
        (197, 48, 64, 33),
    ],
)
def test_odd_sizes(
    m: int, n: int, k: int, outliers: int, bits: int, device: torch.device, poison: None
) -> None:
    call = build(m, n, k, bits, device, outliers)
    check(call)
    check(with_epilogue(call))


@pytest.mark.parametrize("m", [1100, 1])
def test_every_tile(m: int, device: torch.device, poison: None) -> None:
    check(build(m, 66, 64, 4, device, 3))


@pytest.mark.parametrize("outliers", [0, 9])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_identity_gives_the_weight(bits: int, outliers: int, device: torch.device) -> None:
    n, k = 40, 70
    columns = torch.randperm(k)[:outliers].sort().values if outliers else None
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    low, high = max(0, 2**bits - 128), min(2**bits, 129)
    zeros = torch.randint(low, high, (2, n), dtype=torch.int32)
    wide = formats.repacked_columns(k, outliers)
    if outliers:  # `center` names the rest first and the outliers second
        weight = formats.center(codes, bits, zeros[1], zeros[0], columns)
    else:
        weight = formats.center(codes, bits, zeros[0])
    call = build(wide, n, k, bits, torch.device("cpu"), outliers) | {
        "x": torch.eye(wide, dtype=torch.int8),
        "packed": formats.order_packed(formats.pack(codes, bits), bits, n, k, columns),
        "w_zero_point": zeros[0],
        "w_zero_point2": zeros[1] if outliers else None,
        "scale": torch.ones(n),
        "scale2": torch.ones(n) if outliers else None,
        "bias": torch.zeros(n),
    }
    call = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in call.items()}
    assert torch.equal(run(call).cpu(), weight.t().float())


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("x", [-128, 127])
def test_extreme_codes(fill: int, x: int, device: torch.device) -> None:
    for bits in (3, 4, 8):
        call = build(3, 34, 1056, bits, device, x_bits=8)
        call["x"].fill_(x)
        call["packed"].fill_(fill)
        check(call)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 32), (5, 0, 32), (4, 5, 0)])
def test_empty(m: int, n: int, k: int, device: torch.device, poison: None) -> None:
    call = build(m, n, k, 4, device)
    assert torch.equal(run(call), call["bias"].expand(m, n))


def test_views_are_read_as_they_are(device: torch.device) -> None:
    call = with_epilogue(build(20, 34, 96, 4, device, 3))
    want = reference.qlinear_packed(**call)
    wide = torch.full((40, 300), 99, dtype=torch.int8, device=device)
    view = wide[::2, 3 : 3 + call["x"].shape[1]]
    view.copy_(call["x"])
    assert torch.equal(run(call | {"x": view}), want)
    size = call["packed"].numel()
    for offset in (1, 2, 4):  # a stream that begins between two words
        stream = torch.zeros(size + offset, dtype=torch.uint8, device=device)
        stream[offset:] = call["packed"].reshape(-1)
        shifted = stream[offset:].view(call["packed"].shape)
        assert torch.equal(run(call | {"packed": shifted}), want)
    turned = call["residual"].t().contiguous().t()
    assert torch.equal(run(call | {"residual": turned}), want)


def test_what_it_refuses(device: torch.device) -> None:
    call = build(2, 3, 32, 4, device)
    backend = dispatch.chosen()
    assert explain("qlinear_packed", **call)[backend] == "usable"
    reasons = explain("qlinear_packed", **call | {"bias": call["bias"].double()})
    assert reasons[backend] == "bias must be float32, got torch.float64"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("m", "n", "k", "outliers"), [(50432, 1152, 384, 5), (1576, 384, 1536, 0), (1, 1000, 1024, 0)]
)
def test_real_shapes(
    m: int, n: int, k: int, outliers: int, bits: int, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("hours in the interpreter")
    check(with_epilogue(build(m, n, k, bits, device, outliers)))

"""The real source of the weight-only CUDA kernel, emulated on the host, against the reference."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulation import Emulation
from torch import Tensor

from erq_kernels import _cuda, explain, ops, reference
from erq_kernels.formats import pack

Call = dict[str, Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def build(
    m: int, n: int, k: int, bits: int, dtype: torch.dtype = torch.float32, outliers: int = 0
) -> Call:
    """Random operands whose code − zero_point fits int8, all scales different."""
    zero_point = torch.randint(0, 2**bits, (n,), dtype=torch.int32)
    if bits == 8:
        zero_point.fill_(128)
    return {
        "x": torch.randn(m, k).to(dtype),
        "packed": pack(torch.randint(0, 2**bits, (n, k)), bits),
        "bits": bits,
        "scale": torch.rand(n) + 0.1,
        "zero_point": zero_point,
        "scale2": torch.rand(n) * 8 + 1 if outliers else None,
        "zero_point2": zero_point.flip(0).contiguous() if outliers else None,
        "columns": torch.randperm(k)[:outliers].sort().values if outliers else None,
        "bias": torch.randn(n),
    }


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and sums of parts begin as NaN, not as what a call before left there."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def weight(call: Call) -> Tensor:
    return reference.dequantize_weight(
        call["packed"], call["bits"], (len(call["scale"]), call["x"].shape[1]), call["scale"],
        call["zero_point"], call["scale2"], call["zero_point2"], call["columns"],
    ).double()  # fmt: skip


def run(call: Call, splits: int = 0) -> Tensor:
    return _cuda.dequant_linear(**call, splits=splits)


def check(call: Call, splits: int | None = None) -> None:
    """Within what summing K fp32 products in any order and one cast of the result leave."""
    if splits is None:
        got = ops.dequant_linear(**call, backend="cuda")
    else:
        got = run(call, splits)
    assert got.dtype == call["x"].dtype
    x, w = call["x"].double(), weight(call)
    bias = torch.zeros(len(w)) if call["bias"] is None else call["bias"]
    exact = x @ w.t() + bias.double()
    rounding = torch.finfo(got.dtype).eps / 2
    terms = x.abs() @ w.abs().t() + bias.abs().double()
    bound = rounding * exact.abs() + 4 * torch.finfo(torch.float32).eps * terms
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_width(bits: int, dtype: torch.dtype, emulation: Emulation) -> None:
    for m, n, k, outliers in ((1, 33, 128, 0), (9, 20, 96, 5), (64, 48, 640, 40), (3, 16, 32, 1)):
        check(build(m, n, k, bits, dtype, outliers))


@pytest.mark.parametrize("m", [1, 7, 8, 9, 17, 63, 64])
def test_rows(m: int, emulation: Emulation) -> None:
    check(build(m, 24, 256, 3, torch.float16))


@pytest.mark.parametrize("k", [32, 64, 96, 160, 2048, 2176])  # units beyond the end, many units
@pytest.mark.parametrize("outliers", [0, 3])
def test_columns(k: int, outliers: int, emulation: Emulation) -> None:
    check(build(2, 17, k, 5, torch.bfloat16, outliers))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", FLOATS)
def test_identity_gives_the_weight(bits: int, dtype: torch.dtype, emulation: Emulation) -> None:
    call = build(64, 18, 64, bits, dtype, 7) | {"x": torch.eye(64, dtype=dtype), "bias": None}
    got = ops.dequant_linear(**call, backend="cuda")
    assert torch.equal(got, weight(call).float().t().to(dtype))


def test_values_that_16_bits_do_not_hold(emulation: Emulation) -> None:
    """fp32 x is not rounded: products of its last bits arrive."""
    call = build(1, 16, 32, 4) | {"bias": None}
    call["x"] = torch.zeros(1, 32)
    call["x"][0, 5] = 1 + 2**-23
    assert torch.equal(
        ops.dequant_linear(**call, backend="cuda")[0],
        (1 + 2**-23) * ((weight(call)[:, 5] / call["scale"]).round().float()) * call["scale"],
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_every_width_at_several_splits(bits: int, splits: int, emulation: Emulation) -> None:
    """Lanes that read 32 codes and 128, parts of K that are shorter than others, and empty ones."""
    dtype = FLOATS[(bits + splits) % 3]
    for m, n, k, outliers in ((1, 33, 1568, 9), (2, 16, 2048 * splits, 0), (9, 20, 96, 5)):
        check(build(m, n, k, bits, dtype, outliers), splits)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 17, 63, 64])
def test_rows_at_several_splits(m: int, emulation: Emulation) -> None:
    for splits in (2, 4):
        check(build(m, 24, 1120, 3, torch.float16, 3), splits)


def test_splits_are_chosen_by_size(emulation: Emulation) -> None:
    """The emulated device has 4 multiprocessors; a part has 512 columns, so no warp is idle."""
    handle = emulation.handle
    for (m, n, k), splits in {
        (1, 16, 4096): 4, (1, 32, 4096): 2, (1, 33, 4096): 2, (1, 49, 4096): 1,
        (8, 16, 512): 1, (8, 16, 544): 2, (64, 16, 1536): 3, (9, 64, 4096): 1,
        (1, 16, 0): 1, (0, 16, 4096): 1, (1, 0, 4096): 1, (64, 2**20, 4096): 1,
    }.items():  # fmt: skip
        assert handle.erq_cuda_dequant_linear_splits(m, n, k, 0) == splits, (m, n, k)
    assert handle.erq_cuda_dequant_linear_splits(-1, 16, 64, 0) == 0
    call = build(3, 16, 2048, 4)
    assert torch.equal(ops.dequant_linear(**call, backend="cuda"), run(call, 4))
    assert not torch.equal(run(call, 4), run(call, 1))  # another order of the same sum


def test_the_last_block_to_arrive_may_be_any(emulation: Emulation) -> None:
    for call in (
        build(9, 33, 1600, 6, torch.bfloat16, 11),
        build(3, 50, 4096, 4, torch.float32),
    ):
        want = run(call, 4)
        for order in range(1, 9):
            emulation.shuffle_blocks(order)
            emulation.reverse(order % 2 == 1)
            assert torch.equal(run(call, 4), want)
        emulation.shuffle_blocks(0)


@pytest.mark.parametrize("fault", ["counter", "fence", "arrival barrier", "partial"])
def test_a_fault_of_the_split_shows(fault: str, emulation: Emulation) -> None:
    """In some order of blocks; without it, in none."""
    call = build(1, 40, 2048, 4)
    want = run(call, 4)

    def is_right(order: int) -> bool:
        emulation.shuffle_blocks(order)
        return torch.equal(run(call, 4), want)

    assert all(map(is_right, range(6)))
    emulation.put_fault(fault)
    assert not all(map(is_right, range(6)))


def test_a_split_needs_its_workspace(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    call = build(2, 20, 64, 4)
    with pytest.raises(_cuda.CudaError, match="splits must be from 1 to 1024"):
        run(call, 1025)
    with pytest.raises(_cuda.CudaError, match="more tiles than ERQ_CUDA_COUNTERS"):
        run(build(1, 16 * _cuda.COUNTERS + 1, 32, 2), 2)
    real = _cuda.DequantLinearArgs
    for name in ("partial", "arrived"):
        monkeypatch.setattr(
            _cuda, "DequantLinearArgs", lambda _name=name, **fields: real(**fields | {_name: None})
        )
        with pytest.raises(_cuda.CudaError, match="a split K needs partial"):
            run(call, 2)


def test_counters_are_of_a_stream_or_of_a_launch_in_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launches that may run at once never count on the same numbers."""
    stream = SimpleNamespace(cuda_stream=1)
    capturing = False
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    library = _cuda.Library(ctypes.CDLL(None), emulated=False)
    device = torch.device("cpu")
    first = _cuda._counters(library, device)
    assert _cuda._counters(library, device) is first
    stream.cuda_stream = 2
    assert _cuda._counters(library, device) is not first
    capturing = True
    graph = [_cuda._counters(library, device) for _ in range(2)]
    assert graph[0] is not graph[1]
    assert all(not c.any() and c.numel() == _cuda.COUNTERS for c in graph)


def test_views_and_empties(emulation: Emulation) -> None:
    call = build(6, 24, 96, 4)
    want = ops.dequant_linear(**call, backend="cuda")
    wide = torch.randn(6, 99)
    wide[:, 3:] = call["x"]
    assert torch.equal(ops.dequant_linear(**(call | {"x": wide[:, 3:]}), backend="cuda"), want)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), call["packed"]])[1:]
    assert torch.equal(ops.dequant_linear(**(call | {"packed": shifted}), backend="cuda"), want)
    for m, n in ((0, 5), (5, 0)):
        assert ops.dequant_linear(**build(m, n, 32, 3), backend="cuda").shape == (m, n)


def test_no_bank_conflicts(emulation: Emulation) -> None:
    for m in (1, 64):
        check(build(m, 48, 640, 4, torch.float16, 40))
        check(build(m, 48, 640, 3, torch.float16, 40), 2)
    wavefronts, conflicts = emulation.statistics()
    assert wavefronts["loads"] and wavefronts["stores"]
    assert not any(conflicts.values()), conflicts


def test_warps_in_any_order(emulation: Emulation) -> None:
    call = build(9, 33, 640, 6, torch.bfloat16, 11)
    want = ops.dequant_linear(**call, backend="cuda")
    emulation.reverse(True)
    assert torch.equal(ops.dequant_linear(**call, backend="cuda"), want)


def test_what_it_refuses(emulation: Emulation) -> None:
    call = build(2, 4, 64, 4)
    assert explain("dequant_linear", **call)["cuda"] == "usable"
    for change, reason in (
        ({"x": torch.zeros(2, 64).double()}, "x must be float16"),
        ({"x": torch.zeros(65, 64)}, "made for at most 64 rows of x, got 65"),
        ({"x": torch.zeros(2, 40)}, "K must be a multiple of 32, got 40"),
    ):
        assert explain("dequant_linear", **(call | change))["cuda"].startswith(reason)

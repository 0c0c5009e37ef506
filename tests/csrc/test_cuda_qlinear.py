"""The real source of the CUDA GEMM, emulated on the host, against the reference: bit by bit.

Every instruction is emulated by the tables of its manual (csrc/cuda/emulate.h), so a wrong
fragment, a missing barrier or a wait too few shows; tests here put each in to see that it does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import Emulation
from torch import Tensor

from erq_kernels import _cuda, explain, formats, ops, reference

Call = dict[str, Any]

TILES = range(4)


def build(
    m: int, n: int, k: int, first: int, w_bits: int = 8, a_bits: int = 8, spread: bool = False
) -> Call:
    """Random operands on all scales; int8 ones, or packed where both widths are at most 4.

    `spread`: rows of weights lie anywhere around 0, so that 4-bit ones need offsets.
    """
    low = -formats.code_offset(a_bits)
    x = torch.randint(low, low + 2**a_bits, (m, k), dtype=torch.int8)
    zero = torch.randint(0, 2**w_bits, (n, 1)) if spread else 2 ** (w_bits - 1)
    weight = (torch.randint(0, 2**w_bits, (n, k)) - zero).clamp(-128, 127).to(torch.int8)
    unit = 2.0 ** (2 - w_bits - a_bits)  # results of a few units
    call: Call = {
        "x": x,
        "weight": weight,
        "scale": (torch.rand(n) + 0.1) * unit,
        "scale2": (torch.rand(n) + 0.1) * unit / 4 if first else None,
        "split": first or k,
        "bias": torch.randn(n),
    }
    return pack(call) if max(w_bits, a_bits) <= 4 else call


def pack(call: Call) -> Call:
    packed = formats.pack_weight(call["weight"], call["split"])
    assert packed is not None
    x = formats.pack_nibbles(call["x"])
    return call | {"x": x, "weight": packed[0], "weight_offset": packed[1]}


def with_epilogue(call: Call, residual: torch.dtype = torch.float32) -> Call:
    m, n = call["x"].shape[0], call["weight"].shape[0]
    return call | {
        "layer_scale": torch.randn(n),
        "residual": torch.randn(m, n).to(residual),
    }


def with_codes(call: Call, bits: int, per_column: bool) -> Call:
    shape = (call["weight"].shape[0],) if per_column else ()
    return call | {
        "out_inv_scale": (torch.rand(shape) + 1) * 2**bits / 16,
        "out_zero_point": 2 ** (bits - 1) + torch.randint(-2, 3, shape, dtype=torch.int32),
        "out_bits": bits,
    }


def run(call: Call) -> Tensor:
    return ops.qlinear(**call, backend="cuda")


def expected(call: Call) -> Tensor:
    return reference.qlinear(**call)


def tiles(call: Call) -> range:
    return TILES if call["scale2"] is None else TILES[1:]  # two segments have no room in the first


@pytest.mark.parametrize("w_bits", [2, 3, 4])
@pytest.mark.parametrize("a_bits", [2, 3, 4])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("first", [0, 32])
def test_every_narrow_width(
    w_bits: int, a_bits: int, spread: bool, first: int, emulation: Emulation
) -> None:
    call = build(19, 70, 224, first, w_bits, a_bits, spread)
    assert call["x"].dtype == torch.uint8
    assert (call["weight_offset"] is not None) == (spread and w_bits == 4)
    assert torch.equal(run(call), expected(call))


@pytest.mark.parametrize("w_bits", range(2, 9))
@pytest.mark.parametrize("a_bits", range(5, 9))
def test_every_wide_width(w_bits: int, a_bits: int, emulation: Emulation) -> None:
    for first in (0, 32):
        call = build(19, 70, 224, first, w_bits, a_bits, spread=w_bits < 8)
        assert call["x"].dtype == torch.int8
        assert torch.equal(run(call), expected(call))


@pytest.mark.parametrize(
    ("m", "n", "k", "first"),
    [
        (1, 1, 32, 0),  # one step, half of it beyond the end
        (1, 33, 64, 32),
        (17, 8, 416, 0),  # K over the edge of a pipeline tile
        (197, 65, 160, 0),
        (70, 130, 160, 32),
        (33, 40, 224, 96),  # a long first segment
        (3, 40, 1056, 1024),  # a short second one
        (129, 129, 96, 0),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_sizes_in_every_tile(
    m: int, n: int, k: int, first: int, bits: int, emulation: Emulation
) -> None:
    call = build(m, n, k, first, bits, bits, spread=bits < 8)
    want = expected(call)
    for tile in tiles(call):
        assert torch.equal(_cuda.qlinear(**call, tile=tile), want)
    call = with_codes(with_epilogue(call), 4, True)
    assert torch.equal(run(call), expected(call))
    emulation.reverse(True)
    assert torch.equal(run(call), expected(call))


@pytest.mark.parametrize("out_bits", range(2, 9))
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_codes_equal_the_reference(
    out_bits: int, per_column: bool, width: int, emulation: Emulation
) -> None:
    call = with_codes(with_epilogue(build(9, 70, 96, 32, width, width)), out_bits, per_column)
    got = run(call)
    assert got.dtype == torch.int8
    assert torch.equal(got, expected(call))
    assert got.unique().numel() > 2 ** min(out_bits - 1, 5)
    if out_bits <= 4:
        packed = run(call | {"out_packed": True})
        assert packed.dtype == torch.uint8
        assert torch.equal(formats.unpack_nibbles(packed), got)
        # Its own input again: codes of one layer feed the next.
        columns = call | {"x": packed[:, :32], "weight": call["weight"][:, :32], "split": 64}
        if width == 4:
            columns |= {"scale2": None, "weight_offset": None}
            assert torch.equal(run(columns), expected(columns))


@pytest.mark.parametrize("residual", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [70, 72])  # columns one by one, and four at a time
def test_float_results_equal_the_reference(
    residual: torch.dtype, out: torch.dtype, n: int, emulation: Emulation
) -> None:
    call = with_epilogue(build(19, n, 96, 32, 4, 4, spread=True), residual) | {"out_dtype": out}
    got = run(call)
    assert got.dtype == out
    assert torch.equal(got, expected(call))


def test_halves_at_the_edges_of_their_range(emulation: Emulation) -> None:
    bias = torch.tensor([0.0, -0.0, 1e-8, 3e-8, 6e-5, 6.1e-5, 65503.0, 65519.9, 65520.0, 1e6, -1e9])
    call = build(1, len(bias), 32, 0) | {"bias": bias}
    call["weight"].zero_()
    for dtype in (torch.float16, torch.bfloat16):
        cast = call | {"out_dtype": dtype, "residual": bias.to(dtype)[None]}
        assert torch.equal(run(cast), expected(cast))


def exact_gelu(y: Tensor, act: str) -> Tensor:
    return torch.nn.functional.gelu(
        y.double(), approximate="tanh" if act == "gelu_tanh" else "none"
    )


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_activation_is_as_close_as_torch(act: str, emulation: Emulation) -> None:
    n = 256
    call = build(4, n, 32, 0) | {
        "bias": torch.linspace(-12, 12, n),
        "scale": torch.full((n,), 1e-6),
    }
    exact = exact_gelu(expected(call), act)
    call |= {"act": act}
    error = (run(call).double() - exact).abs().max()
    assert 0 < error <= 2 * (expected(call).double() - exact).abs().max()


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [4, 8])
def test_codes_after_an_activation(act: str, width: int, emulation: Emulation) -> None:
    call = with_codes(with_epilogue(build(9, 70, 96, 32, width, width)), 4, True) | {"act": act}
    assert torch.equal(run(call), expected(call))


@pytest.mark.parametrize(("x", "w"), [(-128, -128), (127, -128), (127, 127), (0, 5)])
def test_extreme_bytes(x: int, w: int, emulation: Emulation) -> None:
    call = build(3, 34, 1056, 0)
    call["x"].fill_(x)
    call["weight"].fill_(w)
    assert torch.equal(run(call), expected(call))


@pytest.mark.parametrize("w", [-15, -8, 7, 15])
def test_extreme_nibbles(w: int, emulation: Emulation) -> None:
    call = build(3, 34, 1056, 32, 8, 8)
    call["x"].fill_(15)
    call["weight"].fill_(w)
    call = pack(call)
    assert torch.equal(run(call), expected(call))


def test_identity_gives_the_weight(emulation: Emulation) -> None:
    k = 96
    call = build(k, 40, k, 0, 8, 8) | {"x": torch.eye(k, dtype=torch.int8)}
    want = call["weight"].float().t() * call["scale"] + call["bias"]
    assert torch.equal(run(call), want)
    call["weight"] %= 16
    want = call["weight"].float().t() * call["scale"] + call["bias"]
    assert torch.equal(run(pack(call)), want)


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_empty(m: int, n: int, emulation: Emulation) -> None:
    assert run(build(m, n, 32, 0)).shape == (m, n)


def test_views(emulation: Emulation) -> None:
    call = with_epilogue(build(20, 34, 96, 32))
    wide = torch.full((40, 128), 99, dtype=torch.int8)
    for rows, columns in ((slice(0, 20), slice(16, 112)), (slice(0, 40, 2), slice(3, 99))):
        view = wide.clone()[rows, columns]
        view.copy_(call["x"])
        assert torch.equal(run(call | {"x": view}), expected(call))
    for name in ("x", "weight", "residual"):
        assert torch.equal(run(call | {name: call[name].t().contiguous().t()}), expected(call))
    one_row = call["residual"][:1].expand(20, 34)
    assert torch.equal(run(call | {"residual": one_row}), expected(call | {"residual": one_row}))


@pytest.mark.parametrize("fault", ["fragment", "barrier", "pipeline"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fault_shows(fault: str, bits: int, emulation: Emulation) -> None:
    """In the numbers, at the worst order of warps, and, where it is a race, as an error."""
    call = build(64, 64, 512, 0, bits, bits)
    want = expected(call)
    assert torch.equal(run(call), want)
    emulation.put_fault(fault)
    if fault == "fragment":
        assert not torch.equal(run(call), want)
        return
    with pytest.raises(_cuda.CudaError, match=r"byte \d+ is (read|written) .*"):
        run(call)
    results = [run_anyway(call), (emulation.reverse(True), run_anyway(call))[1]]
    assert not all(torch.equal(result, want) for result in results)


def run_anyway(call: Call) -> Tensor:
    """What the kernel wrote although the emulation found it wrong."""
    kept: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty

        def keep(*args: Any, **kwargs: Any) -> Tensor:
            kept.append(empty(*args, **kwargs))
            return kept[-1]

        patch.setattr(torch, "empty", keep)
        with pytest.raises(_cuda.CudaError):
            _cuda.qlinear(**call)
    return kept[0]


def test_no_bank_conflicts(emulation: Emulation) -> None:
    for bits in (4, 8):
        for first in (0, 32):
            call = with_codes(build(128, 128, 416, first, bits, bits, spread=bits < 8), 4, True)
            for tile in tiles(call):
                _cuda.qlinear(**call, tile=tile)
    wavefronts, conflicts = emulation.statistics()
    assert all(wavefronts.values())
    assert not any(conflicts.values()), conflicts
    emulation.put_fault("swizzle")  # rows as they come: right, and slow
    call = build(64, 64, 256, 0, 4, 4)
    assert torch.equal(run(call), expected(call))
    conflicts = emulation.statistics()[1]
    assert conflicts["ldmatrix"] > 0


def test_what_it_refuses(emulation: Emulation) -> None:
    call = build(2, 4, 64, 32)
    assert explain("qlinear", **call)["cuda"] == "usable"
    packed = build(2, 4, 64, 32, 4, 4)
    assert explain("qlinear", **packed)["cuda"] == "usable"
    for change, reason in (
        ({"residual": torch.zeros(2, 4).double()}, "residual must be float16"),
        ({"split": 40}, "K and split must be multiples of 16, got 64 and 40"),
        ({"out_dtype": torch.float64}, "out_dtype must be float16"),
    ):
        assert explain("qlinear", **(call | change))["cuda"].startswith(reason)
    odd = with_codes(build(2, 3, 32, 0), 4, False) | {"out_packed": True}
    assert explain("qlinear", **odd)["cuda"] == "packed codes need an even N, got 3"


def test_opcheck(emulation: Emulation) -> None:
    for call in (
        with_epilogue(build(3, 34, 64, 0)) | {"out_dtype": torch.float16, "act": "gelu"},
        with_codes(build(3, 34, 64, 32, 4, 4, spread=True), 4, True) | {"out_packed": True},
    ):
        torch.library.opcheck(torch.ops.erq.qlinear.default, (), call | {"backend": "cuda"})

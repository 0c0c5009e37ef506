"""The op contract: registration with torch, argument checks, layout of the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erq_kernels import dispatch, explain, formats, ops, reference

B, H, T, D = 2, 2, 5, 4
M, K, N = 6, 12, 7


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def vector(n: int) -> Tensor:
    return torch.rand(n) + 0.5


def integer(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def integers(n: int) -> Tensor:
    return torch.randint(0, 16, (n,), dtype=torch.int32)


def strided(x: Tensor) -> Tensor:
    """`x` with its last two dimensions swapped in memory, and gaps between its rows."""
    wide = torch.cat([x, x], dim=-1).transpose(-1, -2).contiguous().transpose(-1, -2)
    out = wide[..., : x.shape[-1]]
    assert torch.equal(out, x) and (x.numel() < 2 or not out.is_contiguous())
    return out


def quantize_args() -> dict[str, Any]:
    return {
        "x": torch.randn(3, M, K) * 4,
        "inv_scale": torch.tensor(1.5),
        "zero_point": integer(7),
        "bits": 4,
    }


def layer_norm_args() -> dict[str, Any]:
    order, _, _ = formats.k_order(torch.tensor([1, 5]), K)
    return {
        "x": torch.randn(M, K),
        "weight": vector(K),
        "bias": torch.randn(K),
        "eps": 1e-6,
        "inv_scale": vector(K),
        "zero_point": integers(K),
        "bits": 4,
        "order": order,
    }


def qlinear_args() -> dict[str, Any]:
    return {
        "x": codes(M, K),
        "weight": codes(N, K),
        "scale": vector(N) * 1e-2,
        "scale2": vector(N) * 1e-2,
        "split": 5,
        "bias": torch.randn(N),
        "act": "gelu",
        "layer_scale": vector(N),
        "residual": torch.randn(M, N),
        "out_dtype": torch.float32,
        "out_inv_scale": None,
        "out_zero_point": None,
        "out_bits": 0,
    }


# Columns of the GEMM layout of K channels with and without outliers.
WIDE, WIDEST = 32, 64


def qlinear_packed_args() -> dict[str, Any]:
    columns = torch.tensor([3, 9])
    packed = formats.pack(torch.randint(0, 8, (N, K)), 3)
    return {
        "x": codes(M, WIDEST),
        "packed": formats.order_packed(packed, 3, N, K, columns),
        "w_bits": 3,
        "k": K,
        "outliers": 2,
        "w_zero_point": integers(N),
        "w_zero_point2": integers(N),
        "scale": vector(N) * 1e-2,
        "scale2": vector(N) * 1e-2,
        "bias": torch.randn(N),
        "act": "gelu",
        "layer_scale": vector(N),
        "residual": torch.randn(M, N),
        "out_dtype": torch.float32,
        "out_inv_scale": None,
        "out_zero_point": None,
        "out_bits": 0,
    }


ONE_SEGMENT = {
    "x": codes(M, WIDE),
    "packed": torch.randint(0, 256, (N, 12), dtype=torch.uint8),
    "outliers": 0,
    "scale2": None,
    "w_zero_point2": None,
}


def qattention_args() -> dict[str, Any]:
    return {
        "q": torch.randint(0, 16, (B, H, T, D), dtype=torch.int8),
        "k": torch.randint(0, 16, (B, H, T, D), dtype=torch.int8),
        "v": torch.randint(0, 16, (B, H, T, D), dtype=torch.int8),
        "q_zero_point": integer(7),
        "k_zero_point": integer(8),
        "v_zero_point": integer(9),
        "score_scale": torch.tensor(0.02),
        "p_inv_scale": torch.tensor(1.1),
        "value_scale": torch.tensor(0.1),
        "qk_bits": 4,
        "av_bits": 4,
        "zero_last": True,
        "bias": torch.randn(1, H, T, T),
        "out_inv_scale": None,
        "out_zero_point": None,
        "out_bits": 0,
    }


def dequant_linear_args() -> dict[str, Any]:
    return {
        "x": torch.randn(M, K),
        "packed": formats.pack(torch.randint(0, 8, (N, K)), 3),
        "bits": 3,
        "scale": vector(N),
        "zero_point": integers(N),
        "scale2": vector(N),
        "zero_point2": integers(N),
        "columns": torch.tensor([0, 3, 11]),
        "bias": torch.randn(N),
    }


def pack_args() -> dict[str, Any]:
    return {"codes": torch.randint(0, 32, (3, 7)), "bits": 5}


def unpack_args() -> dict[str, Any]:
    return {"packed": formats.pack(torch.randint(0, 32, (3, 7)), 5), "bits": 5, "shape": (3, 7)}


def repack_args() -> dict[str, Any]:
    return {
        "packed": formats.pack(torch.randint(0, 8, (N, K)), 3),
        "bits": 3,
        "k": K,
        "zero_point": integers(N),
        "zero_point2": integers(N),
        "columns": torch.tensor([0, 3, 11]),
    }


MAKE: dict[str, Callable[[], dict[str, Any]]] = {
    "quantize": quantize_args,
    "layer_norm_quantize": layer_norm_args,
    "qlinear": qlinear_args,
    "qlinear_packed": qlinear_packed_args,
    "qattention": qattention_args,
    "dequant_linear": dequant_linear_args,
    "pack": pack_args,
    "unpack": unpack_args,
    "repack": repack_args,
}
DEFINITION: dict[str, Callable[..., Tensor]] = {
    name: getattr(reference, name, None) or getattr(formats, name) for name in MAKE
}
CODES_OUT = {
    "out_inv_scale": torch.tensor(2.0),
    "out_zero_point": integer(8),
    "out_bits": 4,
}
# Changes to the arguments above that are allowed, one case each.
GOOD: dict[str, dict[str, dict[str, Any]]] = {
    "quantize": {
        "per channel": {"inv_scale": torch.ones(K), "zero_point": torch.zeros(K).int()},
        "a number": {"x": torch.tensor(0.3)},
        "half": {"x": torch.randn(M, K).half(), "bits": 8},
        "no rows": {"x": torch.empty(0, K)},
        "strided": {"x": strided(torch.randn(M, K))},
        "heads": {"x": torch.randn(B, T, 3, H, D).permute(2, 0, 3, 1, 4)[1]},
    },
    "layer_norm_quantize": {
        "natural order": {"order": None},
        "bfloat16": {"x": torch.randn(M, K).bfloat16()},
        "per tensor": {"inv_scale": torch.tensor(2.0), "zero_point": integer(8)},
        "no rows": {"x": torch.empty(0, K)},
        "strided": {"x": strided(torch.randn(M, K))},
    },
    "qlinear": {
        "one segment": {"scale2": None, "split": K},
        "plain": {"act": "none", "layer_scale": None, "residual": None},
        "tanh": {"act": "gelu_tanh", "out_dtype": torch.bfloat16},
        "half residual": {"residual": torch.randn(M, N).half(), "out_dtype": torch.float16},
        "codes": CODES_OUT,
        "codes per column": {
            "out_inv_scale": torch.ones(N),
            "out_zero_point": torch.zeros(N).int(),
            "out_bits": 8,
        },
        "no rows": {"x": codes(0, K), "residual": torch.empty(0, N)},
        "strided": {"x": strided(codes(M, K)), "residual": strided(torch.randn(M, N))},
    },
    "qlinear_packed": {
        "one segment": ONE_SEGMENT,
        "eight bits": {
            **ONE_SEGMENT,
            "w_bits": 8,
            "packed": torch.randint(0, 256, (N, WIDE), dtype=torch.uint8),
            "w_zero_point": torch.full((N,), 128, dtype=torch.int32),
        },
        "codes": CODES_OUT,
        "no rows": {"x": codes(0, WIDEST), "residual": torch.empty(0, N)},
        "strided": {"x": strided(codes(M, WIDEST)), "residual": strided(torch.randn(M, N))},
    },
    "qattention": {
        "no bias": {"bias": None},
        "float probabilities": {"p_inv_scale": None},
        "full bias": {"bias": torch.randn(B, H, T, T).half()},
        "bias per pair": {"bias": torch.randn(T, T)},
        "bias of one in two": {"bias": torch.randn(1, H, 1, T)},
        "wide": {"qk_bits": 8, "av_bits": 6, "q": codes(B, H, T, D), "zero_last": False},
        "codes": CODES_OUT,
        "no images": {n: torch.empty(0, H, T, D, dtype=torch.int8) for n in "qkv"},
        "strided": {n: strided(torch.ones(B, H, T, D, dtype=torch.int8)) for n in "qkv"},
    },
    "dequant_linear": {
        "one scale": {"scale2": None, "zero_point2": None, "columns": None, "bias": None},
        "half": {"x": torch.randn(M, K).half()},
        "no rows": {"x": torch.empty(0, K)},
        "strided": {"x": strided(torch.randn(M, K))},
    },
    "pack": {
        "uint8": {"codes": torch.randint(0, 2, (9,), dtype=torch.uint8), "bits": 1},
        "nothing": {"codes": torch.empty(0, 3, dtype=torch.int32), "bits": 8},
        "strided": {"codes": strided(torch.randint(0, 32, (4, 4)))},
    },
    "unpack": {
        "nothing": {"packed": torch.empty(0, dtype=torch.uint8), "shape": (0, 3)},
        "a number": {"packed": torch.ones(1, dtype=torch.uint8), "shape": ()},
    },
    "repack": {
        "one segment": {"zero_point2": None, "columns": None},
        "no rows": {
            "packed": torch.empty(0, dtype=torch.uint8),
            "zero_point": integers(0),
            "zero_point2": integers(0),
        },
    },
}
CASES = [(op, name) for op in MAKE for name in ("as made", *GOOD[op])]


def arguments(op: str, case: str) -> dict[str, Any]:
    return MAKE[op]() | GOOD[op].get(case, {})


@pytest.fixture
def args(op: str, case: str) -> dict[str, Any]:
    return arguments(op, case)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_op_computes_its_definition(op: str, args: dict[str, Any]) -> None:
    got = getattr(ops, op)(**args, backend="reference")
    expected = DEFINITION[op](**args)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert got.is_contiguous()
    through_torch = getattr(torch.ops.erq, op)(**args, backend="reference")
    assert torch.equal(through_torch, expected)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_torch_can_trace_the_op(op: str, args: dict[str, Any]) -> None:
    """Schema, shape function and strides under fake tensors and compilation with any sizes."""
    names = [a.name for a in getattr(torch.ops.erq, op).default._schema.arguments]
    values = [args[n] for n in names if n in args]
    torch.library.opcheck(getattr(torch.ops.erq, op), tuple(values), {"backend": "reference"})


def test_every_op_of_the_contract_is_registered() -> None:
    for op in MAKE:
        schema = getattr(torch.ops.erq, op).default._schema
        assert not any(a.alias_info for a in schema.arguments), f"{op} writes into an argument"
        assert schema.arguments[-1].name == "backend"
        assert schema.arguments[-1].default_value == "auto"


F16, F64, I8, I64 = torch.float16, torch.float64, torch.int8, torch.int64
# op → changes to good arguments that are refused, with the text that says so.
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "quantize": [
        ({"bits": 1}, "bits must be from 2 to 8, got 1"),
        ({"bits": 9}, "bits must be from 2 to 8, got 9"),
        ({"x": torch.ones(3, K, dtype=I64)}, r"quantize takes a float tensor, got torch\.int64"),
        ({"inv_scale": torch.tensor(1.0, dtype=F16)}, r"float32 .* got torch\.float16"),
        ({"zero_point": torch.tensor(1)}, r"zero_point int32, got .* torch\.int64"),
        ({"inv_scale": torch.ones(K)}, r"both be \[\] or \[12\], got \[12\] and \[\]"),
        (
            {"inv_scale": torch.ones(K - 1), "zero_point": torch.zeros(K - 1).int()},
            r"both be \[\] or \[12\], got \[11\] and \[11\]",
        ),
        (
            {"inv_scale": torch.ones(1, K), "zero_point": torch.zeros(1, K).int()},
            r"both be \[\] or \[12\], got \[1, 12\]",
        ),
    ],
    "layer_norm_quantize": [
        ({"bits": 0}, "bits must be from 2 to 8"),
        ({"x": torch.randn(2, M, K)}, r"takes a float \[M, K\], got torch\.float32 \[2, 6, 12\]"),
        ({"x": codes(M, K)}, r"takes a float \[M, K\], got torch\.int8"),
        ({"weight": torch.ones(K + 1)}, r"weight must be torch\.float32 \[12\], got .* \[13\]"),
        ({"weight": torch.ones(K, dtype=F16)}, r"weight must be torch\.float32 .*torch\.float16"),
        ({"bias": torch.ones(1, K)}, r"bias must be torch\.float32 \[12\], got .* \[1, 12\]"),
        ({"eps": 0.0}, r"eps must be finite and > 0, got 0\.0"),
        ({"eps": float("nan")}, "eps must be finite and > 0, got nan"),
        ({"order": torch.arange(K).int()}, r"order must be torch\.int64 \[12\], got torch\.int32"),
        ({"order": torch.zeros(2, 6, dtype=I64)}, r"order must be torch\.int64 \[12\], .*\[2, 6\]"),
        ({"zero_point": torch.zeros(K)}, "zero_point int32"),
        ({"inv_scale": torch.ones(1)}, r"both be \[\] or \[12\]"),
    ],
    "qlinear": [
        ({"x": torch.randn(M, K)}, r"x must hold int8 codes, got torch\.float32"),
        ({"x": codes(M, K).to(torch.uint8)}, "packed x goes with packed weight, uint8"),
        ({"out_packed": True}, "out_packed takes codes: give a quantizer of the result"),
        (
            {"weight_offset": torch.zeros(1, N, dtype=torch.int32)},
            "weight_offset goes with packed operands",
        ),
        ({"x": codes(2, M, K)}, r"x must have 2 dimensions, got \[2, 6, 12\]"),
        ({"weight": torch.randn(N, K)}, r"weight must hold int8 codes"),
        ({"weight": codes(N)}, r"weight must have 2 dimensions"),
        ({"weight": codes(N, K + 1)}, "x has 12 columns, weight 13"),
        ({"scale": torch.ones(N - 1)}, r"scale must be torch\.float32 \[7\], got .* \[6\]"),
        ({"scale": torch.ones(N, dtype=F64)}, r"scale must be torch\.float32 .*torch\.float64"),
        ({"scale2": torch.tensor(1.0)}, r"scale2 must be torch\.float32 \[7\], got .* \[\]"),
        ({"bias": torch.ones(N, 1)}, r"bias must be torch\.float32 \[7\], got .* \[7, 1\]"),
        ({"bias": torch.ones(N, dtype=F16)}, r"bias must be torch\.float32"),
        ({"layer_scale": torch.ones(1)}, r"layer_scale must be torch\.float32 \[7\]"),
        ({"split": 0}, r"split must lie inside 1\.\.11 with scale2 and be 12 without, got 0"),
        ({"split": K}, r"split must lie inside 1\.\.11 .* got 12"),
        ({"scale2": None}, r"be 12 without, got 5"),
        ({"act": "relu"}, "act must be one of none, gelu, gelu_tanh, got 'relu'"),
        ({"residual": torch.randn(M, N + 1)}, r"residual must be float \[6, 7\], got .* \[6, 8\]"),
        ({"residual": codes(M, N)}, r"residual must be float \[6, 7\], got torch\.int8"),
        ({"out_dtype": F64}, r"out_dtype must be one of .*bfloat16, got torch\.float64"),
        ({"out_dtype": I8}, r"out_dtype must be one of .*, got torch\.int8"),
        ({"out_inv_scale": torch.tensor(1.0)}, "out_inv_scale and out_zero_point come together"),
        ({"out_zero_point": integer(1)}, "out_inv_scale and out_zero_point come together"),
        ({**CODES_OUT, "out_bits": 0}, "bits must be from 2 to 8, got 0"),
        ({**CODES_OUT, "out_zero_point": torch.tensor(1)}, "qlinear's output: .* int32"),
        ({**CODES_OUT, "out_inv_scale": torch.ones(N)}, r"qlinear's output: .* \[\] or \[7\]"),
    ],
    "qlinear_packed": [
        ({"x": torch.randn(M, WIDEST)}, r"x must hold int8 codes, got torch\.float32"),
        ({"x": codes(M, K)}, r"x must have the 64 columns of 12 channels, 2 of them outliers"),
        ({"w_bits": 1}, "bits must be from 2 to 8, got 1"),
        ({"w_bits": 4}, r"packed must be uint8 \[7, 32\], got torch\.uint8 \[7, 24\]"),
        ({"packed": torch.zeros(N * 24, dtype=torch.uint8)}, r"uint8 \[7, 24\], got .* \[168\]"),
        ({"packed": torch.zeros(N, 24, dtype=I8)}, r"uint8 \[7, 24\], got torch\.int8"),
        ({"outliers": K}, r"outliers must lie inside 0\.\.11, got 12"),
        ({"outliers": -1}, r"outliers must lie inside 0\.\.11, got -1"),
        ({"w_zero_point": torch.zeros(N)}, r"w_zero_point must be torch\.int32 \[7\]"),
        ({"w_zero_point2": integers(1)}, r"w_zero_point2 must be torch\.int32 \[7\], got .* \[1\]"),
        ({"w_zero_point2": None}, "outliers, scale2 and w_zero_point2 come together"),
        ({"scale2": None}, "outliers, scale2 and w_zero_point2 come together"),
        ({**ONE_SEGMENT, "scale2": vector(N)}, "outliers, scale2 and w_zero_point2 come together"),
        ({"scale": torch.ones(N, dtype=F64)}, r"scale must be torch\.float32 .*torch\.float64"),
        ({"bias": torch.ones(N + 1)}, r"bias must be torch\.float32 \[7\], got .* \[8\]"),
        ({"act": "relu"}, "act must be one of none, gelu, gelu_tanh, got 'relu'"),
        ({"residual": torch.randn(M, N + 1)}, r"residual must be float \[6, 7\], got .* \[6, 8\]"),
        ({"out_dtype": I8}, r"out_dtype must be one of .*, got torch\.int8"),
        ({"out_inv_scale": torch.tensor(1.0)}, "out_inv_scale and out_zero_point come together"),
        ({**CODES_OUT, "out_bits": 0}, "bits must be from 2 to 8, got 0"),
    ],
    "qattention": [
        ({"q": torch.randn(B, H, T, D)}, r"q must hold int8 codes, got torch\.float32"),
        ({"k": codes(B, H, T, D).int()}, r"k must hold int8 codes, got torch\.int32"),
        ({"v": codes(H, T, D)}, r"v must have 4 dimensions, got \[2, 5, 4\]"),
        ({"k": codes(B, H, T + 1, D)}, r"must have one shape, got \[2, 2, 5, 4\] and"),
        ({"v": codes(B, H, T, D + 1)}, r"must have one shape"),
        ({"qk_bits": 1}, "bits must be from 2 to 8, got 1"),
        ({"av_bits": 16}, "bits must be from 2 to 8, got 16"),
        ({"q_zero_point": torch.tensor(7)}, r"q_zero_point must be torch\.int32 \[\], got .*int64"),
        ({"k_zero_point": integers(1)}, r"k_zero_point must be torch\.int32 \[\], got .* \[1\]"),
        ({"v_zero_point": torch.tensor(1.0)}, r"v_zero_point must be torch\.int32"),
        ({"score_scale": torch.ones(H)}, r"score_scale must be torch\.float32 \[\], got .* \[2\]"),
        ({"p_inv_scale": torch.tensor(1.0, dtype=F64)}, r"p_inv_scale must be torch\.float32"),
        ({"value_scale": integer(1)}, r"value_scale must be torch\.float32 \[\], got torch\.int32"),
        ({"bias": codes(T, T)}, r"bias must be float and broadcast to \[2, 2, 5, 5\], or .*int8"),
        ({"bias": torch.randn(T, T + 1)}, r"bias must be float and broadcast .* \[5, 6\]"),
        ({"bias": torch.randn(1, 1, 1, T, T)}, r"bias must be float and broadcast"),
        ({"bias": torch.randn(3, H, T, T)}, r"or its first dimension divide 2, got .* \[3, "),
        ({"bias": torch.randn(0, H, T, T)}, r"or its first dimension divide 2, got .* \[0, "),
        ({"out_zero_point": integer(1)}, "qattention: out_inv_scale and out_zero_point"),
        ({**CODES_OUT, "out_bits": 9}, "bits must be from 2 to 8, got 9"),
        ({**CODES_OUT, "out_inv_scale": torch.ones(D)}, r"qattention's output: .* \[\] or \[4\]"),
    ],
    "dequant_linear": [
        ({"bits": 1}, "bits must be from 2 to 8, got 1"),
        ({"bits": 4}, r"packed must hold 7×12 codes of 4 bits in 42 bytes, got 32"),
        ({"x": torch.randn(2, M, K)}, r"takes a float \[M, K\], got torch\.float32 \[2, 6, 12\]"),
        ({"x": codes(M, K)}, r"takes a float \[M, K\], got torch\.int8"),
        ({"x": torch.randn(M, K + 1)}, r"packed must hold 7×13 codes"),
        ({"packed": torch.zeros(32)}, r"in 32 bytes, got 32 of torch\.float32"),
        ({"scale": torch.tensor(1.0)}, r"packed must hold 1×12 codes"),
        ({"scale": torch.ones(1, N)}, r"scale must be torch\.float32 \[7\], got .* \[1, 7\]"),
        ({"scale": torch.ones(N, dtype=F16)}, r"scale must be torch\.float32"),
        ({"zero_point": torch.zeros(N)}, r"zero_point must be torch\.int32 \[7\]"),
        ({"zero_point": integers(N - 1)}, r"zero_point must be torch\.int32 \[7\], got .* \[6\]"),
        ({"scale2": torch.ones(1)}, r"scale2 must be torch\.float32 \[7\]"),
        ({"zero_point2": integers(N).long()}, r"zero_point2 must be torch\.int32 \[7\]"),
        ({"scale2": None}, "scale2, zero_point2 and columns come together"),
        ({"columns": None}, "scale2, zero_point2 and columns come together"),
        ({"columns": torch.tensor([1, 2]).int()}, r"columns must be torch\.int64 \[2\]"),
        ({"columns": torch.arange(K)}, r"columns must name 1\.\.11 of 12 columns"),
        ({"columns": torch.empty(0, dtype=I64)}, r"columns must name 1\.\.11 of 12 columns"),
        ({"bias": torch.ones(N, dtype=F16)}, r"bias must be torch\.float32 \[7\], got .*float16"),
        ({"bias": torch.ones(N + 1)}, r"bias must be torch\.float32 \[7\], got .* \[8\]"),
    ],
    "pack": [
        ({"bits": 0}, "bits must be from 1 to 8, got 0"),
        ({"bits": 9}, "bits must be from 1 to 8, got 9"),
        ({"codes": torch.ones(4)}, r"codes must be integers, got torch\.float32"),
        ({"codes": torch.tensor([0, 32])}, r"codes of 5 bits must lie in 0\.\.31, got 0\.\.32"),
        ({"codes": torch.tensor([-1, 3])}, r"codes of 5 bits must lie in 0\.\.31, got -1\.\.3"),
    ],
    "unpack": [
        ({"bits": 0}, "bits must be from 1 to 8, got 0"),
        ({"bits": 9}, "bits must be from 1 to 8, got 9"),
        ({"bits": 4}, r"21 codes of 4 bits take 11 bytes \(uint8\), got 14"),
        ({"shape": (3, 8)}, r"24 codes of 5 bits take 15 bytes \(uint8\), got 14"),
        ({"shape": (-3, -7)}, r"shape must be sizes >= 0, got \[-3, -7\]"),
        ({"packed": torch.zeros(14, dtype=I8)}, r"got 14 of torch\.int8"),
    ],
    "repack": [
        ({"bits": 1}, "bits must be from 2 to 8, got 1"),
        ({"k": K + 1}, r"packed must hold 7×13 codes of 3 bits in 35 bytes, got 32"),
        ({"zero_point": torch.zeros(N)}, r"zero_point must be torch\.int32 \[7\]"),
        ({"zero_point2": None}, "zero_point2 and columns come together"),
        ({"columns": None}, "zero_point2 and columns come together"),
        ({"columns": torch.arange(K)}, r"columns must name 1\.\.11 of 12 columns"),
        ({"columns": torch.tensor([3, 1])}, r"columns must be sorted, distinct and inside 0\.\.11"),
        ({"columns": torch.tensor([1, 12])}, r"columns must be sorted, distinct and inside"),
        ({"zero_point": torch.full((N,), 200).int()}, r"zero_point: weight code − zero_point must"),
    ],
}


@pytest.mark.parametrize("op", MAKE)
def test_explain_takes_what_the_op_takes(op: str, device: torch.device) -> None:
    schema = getattr(torch.ops.erq, op).default._schema
    required = {a.name for a in schema.arguments if not a.has_default_value()}
    made = MAKE[op]()
    reasons = explain(op, *(made[a.name] for a in schema.arguments if a.name in required))
    backend = dispatch.chosen()
    assert reasons["reference"] == reasons[backend] == "usable"
    assert explain(op, **made)[backend] == "usable"


REFUSALS = [(op, change, text) for op, rows in BAD.items() for change, text in rows]


@pytest.mark.parametrize(
    ("op", "change", "text"), REFUSALS, ids=[f"{op}-{text[:24]}" for op, _, text in REFUSALS]
)
def test_bad_argument_is_one_value_error(op: str, change: dict[str, Any], text: str) -> None:
    args = MAKE[op]()
    names = {a.name for a in getattr(torch.ops.erq, op).default._schema.arguments}
    assert change.keys() <= names
    getattr(ops, op)(**args, backend="reference")
    with pytest.raises(ValueError, match=text) as caught:
        getattr(ops, op)(**{**args, **change}, backend="reference")
    assert type(caught.value) is ValueError


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in MAKE if op not in ("pack", "unpack")])
def test_tensors_of_one_call_live_on_one_device(op: str) -> None:
    args = MAKE[op]()
    first = next(name for name, value in args.items() if isinstance(value, Tensor))
    with pytest.raises(ValueError, match="all tensors of one call live on one device, got cuda:0"):
        getattr(ops, op)(**{**args, first: args[first].cuda()})


@pytest.mark.parametrize("op", ["quantize", "qlinear", "dequant_linear"])
def test_op_under_compilation(op: str) -> None:
    args = MAKE[op]()
    run = getattr(ops, op)
    torch.compiler.reset()
    compiled = torch.compile(lambda kw: run(**kw), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(args), run(**args))


def test_a_backend_in_the_place_of_a_flag_is_refused() -> None:
    """Past torch's dispatcher, which checks types itself, it was a truth and ran another kernel."""
    x, vector = torch.randn(M, K), torch.ones(K)
    quantizer = (torch.tensor(3.0), torch.tensor(8, dtype=torch.int32), 4)
    with torch.inference_mode(), pytest.raises(ValueError, match="out_packed must be True or"):
        ops.layer_norm_quantize(x, vector, vector, 1e-6, *quantizer, None, "cpu")

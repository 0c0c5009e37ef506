"""The reference ops against fake quantization in fp64: what every kernel is then held to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from erq.quant import AffineParams, DualAffineParams, LogParams, WeightParams, dequantize, quantize
from erq_kernels import reference
from erq_kernels.formats import (
    GemmOperands,
    center,
    code_offset,
    gemm_operands,
    order_packed,
    pack,
    repack,
)

Affine = Callable[..., AffineParams]


def values(codes: Tensor, params: WeightParams) -> Tensor:
    """fp64 value of codes."""
    if isinstance(params, DualAffineParams):
        out = values(codes, params.rest)
        out[:, params.columns] = values(codes[:, params.columns], params.outlier)
        return out
    shape = (-1, 1) if params.scale.dim() else ()
    zero_point = params.zero_point.reshape(shape).double()
    return (codes.double() - zero_point) * params.scale.reshape(shape).double()


def stored(codes: Tensor, bits: int) -> Tensor:
    """Codes as the kernels hold them."""
    return (codes - code_offset(bits)).to(torch.int8)


def operands_of(
    codes: Tensor, w: WeightParams, bias: Tensor | None, x: AffineParams
) -> GemmOperands:
    rest, outlier, columns = w, None, None
    if isinstance(w, DualAffineParams):
        rest, outlier, columns = w.rest, w.outlier, w.columns
    second = None if outlier is None else outlier.zero_point
    weight = center(codes, rest.bits, rest.zero_point, second, columns)
    return gemm_operands(
        weight,
        codes.shape[1],
        rest.scale,
        bias,
        x.scale,
        x.zero_point,
        x.bits,
        None if outlier is None else outlier.scale,
        columns,
    )


def gemm(x_codes: Tensor, x: AffineParams, operands: GemmOperands, **epilogue: object) -> Tensor:
    codes = stored(x_codes, x.bits)
    if operands.order is not None:
        codes = codes[:, operands.order]
    return reference.qlinear(
        codes,
        operands.weight,
        operands.scale,
        operands.scale2,
        operands.split,
        operands.bias,
        **epilogue,  # type: ignore[arg-type]
    )


def random_weight(n: int, k: int, bits: int, dual: bool) -> tuple[Tensor, WeightParams]:
    """Codes [N, K], every scale different, zero points in and outside 0..2**bits − 1."""

    def params() -> AffineParams:
        low, high = max(-20, 2**bits - 128), min(2**bits + 20, 128)  # what int8 can hold
        zero_point = torch.randint(low, high + 1, (n,), dtype=torch.int32)
        return AffineParams(torch.rand(n) + 0.1, zero_point, bits)

    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    if not dual:
        return codes, params()
    columns = torch.randperm(k)[: max(1, k // 5)].sort().values
    return codes, DualAffineParams(params(), params(), columns)


def relative_error(got: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """Largest error relative to what the sums are made of, so that cancellation does not count."""
    assert got.shape == exact.shape
    return float(((got.double() - exact).abs() / magnitude).max())


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("k", [5, 67])
def test_int_matmul_is_exact(m: int, k: int) -> None:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (9, k), dtype=torch.int8)
    got = reference.int_matmul(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), a.long() @ b.long().t())


@pytest.mark.parametrize(("x", "y"), [(-128, -128), (-128, 127), (127, 127)])
@pytest.mark.parametrize("k", [64, 3072])
def test_int_matmul_is_exact_at_the_extremes(x: int, y: int, k: int) -> None:
    a = torch.full((33, k), x, dtype=torch.int8)
    b = torch.full((17, k), y, dtype=torch.int8)
    assert bool((reference.int_matmul(a, b) == x * y * k).all())
    assert bool((reference.int_matmul(a.t().contiguous(), a.t().contiguous()) == x * x * 33).all())


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 8), (4, 0, 8), (1, 1, 1)])
def test_int_matmul_of_degenerate_shapes(m: int, n: int, k: int) -> None:
    a, b = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
    got = reference.int_matmul(a, b)
    assert got.shape == (m, n)
    assert bool((got == k).all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantize_stores_the_codes_of_the_quantizer(affine: Affine, bits: int) -> None:
    x = torch.randn(50, 6) * 10
    params = affine(0.37, 5, bits)
    got = reference.quantize(x, params.inv_scale, params.zero_point, bits)
    assert got.dtype == torch.int8
    assert torch.equal(got, stored(quantize(x, params), bits))


def test_quantize_per_channel(affine: Affine) -> None:
    params = affine([0.1, 0.2, 0.4], [3, -40, 90], 4)
    x = torch.randn(8, 3) * 10
    got = reference.quantize(x, params.inv_scale, params.zero_point, 4)
    assert torch.equal(got.t().int(), quantize(x.t().contiguous(), params))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_layer_norm_quantize(affine: Affine, bits: int, rows: int) -> None:
    x = torch.randn(rows, 40) * 3 + 1
    weight, bias = torch.rand(40) + 0.5, torch.randn(40)
    params = affine(5.0 / 2**bits, 2 ** (bits - 1) + 1, bits)
    order = torch.randperm(40)
    arguments = (x, weight, bias, 1e-6, params.inv_scale, params.zero_point, bits)
    got = reference.layer_norm_quantize(*arguments, order)
    natural = reference.layer_norm_quantize(*arguments, None)
    assert got.dtype == torch.int8
    assert torch.equal(got, natural[:, order])
    y = F.layer_norm(x.double(), (40,), weight.double(), bias.double(), 1e-6)
    exact = ((y / params.scale).round() + params.zero_point).clamp(0, 2**bits - 1)
    assert torch.equal(natural, stored(exact, bits))


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("w_bits", [2, 4, 7, 8])
@pytest.mark.parametrize(("x_bits", "x_zero_point"), [(4, 7), (4, -5), (3, 21), (8, 131), (8, -90)])
def test_qlinear_equals_the_fake_quantized_product(
    affine: Affine, dual: bool, w_bits: int, x_bits: int, x_zero_point: int
) -> None:
    codes, w = random_weight(11, 37, w_bits, dual)
    x = affine(0.03, x_zero_point, x_bits)
    x_codes = torch.randint(0, 2**x_bits, (23, 37))
    bias = torch.randn(11)
    got = gemm(x_codes, x, operands_of(codes, w, bias, x))
    a, b = values(x_codes, x), values(codes, w)
    magnitude = (a.abs() + abs(x_zero_point) * 0.03) @ b.abs().t() + bias.abs()
    assert relative_error(got, a @ b.t() + bias, magnitude) < 1e-6


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("dual", [False, True])
def test_qlinear_of_one_and_of_no_row(affine: Affine, m: int, dual: bool) -> None:
    codes, w = random_weight(6, 10, 4, dual)
    x = affine(0.5, 3)
    x_codes = torch.randint(0, 16, (m, 10))
    got = gemm(x_codes, x, operands_of(codes, w, None, x))
    assert got.shape == (m, 6)
    exact = values(x_codes, x) @ values(codes, w).t()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dual", [False, True])
def test_identity_activations_give_the_decoded_weight(affine: Affine, dual: bool) -> None:
    codes, w = random_weight(9, 12, 4, dual)
    x = affine(1.0, 0)
    got = gemm(torch.eye(12, dtype=torch.int64), x, operands_of(codes, w, None, x))
    assert torch.equal(got.t(), dequantize(codes.int(), w))


@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_epilogue(affine: Affine, act: str, out_dtype: torch.dtype) -> None:
    codes, w = random_weight(8, 20, 4, True)
    x = affine(0.05, 6)
    x_codes = torch.randint(0, 16, (5, 20))
    bias, layer_scale, residual = torch.randn(8), torch.rand(8), torch.randn(5, 8)
    got = gemm(
        x_codes,
        x,
        operands_of(codes, w, bias, x),
        act=act,
        layer_scale=layer_scale,
        residual=residual,
        out_dtype=out_dtype,
    )
    y = values(x_codes, x) @ values(codes, w).t() + bias
    if act != "none":
        y = F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
    exact = residual + y * layer_scale
    assert got.dtype == out_dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if out_dtype == torch.float32 else {}
    torch.testing.assert_close(got, exact.to(out_dtype), **tolerance)


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("out_bits", [4, 8])
def test_codes_out(affine: Affine, per_column: bool, out_bits: int) -> None:
    codes, w = random_weight(3, 20, 4, False)
    x = affine(0.05, 6)
    x_codes = torch.randint(0, 16, (5, 20))
    out = affine([0.5, 0.3, 0.2], [3, 9, -2], out_bits) if per_column else affine(0.5, 7, out_bits)
    operands = operands_of(codes, w, None, x)
    got = gemm(
        x_codes,
        x,
        operands,
        out_inv_scale=out.inv_scale,
        out_zero_point=out.zero_point,
        out_bits=out_bits,
    )
    y = gemm(x_codes, x, operands)
    expected = quantize(y.t().contiguous(), out).t() if per_column else quantize(y, out)
    assert torch.equal(got, stored(expected, out_bits))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("k", "outliers"), [(64, 0), (41, 0), (70, 3), (128, 32), (33, 32)])
def test_a_packed_weight_gives_what_the_repacked_one_gives(
    bits: int, k: int, outliers: int
) -> None:
    n = 5
    packed = pack(torch.randint(0, 2**bits, (n, k)), bits)
    columns = torch.randperm(k)[:outliers].sort().values if outliers else None
    # Mostly zero points that no code has, so that padding cannot hold one.
    zero_point = torch.randint(-3, 0, (n,), dtype=torch.int32).clamp(min=2**bits - 128)
    zero_point2 = (zero_point + 2**bits + 1).clamp(max=128) if outliers else None
    weight = repack(packed, bits, k, zero_point, zero_point2, columns)
    scale, scale2, bias = torch.rand(3, n)
    split = weight.shape[1] if columns is None else 32
    x = torch.randint(-128, 128, (4, weight.shape[1]), dtype=torch.int8)
    second = scale2 if outliers else None
    got = reference.qlinear_packed(
        x, order_packed(packed, bits, n, k, columns), bits, k, outliers,
        zero_point if zero_point2 is None else zero_point2,
        zero_point if outliers else None, scale, second, bias, "gelu",
    )  # fmt: skip
    assert torch.equal(got, reference.qlinear(x, weight, scale, second, split, bias, "gelu"))


@pytest.mark.parametrize("bits", [(4, 4), (3, 6), (8, 8)])
@pytest.mark.parametrize("zero_points", [(7, 5), (-11, 40)])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_attention_scores(
    affine: Affine, bits: tuple[int, int], zero_points: tuple[int, int], tokens: int
) -> None:
    params = [affine(s, z, b) for s, z, b in zip((0.3, 0.2), zero_points, bits, strict=True)]
    q, k = (torch.randint(0, 2**b, (2, 3, tokens, 8)) for b in bits)
    got = reference.attention_scores(
        stored(q, bits[0]),
        stored(k, bits[1]),
        params[0].zero_point,
        params[1].zero_point,
        bits,
        params[0].scale * params[1].scale * 0.125,
    )
    exact = values(q, params[0]) @ values(k, params[1]).transpose(-1, -2) * 0.125
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("p_bits", "v_bits"), [(2, 2), (3, 8), (4, 4), (6, 6), (8, 8)])
@pytest.mark.parametrize("zero_last", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_attention_values(
    affine: Affine, p_bits: int, v_bits: int, zero_last: bool, tokens: int
) -> None:
    p = LogParams(torch.tensor(0.7), p_bits, zero_last)
    v = affine(0.3, 5, v_bits)
    p_codes = torch.randint(0, 2**p_bits, (2, 3, tokens, tokens), dtype=torch.uint8)
    v_codes = torch.randint(0, 2**v_bits, (2, 3, tokens, 8))
    got = reference.attention_values(
        p_codes, stored(v_codes, v_bits), v.zero_point, p_bits, v_bits, zero_last, p.scale * v.scale
    )
    weights = 0.7 * torch.exp2(-0.5 * p_codes.double())
    if zero_last:
        weights[p_codes == 2**p_bits - 1] = 0
    exact = weights @ values(v_codes, v)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_attention_sums_are_exact_beyond_what_fp32_holds(affine: Affine) -> None:
    """One rounding, of the exact whole number: as an int32 accumulator gives it."""
    params = affine(1.0, -200, 8)
    q, k = torch.randint(0, 256, (2, 3, 11, 301))
    got = reference.attention_scores(
        stored(q, 8), stored(k, 8), params.zero_point, params.zero_point, (8, 8), params.scale
    )
    exact = values(q, params) @ values(k, params).transpose(-1, -2)
    assert float(exact.max()) > 2**24
    assert torch.equal(got, exact.float())

    p_codes = 2 * torch.randint(0, 31, (3, 11, 301))  # whole powers of two
    v = torch.randint(0, 256, (3, 301, 9))
    one = torch.tensor(1.0)
    got = reference.attention_values(
        p_codes.to(torch.uint8), stored(v, 8), params.zero_point, 6, 8, True, one
    )
    exact = torch.exp2(-0.5 * p_codes.double()) @ values(v, params)
    assert torch.equal(got, exact.float())


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantize_softmax_gives_the_codes_of_the_quantizer(bits: int) -> None:
    p = torch.cat([torch.softmax(torch.randn(200) * 4, 0), torch.tensor([0.0, 1.0, 1e-42])])
    params = LogParams(torch.tensor(0.1), bits)
    got = reference.quantize_softmax(p, params.scale.reciprocal(), bits)
    assert got.dtype == torch.uint8
    assert torch.equal(got.int(), quantize(p, params))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_bits", [0, 4])
def test_qattention_is_its_parts(affine: Affine, with_bias: bool, out_bits: int) -> None:
    q_params, k_params, v_params = affine(0.2, 7), affine(0.3, 8), affine(0.1, 6, 3)
    p_params = LogParams(torch.tensor(0.4), 3)
    q, k = torch.randint(0, 16, (2, 2, 2, 13, 8))
    v = torch.randint(0, 8, (2, 2, 13, 8))
    bias = torch.randn(1, 2, 13, 13) if with_bias else None
    out = affine(0.0973, 8)  # no round number: on a tie fp32 and fp64 may part
    got = reference.qattention(
        stored(q, 4),
        stored(k, 4),
        stored(v, 3),
        q_params.zero_point,
        k_params.zero_point,
        v_params.zero_point,
        q_params.scale * k_params.scale * 0.35,
        p_params.scale.reciprocal(),
        p_params.scale * v_params.scale,
        4,
        3,
        True,
        bias,
        out.inv_scale if out_bits else None,
        out.zero_point if out_bits else None,
        out_bits,
    )
    scores = values(q, q_params) @ values(k, k_params).transpose(-1, -2) * 0.35
    p = torch.softmax(scores + (0 if bias is None else bias), dim=-1).float()
    p_values = dequantize(quantize(p, p_params), p_params).double()
    y = (p_values @ values(v, v_params)).transpose(1, 2)
    if out_bits:
        assert torch.equal(got, stored(quantize(y, out), 4))
    else:
        torch.testing.assert_close(got.double(), y, rtol=1e-5, atol=1e-5)


def test_qattention_with_float_probabilities(affine: Affine) -> None:
    params = affine(0.1, 6)
    q, k, v = torch.randint(0, 16, (3, 2, 2, 13, 8))
    got = reference.qattention(
        *(stored(x, 4) for x in (q, k, v)),
        *[params.zero_point] * 3,
        params.scale * params.scale * 0.35,
        None,
        params.scale,
        4,
        4,
    )
    scores = values(q, params) @ values(k, params).transpose(-1, -2) * 0.35
    y = (scores.softmax(dim=-1) @ values(v, params)).transpose(1, 2)
    torch.testing.assert_close(got.double(), y.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dual", [False, True])
def test_dequant_linear_reads_the_packed_weight(bits: int, dual: bool) -> None:
    codes, w = random_weight(7, 13, bits, dual)
    plain = w.rest if isinstance(w, DualAffineParams) else w
    second = (
        (w.outlier.scale, w.outlier.zero_point, w.columns)
        if isinstance(w, DualAffineParams)
        else (None, None, None)
    )
    packed = pack(codes, bits)
    arguments = (packed, bits, plain.scale, plain.zero_point, *second)
    weight = reference.dequant_linear(torch.eye(13), *arguments, None).t()
    assert torch.equal(weight, dequantize(codes.int(), w))
    x, bias = torch.randn(5, 13), torch.randn(7)
    for dtype in (torch.float32, torch.bfloat16):
        got = reference.dequant_linear(x.to(dtype), *arguments, bias)
        exact = x.to(dtype).double() @ values(codes, w).t() + bias
        assert got.dtype == dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(got, exact.to(dtype), **tolerance)
    assert reference.dequant_linear(x[:0], *arguments, bias).shape == (0, 7)

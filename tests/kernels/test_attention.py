"""The attention of every backend against the reference.

Scores are exact. exp and log2 are not torch's, so a softmax code differs where −2 log2 p lies
within their error of a rounding boundary: rows with such a probability are told apart in fp64 and
left out of the comparison, which for all others asks for equality (up to 4 bits; beyond, sums are
rounded).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erq_kernels import ops, reference
from erq_kernels.formats import code_offset

# An op's arguments by name.
Call = dict[str, Any]

# numpy, under the interpreter, warns of what the kernel counts on: 2^−inf is 0, log2 0 is −inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")

# Error of −2 log2(p · p_inv_scale) in fp32, here and in the reference.
CODE_ERROR = 1e-5


def codes(shape: tuple[int, ...], bits: int) -> Tensor:
    """Stored codes, whole range, as a view of [B, T, H, D] such as an attention layer has."""
    b, h, t, d = shape
    stored = torch.randint(0, 2**bits, (b, t, h, d)) - code_offset(bits)
    return stored.to(torch.int8).transpose(1, 2)


def build(
    shape: tuple[int, ...],
    device: torch.device,
    qk_bits: int = 4,
    av_bits: int = 4,
    *,
    zero_points: tuple[int, int, int] | None = None,
    spread: float = 1.5,
    zero_last: bool = True,
    bias: Tensor | None = None,
) -> Call:
    """Random codes whose scores have the standard deviation `spread`."""
    q_zero, k_zero, v_zero = zero_points or (
        2 ** (qk_bits - 1), 2 ** (qk_bits - 1) - 1, 2 ** (av_bits - 1) + 1
    )  # fmt: skip
    call = {
        "q": codes(shape, qk_bits),
        "k": codes(shape, qk_bits),
        "v": codes(shape, av_bits),
        "q_zero_point": torch.tensor(q_zero, dtype=torch.int32),
        "k_zero_point": torch.tensor(k_zero, dtype=torch.int32),
        "v_zero_point": torch.tensor(v_zero, dtype=torch.int32),
        "score_scale": torch.tensor(spread * 12 / 4**qk_bits / shape[3] ** 0.5),
        "p_inv_scale": torch.tensor(1 / 0.8),
        "value_scale": torch.tensor(0.8 * 0.013),
        "qk_bits": qk_bits,
        "av_bits": av_bits,
        "zero_last": zero_last,
        "bias": bias,
        "out_inv_scale": None,
        "out_zero_point": None,
        "out_bits": 0,
    }
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in call.items()}


def with_codes(call: Call, bits: int, per_column: bool) -> Call:
    """The call with an output quantizer whose range covers part of the values."""
    y = reference.qattention(**call)
    shape = (y.shape[-1],) if per_column else ()
    inv_scale = torch.rand(shape) + 0.5
    return call | {
        "out_inv_scale": inv_scale.to(y.device) * 2**bits / (4 * y.std() + 1e-6),
        "out_zero_point": torch.randint(-2, 2**bits + 2, shape, dtype=torch.int32).to(y.device),
        "out_bits": bits,
    }


def run(call: Call) -> Tensor:
    return ops.qattention(**call)


def softmax_levels(call: Call) -> Tensor:
    """−2 log2(p · p_inv_scale) in fp64, from the reference's exact scores."""
    bits = call["qk_bits"]
    scores = reference.attention_scores(
        call["q"], call["k"], call["q_zero_point"], call["k_zero_point"], (bits, bits),
        call["score_scale"],
    )  # fmt: skip
    if call["bias"] is not None:
        scores = scores + reference.batch_bias(call["bias"], len(scores))
    p = scores.double().softmax(dim=-1)
    return -2 * (p * call["p_inv_scale"].double()).log2()


def decided_rows(call: Call) -> Tensor:
    """Rows [B, T, H] none of whose softmax codes fp32's error can move."""
    y = softmax_levels(call)
    boundary = y.floor() + 0.5
    matters = (boundary > 0) & (boundary < 2 ** call["av_bits"] - 1)
    near = matters & ((y - boundary).abs() < CODE_ERROR)
    return ~near.any(dim=-1).transpose(1, 2)


def check(call: Call) -> None:
    """Equality in all rows that fp32 decides, which are nearly all; twice the same."""
    got, want = run(call), reference.qattention(**call)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    decided = decided_rows(call)
    assert int((~decided).sum()) <= 1 + decided.numel() // 20
    assert torch.equal(got[decided], want[decided])
    assert bool(torch.isfinite(got.float()).all())
    assert torch.equal(run(call), got)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_last", [True, False])
def test_equal_to_the_reference(
    bits: int, zero_last: bool, device: torch.device, poison: None
) -> None:
    call = build((2, 2, 19, 32), device, bits, bits, zero_last=zero_last)
    check(call)
    check(with_codes(call, bits, per_column=False))
    check(with_codes(call, 8, per_column=True))


def test_a_head_of_a_vision_transformer(device: torch.device, poison: None) -> None:
    call = build((1, 1, 197, 64), device, 4, 4)
    levels = softmax_levels(call).round().clamp(0, 15).int()
    assert set(levels.unique().tolist()) >= set(range(5, 16))  # codes of both parities, and zeros
    check(call)


# All scores in registers up to 224 keys and 64 dimensions, in chunks of 64 and one of 16 to 64.
@pytest.mark.parametrize("t", [1, 2, 16, 49, 64, 65, 130])
@pytest.mark.parametrize("d", [7, 32, 64])
def test_short_rows(t: int, d: int, device: torch.device, poison: None) -> None:
    check(build((1, 1, t, d), device))


@pytest.mark.parametrize(("t", "d"), [(5, 80), (70, 96), (33, 72), (17, 128), (230, 32)])
@pytest.mark.parametrize("zero_last", [True, False])
def test_long_rows_and_wide_heads(
    t: int, d: int, zero_last: bool, device: torch.device, poison: None
) -> None:
    check(with_codes(build((1, 1, t, d), device, zero_last=zero_last), 4, per_column=True))


@pytest.mark.parametrize("t", [20, 230])
@pytest.mark.parametrize(
    "zero_points", [(0, 0, 0), (15, 15, 15), (-60, 90, -200), (300, -250, 1500), (129, -113, -1700)]
)
def test_zero_points_anywhere(
    zero_points: tuple[int, int, int], t: int, device: torch.device
) -> None:
    # Far from the codes scores lie far apart, unless the scale is small.
    call = build((1, 1, t, 40), device, zero_points=zero_points)
    scores = reference.attention_scores(
        call["q"], call["k"], call["q_zero_point"], call["k_zero_point"], (4, 4),
        call["score_scale"],
    )  # fmt: skip
    call["score_scale"] = call["score_scale"] * 1.5 / (scores.std(dim=-1).mean() + 1e-6)
    check(call)


@pytest.mark.parametrize("qk_bits", [5, 6, 7, 8])
@pytest.mark.parametrize("t", [20, 230])
def test_wide_queries_and_keys(qk_bits: int, t: int, device: torch.device) -> None:
    for d in (32, 80):
        check(build((1, 1, t, d), device, qk_bits, 4))


@pytest.mark.parametrize("av_bits", [5, 6, 7, 8])
@pytest.mark.parametrize("t", [40, 230])
@pytest.mark.parametrize("zero_last", [True, False])
def test_wide_values_are_within_rounding_error(
    av_bits: int, t: int, zero_last: bool, device: torch.device, poison: None
) -> None:
    call = build((1, 1, t, 32), device, 6, av_bits, spread=6.0, zero_last=zero_last)
    decided = decided_rows(call)
    # What the codes say, in fp64.
    code = softmax_levels(call).round().clamp(0, 2**av_bits - 1)
    weight = torch.exp2(-code / 2)
    if zero_last:
        weight = torch.where(code == 2**av_bits - 1, 0.0, weight)
    v = call["v"].double() + code_offset(av_bits) - call["v_zero_point"]
    exact = weight @ v * call["value_scale"].double()
    size = weight @ v.abs() * call["value_scale"].double()  # what the sums are made of
    got = run(call).transpose(1, 2)
    decided = decided.transpose(1, 2)
    torch32 = weight.float() @ v.float() * call["value_scale"]
    error = ((got.double() - exact).abs() / size)[decided].max()
    torch_error = ((torch32.double() - exact).abs() / size)[decided].max()
    assert int((~decided).sum()) <= 1 + decided.numel() // 10
    assert float(error) <= 2 * float(torch_error)
    assert torch.equal(run(call).transpose(1, 2), got)


def test_relative_position_bias_and_mask(device: torch.device) -> None:
    t = 49
    bias = torch.randn(2, t, t)
    mask = torch.zeros(2, 1, t, t)
    mask[1, :, : t // 2, t // 2 :] = -100.0
    for added in (bias, mask, bias + mask, torch.randn(1, 1, 1, t), torch.randn(t, 1)):
        check(build((2, 2, t, 16), device, bias=added))


def test_a_bias_for_every_window_of_several_images(device: torch.device, poison: None) -> None:
    # Three images of two windows each.
    bias = torch.randn(2, 3, 16, 16) + torch.tensor([0.0, -100.0])[:, None, None, None].expand(
        2, 3, 16, 16
    ).tril(-1)
    call = build((6, 3, 16, 32), device, bias=bias)
    check(call)
    whole = {**call, "bias": bias.repeat(3, 1, 1, 1).to(device)}
    assert torch.equal(run(call), run(whole))
    assert not torch.equal(run(call), run({**call, "bias": call["bias"].flip(0)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_of_long_rows(dtype: torch.dtype, device: torch.device) -> None:
    check(build((1, 2, 230, 16), device, bias=torch.randn(2, 230, 230).to(dtype)))


@pytest.mark.parametrize("t", [20, 230])
def test_keys_masked_by_minus_infinity(t: int, device: torch.device) -> None:
    mask = torch.full((t, t), -torch.inf).triu(1)  # the first row sees itself alone
    mask[t - 1, : t - 1] = -torch.inf  # and the last one too, after blocks of nothing else
    check(build((1, 2, t, 16), device, bias=mask))


@pytest.mark.parametrize("t", [1, 37, 230])
def test_tokens_that_see_themselves_give_their_own_values(t: int, device: torch.device) -> None:
    # Own key: a score that outweighs all others, so p = 1, code 0, and the output is v decoded.
    call = build((1, 1, t, 32), device)
    call["p_inv_scale"] = torch.tensor(1.0, device=device)
    call["bias"] = torch.full((t, t), -1e4, device=device).fill_diagonal_(0.0)
    values = (call["v"].float() - call["v_zero_point"]) * call["value_scale"]
    assert torch.equal(run(call), values.transpose(1, 2))


@pytest.mark.parametrize("t", [20, 230])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes(t: int, bits: int, device: torch.device) -> None:
    low, high = -code_offset(bits), 2**bits - 1 - code_offset(bits)
    for q, k, v in ((low, low, high), (high, high, low), (low, high, high)):
        call = build((1, 1, t, 64), device, bits, bits)
        for name, value in (("q", q), ("k", k), ("v", v)):
            call[name] = torch.full_like(call[name], value)
        # All probabilities are 1 / t.
        got, want = run(call), reference.qattention(**call)
        assert bool(decided_rows(call).all())
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(2, 2, 37, 32), (1, 1, 230, 64), (1, 2, 40, 80), (1, 1, 1, 96)])
@pytest.mark.parametrize("bits", [4, 8])
def test_float_probabilities(
    shape: tuple[int, ...], bits: int, device: torch.device, poison: None
) -> None:
    call = build(shape, device, bits, bits) | {"p_inv_scale": None}
    q, k, v = (call[n].double() + code_offset(bits) for n in "qkv")
    q, k, v = (x - call[f"{n}_zero_point"] for n, x in zip("qkv", (q, k, v), strict=True))
    p = (q @ k.transpose(-1, -2) * call["score_scale"]).softmax(dim=-1)
    exact = ((p @ v) * call["value_scale"]).transpose(1, 2)
    # What torch loses by taking the probabilities in fp16.
    half = ((p.half().double() @ v) * call["value_scale"]).transpose(1, 2)
    got = run(call)
    assert got.shape == exact.shape and got.dtype == torch.float32
    scale = float(exact.abs().max()) * 2.0**-12
    assert (got - exact).abs().max() <= 2 * (half - exact).abs().max() + scale
    codes = with_codes(call, bits, per_column=False)
    assert int((run(codes).int() - reference.qattention(**codes).int()).abs().max()) <= 1
    assert torch.equal(run(call), got)


def test_nothing_in_nothing_out(device: torch.device) -> None:
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        b, h, t, d = shape
        assert run(build(shape, device)).shape == (b, t, h, d)


def test_heads_too_wide_are_refused_with_the_reason(triton_device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="head dimension must not exceed 128, got 136"):
        run(build((1, 1, 3, 136), triton_device))

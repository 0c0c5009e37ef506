"""The quantizer of every backend against the reference: every code equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erq_kernels import ops, reference


def check(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> None:
    got = ops.quantize(x, inv_scale, zero_point, bits)
    assert got.is_contiguous()
    assert torch.equal(got, reference.quantize(x, inv_scale, zero_point, bits))
    assert torch.equal(ops.quantize(x, inv_scale, zero_point, bits), got)


def quantizer(columns: int | None, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales all different, zero points inside and outside the range of codes."""
    shape = () if columns is None else (columns,)
    inv_scale = torch.rand(shape) * 2**bits / 4 + 0.3
    zero_point = torch.randint(-20, 2**bits + 20, shape, dtype=torch.int32)
    return inv_scale.to(device), zero_point.to(device)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_column", [False, True])
def test_codes_equal_the_reference(
    bits: int, dtype: torch.dtype, per_column: bool, device: torch.device, poison: None
) -> None:
    x = torch.randn(5, 67, device=device, dtype=dtype) * 3
    check(x, *quantizer(67 if per_column else None, bits, device), bits)


@pytest.mark.parametrize("zero_point", [0, 7, -3])
def test_halves_round_to_even(zero_point: int, device: torch.device) -> None:
    x = torch.arange(-40, 41, device=device) / 2
    zero = torch.tensor(zero_point, dtype=torch.int32, device=device)
    got = ops.quantize(x, torch.ones((), device=device), zero, 8)
    assert torch.equal(got.int() + 128, (x.round().int() + zero_point).clamp(0, 255))
    check(x, torch.ones((), device=device), zero, 8)


def test_the_product_is_rounded_before_the_sum(device: torch.device) -> None:
    # 3 · fp32(1/6) is 0.5 + 1.5e-8: in fp32 that is a half, which rounds down to 0.
    x = torch.tensor([3.0, 9.0, 15.0, -3.0], device=device)
    check(x, torch.tensor(1 / 6, device=device), torch.tensor(5, dtype=torch.int32).to(device), 4)


@pytest.mark.parametrize("zero_point", [-(2**21), -300, 300, 2**21])
def test_values_and_zero_points_far_outside(zero_point: int, device: torch.device) -> None:
    near = torch.tensor([-2.5, -0.5, 0.0, 0.5, 1.5, 7.0, 15.5]) - zero_point
    far = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -0.0])
    x = torch.cat([near, far]).to(device)
    zero = torch.tensor(zero_point, dtype=torch.int32, device=device)
    check(x, torch.ones((), device=device), zero, 4)


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (0, 5), (5, 0), (1, 1), (3, 1), (2, 4100), (1030, 2)]
)
def test_odd_shapes(shape: tuple[int, ...], device: torch.device, poison: None) -> None:
    x = torch.randn(shape, device=device) * 4
    check(x, *quantizer(None, 4, device), 4)
    if shape:
        check(x, *quantizer(shape[-1], 4, device), 4)


@pytest.mark.parametrize("per_column", [False, True])
def test_views_are_read_in_place(per_column: bool, device: torch.device, poison: None) -> None:
    b, t, h, d = 2, 5, 3, 8
    qkv = torch.randn(b, t, 3, h, d, device=device) * 4
    views = [
        *qkv.permute(2, 0, 3, 1, 4),  # q, k and v of an attention layer
        qkv[:, :, 0].transpose(-1, -2),
        qkv[:, ::2, 1, :, 1:6],
        qkv[0, 0, 0, 0].expand(4, 6, d),
        qkv.permute(4, 2, 0, 3, 1),  # five dimensions, none of which merge
    ]
    for x in views:
        check(x, *quantizer(x.shape[-1] if per_column else None, 4, device), 4)


def test_float64_is_refused_with_the_reason(device: torch.device) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    with pytest.raises(
        RuntimeError, match=r"must be float16, bfloat16 or float32, got torch\.float64"
    ):
        ops.quantize(x, *quantizer(None, 4, device), 4)

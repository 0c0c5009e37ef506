"""Ops that give packed 4-bit codes: the same codes as without, two to a byte, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erq_kernels import formats, ops, reference

BACKENDS = ("reference", "triton")


def quantizer(columns: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = () if columns is None else (columns,)
    zero_point = torch.randint(4, 12, shape, dtype=torch.int32, device=device)
    return torch.rand(shape, device=device) + 2, zero_point


def check(op: Any, backend: str, *args: Any, **kwargs: Any) -> None:
    codes = op(*args, **kwargs, backend=backend)
    packed = op(*args, **kwargs, out_packed=True, backend=backend)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert codes.unique().numel() > 8
    assert torch.equal(formats.unpack_nibbles(packed), codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 70), (2, 3, 34), (1, 5000)])
@pytest.mark.parametrize("per_column", [False, True])
def test_quantize(
    shape: tuple[int, ...],
    per_column: bool,
    backend: str,
    triton_device: torch.device,
    poison: None,
) -> None:
    x = torch.randn(shape, device=triton_device) * 2
    scale, zero = quantizer(shape[-1] if per_column else None, triton_device)
    check(ops.quantize, backend, x, scale, zero, 4)
    check(ops.quantize, backend, x.transpose(0, -2), scale, zero, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "k", "outliers"), [(5, 70, 0), (3, 100, 7), (1, 1030, 40)])
def test_layer_norm_quantize(
    m: int, k: int, outliers: int, backend: str, triton_device: torch.device, poison: None
) -> None:
    x = torch.randn(m, k, device=triton_device)
    order = None
    if outliers:
        order, _, _ = formats.k_order(torch.arange(0, 2 * outliers, 2), k)
        assert order is not None
        order = order.to(triton_device)
    one = torch.ones(k, device=triton_device)
    args = (x, one, one / 8, 1e-6, *quantizer(None, triton_device), 4, order)
    check(ops.layer_norm_quantize, backend, *args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("t", "d"), [(17, 32), (70, 64), (5, 80), (300, 24)])
def test_qattention(
    t: int, d: int, backend: str, triton_device: torch.device, poison: None
) -> None:
    q, k, v = (
        torch.randint(0, 16, (2, 2, t, d), dtype=torch.int8, device=triton_device) for _ in range(3)
    )
    zero = torch.tensor(8, dtype=torch.int32, device=triton_device)
    score, p_inv, value = (
        torch.tensor(s, device=triton_device) for s in (0.02, 1.0, 0.5 if t < 100 else 1.0)
    )
    check(
        ops.qattention, backend, q, k, v, zero, zero, zero, score, p_inv, value, 4, 4,
        out_inv_scale=torch.rand(d, device=triton_device) * 4 + 4,
        out_zero_point=torch.randint(6, 10, (d,), dtype=torch.int32, device=triton_device),
        out_bits=4,
    )  # fmt: skip


def test_weights_of_four_bits_come_back() -> None:
    weight = torch.randint(0, 16, (40, 96)) - torch.randint(-3, 20, (40, 1))
    for split in (32, 96):
        packed = formats.pack_weight(weight.to(torch.int8), split)
        assert packed is not None and packed[1] is not None
        assert packed[0].shape == (40, 48)
        assert packed[1].shape == (1 if split == 96 else 2, 40)
        assert torch.equal(formats.unpack_weight(*packed, split), weight.to(torch.int8))
    plain = formats.pack_weight((weight % 16 - 8).to(torch.int8), 96)
    assert plain is not None and plain[1] is None
    weight[3, 5], weight[3, 6] = -8, 8
    assert formats.pack_weight(weight.to(torch.int8), 96) is None


def test_packed_operands_are_the_same_product() -> None:
    x = torch.randint(0, 16, (5, 64), dtype=torch.int8)
    weight = (torch.randint(0, 16, (7, 64)) - 3).to(torch.int8)
    scale = torch.rand(7)
    args = (scale, scale * 3, 32, torch.randn(7))
    packed = formats.pack_weight(weight, 32)
    assert packed is not None
    got = reference.qlinear(formats.pack_nibbles(x), packed[0], *args, weight_offset=packed[1])
    assert torch.equal(got, reference.qlinear(x, weight, *args))

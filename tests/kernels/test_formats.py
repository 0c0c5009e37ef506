"""The dense bit stream, pinned byte by byte, and the layout that integer GEMMs read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erq_kernels.formats import (
    K_ALIGN,
    center,
    code_offset,
    gemm_operands,
    k_order,
    pack,
    packed_size,
    unpack,
)

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@given(bits=st.integers(1, 8), shape=SHAPES, seed=st.integers(0, 999))
def test_unpack_inverts_pack(bits: int, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(codes.numel(), bits),)
    back = unpack(packed, bits, shape)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_largest_codes_fill_the_stream(bits: int, count: int) -> None:
    packed = pack(torch.full((count,), 2**bits - 1), bits)
    total = sum(int(b) << (8 * i) for i, b in enumerate(packed.tolist()))
    assert total == (1 << (bits * count)) - 1  # and the unused bits of the last byte are 0


# Code i starts at bit i·bits of the stream, its least significant bit first.
BYTES = [
    (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b1000_0001, 0b0000_0001]),
    (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    (4, [1, 2, 15], [0x21, 0x0F]),
    (5, [31, 0, 1], [0b000_11111, 0b0_00001_00]),
    (6, [1, 2, 3, 4], [0b10_000001, 0b0011_0000, 0b000100_00]),
    (7, [127, 1], [0b1_1111111, 0b00_000000]),
    (8, [255, 0, 7], [255, 0, 7]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), BYTES)
def test_layout_of_the_stream(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack(torch.tensor(codes), bits).tolist() == expected
    packed = torch.tensor(expected, dtype=torch.uint8)
    assert unpack(packed, bits, (len(codes),)).tolist() == codes


def test_rows_follow_each_other_without_padding() -> None:
    codes = torch.arange(6).reshape(2, 3)
    assert torch.equal(pack(codes, 3), pack(codes.flatten(), 3))
    assert torch.equal(pack(codes.t(), 3), pack(codes.t().flatten(), 3))


@pytest.mark.parametrize("bad", [-1, 8])
def test_pack_refuses_a_code_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=r"codes of 3 bits must lie in 0\.\.7, got"):
        pack(torch.tensor([3, bad]), 3)


@pytest.mark.parametrize(
    "packed", [torch.zeros(3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)]
)
def test_unpack_refuses_a_stream_that_does_not_fit(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"8 codes of 4 bits take 4 bytes \(uint8\), got"):
        unpack(packed, 4, (2, 4))


def test_offset_makes_eight_bits_fit_int8() -> None:
    assert [code_offset(b) for b in range(2, 9)] == [0] * 6 + [128]


def test_natural_order_needs_no_permutation() -> None:
    assert k_order(None, 3 * K_ALIGN) == (None, None, 3 * K_ALIGN)


@pytest.mark.parametrize("k", [2, 31, 33, 70, 96])
@pytest.mark.parametrize("share", [0, 1, 0.5])
def test_order_puts_outlier_columns_first_and_pads_both_segments(k: int, share: float) -> None:
    columns = torch.randperm(k)[: min(int(share * k) or 1, k - 1)].sort().values
    rest = torch.tensor([c for c in range(k) if c not in columns.tolist()])
    order, real, split = k_order(columns, k)
    assert order is not None
    assert real is not None
    assert split % K_ALIGN == len(order) % K_ALIGN == 0
    assert len(order) < k + 2 * K_ALIGN
    assert order[:split][real[:split]].tolist() == columns.tolist()
    assert order[split:][real[split:]].tolist() == rest.tolist()
    # Padding reads some existing channel.
    assert int(order.min()) >= 0
    assert int(order.max()) < k


def test_order_without_outliers_only_pads() -> None:
    order, real, split = k_order(None, 33)
    assert order is not None
    assert real is not None
    assert split == len(order) == 64
    assert order[real].tolist() == list(range(33))


def test_operands_by_hand() -> None:
    codes = torch.tensor([[0, 15, 7, 3], [1, 2, 3, 4]], dtype=torch.uint8)
    zero_point = torch.tensor([7, -1], dtype=torch.int32)
    plain = gemm_operands(
        center(codes, 4, zero_point),
        4,
        torch.tensor([0.5, 2.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor(0.25),
        torch.tensor(3, dtype=torch.int32),
        4,
    )
    assert plain.weight.dtype == torch.int8
    assert plain.weight[:, :4].tolist() == [[-7, 8, 0, -4], [2, 3, 4, 5]]
    assert not plain.weight[:, 4:].any()
    assert plain.scale.tolist() == [0.125, 0.5]
    assert plain.scale2 is None
    assert plain.split == plain.weight.shape[1]
    # bias − z_x · s_x · s_w · Σ_k w'
    assert plain.bias.tolist() == [1 + 3 * 0.125 * 3, -1 - 3 * 0.5 * 14]

    columns = torch.tensor([2])
    dual = gemm_operands(
        center(codes, 4, zero_point, torch.tensor([1, 2], dtype=torch.int32), columns),
        4,
        torch.tensor([0.5, 2.0]),
        None,
        torch.tensor(0.25),
        torch.tensor(130, dtype=torch.int32),
        8,
        torch.tensor([4.0, 8.0]),
        columns,
    )
    first, second = dual.weight[:, : dual.split], dual.weight[:, dual.split :]
    assert first[:, :1].tolist() == [[6], [1]]
    assert second[:, :3].tolist() == [[-7, 8, -4], [2, 3, 5]]
    assert not first[:, 1:].any()
    assert not second[:, 3:].any()
    assert dual.scale.tolist() == [1.0, 2.0]
    assert dual.scale2 is not None
    assert dual.scale2.tolist() == [0.125, 0.5]
    # 8-bit codes are stored less 128, so the zero point that is left is 2.
    assert dual.bias.tolist() == [-2 * (6 - 3 * 0.125), -2 * (2 + 10 * 0.5)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_far_off_are_fine_as_long_as_the_codes_allow(bits: int) -> None:
    codes = torch.tensor([[0, 1], [2**bits - 2, 2**bits - 1]], dtype=torch.uint8)
    zero_point = torch.tensor([-126, 2**bits + 126], dtype=torch.int32)
    assert center(codes, bits, zero_point)[:, :2].tolist() == [[126, 127], [-128, -127]]
    zero_point[1] += 1
    with pytest.raises(ValueError, match=r"^zero_point: .* must fit int8 .*, got -129\.\.127"):
        center(codes, bits, zero_point)


@pytest.mark.parametrize("zero_point", [-113, 129])
def test_operands_refuse_what_int8_cannot_hold(zero_point: int) -> None:
    codes = torch.tensor([[0, 15]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"must fit int8 \(−128\.\.127\), got"):
        center(codes, 4, torch.tensor([zero_point], dtype=torch.int32))

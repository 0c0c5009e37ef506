"""Sums of chunks from several ranks: in which order they are made, and that nothing is lost.

Ranks that exchange through memory stand in for processes; those are in tests/test_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from erq.quant import AffineParams
from erq.ranks import Ranks
from erq.reduce.gram import Gram
from erq.reduce.shared_gram import SharedGram

CPU = torch.device("cpu")


class Board:
    """Where threads that stand for ranks leave what they exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=60)
        self.held: dict[int, Any] = {}


class ThreadRanks(Ranks):
    """Ranks in threads of one process."""

    def __init__(self, rank: int, size: int, board: Board) -> None:
        super().__init__(rank, size)
        self.board = board

    def exchange(self, value: Any) -> list[Any]:
        self.board.held[self.rank] = value
        self.board.barrier.wait()
        found = [self.board.held[r] for r in range(self.size)]
        self.board.barrier.wait()
        return found

    def deal(self, flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(v.split(self.pieces(len(flat)))[self.rank] for v in self.exchange(flat))

    def in_order(self, own: Mapping[int, Tensor], take: Callable[[Tensor], None]) -> None:
        parts = {n: t for held in self.exchange(dict(own)) for n, t in held.items()}
        for number in sorted(parts) if self.first else ():
            take(parts[number])


def chunks(count: int) -> list[tuple[Tensor, Tensor]]:
    # So different that fp64 rounds the sums, and another order gives other bits.
    scales = [1000.0 ** (i % 5 - 2) for i in range(count)]
    return [(torch.randn(7, 5) * s, torch.randn(7, 5) * s) for s in scales]


def shared(
    parts: list[tuple[Tensor, Tensor]],
    size: int,
    params: AffineParams | None,
    weight: Tensor | None = None,
) -> Gram:
    """The first rank's sums."""
    board, found = Board(size), dict[int, Gram]()

    def work(rank: int) -> None:
        ranks = ThreadRanks(rank, size, board)
        gram = SharedGram(5, CPU, ranks, len(parts), weight)
        for x, upstream in parts[rank::size]:
            gram.add(x, upstream, params)
        found[rank] = gram.whole()

    threads = [Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("count", [1, 5, 6])
@pytest.mark.parametrize("narrow", [True, False])
def test_sums_are_those_of_one_process(
    size: int, quantized: bool, count: int, narrow: bool, affine: Callable[..., AffineParams]
) -> None:
    weight = torch.randn(3, 5) if narrow else None
    params = affine(0.3, 7) if quantized else None
    parts = chunks(count)
    alone = Gram(5, CPU, weight)
    for x, upstream in parts:
        alone.add(x, upstream, params)
    gram = shared(parts, size, params, weight)
    assert gram.rows == alone.rows == 7 * count
    for matrix, expected in ((gram.g, alone.g), (gram.c, alone.c), (gram.p, alone.p)):
        assert torch.equal(matrix, expected)


def test_another_order_would_be_seen() -> None:
    parts = chunks(6)
    first, last = Gram(5, CPU), Gram(5, CPU)
    for x, upstream in parts:
        first.add(x, upstream, None)
    for x, upstream in reversed(parts):
        last.add(x, upstream, None)
    assert not torch.equal(first.p, last.p)
    torch.testing.assert_close(first.p, last.p, rtol=1e-12, atol=1.0)

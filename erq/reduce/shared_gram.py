"""Gram matrices of chunks that several ranks hold: the same sums, bit for bit, as one process's.

One process adds chunk after chunk to its matrices. Here every round brings one chunk per rank; the
ranks swap pieces of their chunks' matrices so that each holds the same places of all of them, and
adds these in the order of the chunks. Addition by addition that is what one process does, at the
price of every chunk's matrices once over the wire; a plain all-reduce would add in another order.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from erq.quant import AffineParams
from erq.ranks import Ranks
from erq.reduce.gram import Gram

# What a chunk's g, c and p need on the wire: c and p come out of fp32 products, g does not.
WIRE = (torch.float64, torch.float32, torch.float32)


class SharedGram:
    """Sums over the rows of all ranks.

    Args:
        columns, weight: as in `Gram`.
        parts: number of chunks in all, chunk i being part i of `ranks`.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device,
        ranks: Ranks,
        parts: int,
        weight: Tensor | None = None,
    ) -> None:
        self._empty = partial(Gram, columns, device, weight)
        self._ranks = ranks
        self._rounds = ranks.rounds(parts)
        self._sums = [
            torch.zeros(ranks.pieces(m.numel())[ranks.rank], dtype=m.dtype, device=device)
            for m in self._matrices(Gram(columns, torch.device("meta"), weight))
        ]

    def add(self, x: Tensor, upstream: Tensor | None, params: AffineParams | None) -> None:
        """Add the next chunk of every rank; arguments as in `Gram.add`."""
        part = self._empty()
        part.add(x, upstream, params)
        self._swap(part)

    def whole(self) -> Gram:
        """The sums, on the first rank; elsewhere a matrix of zeros. To be called once."""
        while self._rounds:  # a rank that has one chunk less than the first
            self._swap(self._empty())
        gram = self._empty()
        for total, matrix in zip(self._sums, self._matrices(gram), strict=True):
            pieces: list[Tensor] = []
            self._ranks.in_order({self._ranks.rank: total}, pieces.append)
            if self._ranks.first:
                matrix.copy_(torch.cat(pieces).reshape(matrix.shape))
        gram.rows = int(gram.g[-1, -1])  # the constant input times itself
        return gram

    def _swap(self, part: Gram) -> None:
        for total, matrix, wire in zip(self._sums, self._matrices(part), WIRE, strict=True):
            for piece in self._ranks.deal(matrix.flatten().to(wire)):
                total += piece
        self._rounds -= 1

    @staticmethod
    def _matrices(gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
        return gram.g, gram.c, gram.p

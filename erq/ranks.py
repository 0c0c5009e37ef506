"""The ranks of a run: processes, one per GPU or CPU, that torchrun started, and what they exchange.

Images are dealt out in numbered parts, part i to rank i mod size. Sums over parts are taken in the
order of their numbers, and what one rank decides it tells the others, so that a run gives the same
codes on any number of ranks (docs/distributed.md).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

TIMEOUT_VARIABLE = "ERQ_RANK_TIMEOUT"
"""Environment variable: seconds after which a rank that does not answer ends the run."""

_TIMEOUT_S = 1800.0


class RankError(RuntimeError):
    """Another rank of the run ended, or does not answer in time."""


class Ranks:
    """The processes of one run as this one sees them; by default it is alone.

    Every method that exchanges something must be called by all ranks, in the same order.

    Args:
        rank: number of this process, 0 the first. size: how many there are; above 1 a default
            process group of torch.distributed with these two numbers must be there.
        timeout_s: the group's timeout in s, for messages.
        store: torch's, by which ranks agree on who reports a failure; without one every rank does.

    Attributes:
        sent_bytes: bytes of tensors that this rank has sent so far. told_bytes: of shared values.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        timeout_s: float = _TIMEOUT_S,
        store: Any = None,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to size − 1 = {size - 1}, got {rank}")
        self.rank = rank
        self.size = size
        self.sent_bytes = self.told_bytes = 0
        self._timeout_s = timeout_s
        self._store = store

    @property
    def alone(self) -> bool:
        """Whether this process is the only one."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides, prints and writes."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether part `number` is this rank's."""
        return number % self.size == self.rank

    def rounds(self, parts: int) -> int:
        """How many of `parts` parts the first rank has: the most that a rank has."""
        return -(-parts // self.size)

    def merge(self, own: Mapping[int, T]) -> dict[int, T]:
        """Small picklable values of all ranks, by the number of their part, in its order."""
        if self.alone:
            return dict(sorted(own.items()))
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, dict(own))
        return dict(sorted(item for values in found for item in values.items()))

    def share(self, compute: Callable[[], bytes]) -> bytes:
        """What `compute` gives on the first rank, which alone calls it; on every rank."""
        if self.alone:
            return compute()
        value = [compute() if self.first else b""]
        with self._answered():
            dist.broadcast_object_list(value, src=0)
        if self.first:
            self.told_bytes += len(value[0]) * (self.size - 1)
        return value[0]

    def in_order(self, own: Mapping[int, Tensor], take: Callable[[Tensor], None]) -> None:
        """Give all ranks' tensors to `take` on the first rank, by the number of their part.

        Args:
            own: this rank's tensors; one at a time of the others' is in the first rank's memory.
        """
        if self.alone:
            for _, part in sorted(own.items()):
                take(part)
            return
        device = next((t.device for t in own.values()), torch.device("cpu"))
        shapes = self.merge({n: (self.rank, t.shape, t.dtype) for n, t in own.items()})
        for number, (owner, shape, dtype) in shapes.items():
            if owner == self.rank:
                part = own[number].contiguous()
                if not self.first:
                    self._send(part)
            elif self.first:
                part = torch.empty(shape, dtype=dtype, device=device)
                with self._answered():
                    dist.recv(part, src=owner)
            if self.first:
                take(part)

    def deal(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Cut every rank's vector [n] into `size` pieces and give the k-th ones to rank k.

        Returns:
            The pieces that are this rank's, from rank 0, 1, …: the same places of every vector.
        """
        if self.alone:
            return (flat,)
        lengths = self.pieces(len(flat))
        mine = lengths[self.rank]
        out = torch.empty(self.size * mine, dtype=flat.dtype, device=flat.device)
        with self._answered():
            dist.all_to_all_single(out, flat, [mine] * self.size, lengths)
        self.sent_bytes += (len(flat) - mine) * flat.element_size()
        return out.split(mine) if mine else (out,) * self.size

    def pieces(self, length: int) -> list[int]:
        """Lengths of the pieces that `deal` cuts a vector of `length` into."""
        ends = [length * k // self.size for k in range(self.size + 1)]
        return [b - a for a, b in pairwise(ends)]

    def reports_failure(self) -> bool:
        """Whether this rank is the one to say why the run fails: the first to ask, once.

        The rank with the cause asks before it ends, hence before the others notice.
        """
        if self._store is None:
            return True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is said now is the reason for it
        try:
            return bool(self._store.add("erq/failures", 1) == 1)
        except RuntimeError:  # the store went down with the rank that kept it
            return True

    def _send(self, part: Tensor) -> None:
        with self._answered():
            dist.send(part, dst=0)
        self.sent_bytes += part.numel() * part.element_size()

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Turns what torch raises when a rank is gone into one sentence."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].removesuffix(".")
            raise RankError(
                f"another of the {self.size} ranks ended or did not answer within "
                f"{self._timeout_s:g} s, so the run ends and writes nothing ({reason}); look for "
                f"that rank's own message, or raise {TIMEOUT_VARIABLE} if it was only slow"
            ) from error


ALONE = Ranks()
"""A run of one process."""


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


@contextmanager
def launched(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, ALONE without it; they part at the end of the context.

    Args:
        device: cpu: Gloo. cuda: NCCL, and every rank computes on the GPU of its local rank, which
            becomes torch's current one.

    Raises:
        ValueError: fewer GPUs than ranks on this machine, or a timeout that is no number.
        RankError: the ranks do not find each other.
    """
    if not is_launched():
        yield ALONE
        return
    text = os.environ.get(TIMEOUT_VARIABLE) or str(_TIMEOUT_S)
    try:
        timeout = timedelta(seconds=float(text))
    except ValueError as error:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of seconds, got {text!r}") from error
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(
                f"several ranks take one GPU each, got {device}: name the device cuda, and choose "
                "GPUs by CUDA_VISIBLE_DEVICES"
            )
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"rank {local} of this machine has no GPU of its own, torch sees "
                f"{torch.cuda.device_count()}: start as many ranks as there are GPUs"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankError(f"the ranks of this run do not find each other ({reason})") from error
    ranks = Ranks(rank, size, timeout.total_seconds(), store)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield ranks
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _end(number: int, frame: FrameType | None) -> None:
    """torchrun asks the remaining ranks to end as soon as one has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise RankError(
        "this rank was asked to end (SIGTERM): another one failed, or the job was cancelled; "
        "nothing is written"
    )

"""Which backend runs an op: a table of op × backend, an order, and reasons.

A backend is chosen per call. An explicit `backend=` argument wins over `use(...)`, that over the
environment variable ERQ_BACKEND, that over `auto`: the first backend of ORDER that can take the
arguments. A forced backend that cannot run raises with its reason; nothing falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

ORDER = ("cuda", "triton", "cpu", "reference")
BACKENDS = ("auto", *ORDER)

_forced: ContextVar[str | None] = ContextVar("erq_backend", default=None)


class BackendError(RuntimeError):
    """No backend, or not the forced one, can run an op; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    Args:
        run: takes the op's arguments.
        why_not: takes the same arguments; the reason it cannot run them, or None.
        rather_not: takes the same arguments; the reason `auto` leaves them to another backend
            although this one can run them, or None.
    """

    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    rather_not: Callable[..., str | None] = lambda *_, **__: None


_kernels: dict[tuple[str, str], Kernel] = {}


def register(op: str, backend: str, *functions: Callable[..., Any]) -> None:
    """Add an implementation of `op` to the table: run, why_not and, where it has one,
    rather_not.
    """
    _kernels[op, backend] = Kernel(*functions)


def check_backend(name: str) -> str:
    """Return `name` if it is a known backend or `auto`; raise ValueError otherwise."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force `backend` for every op called inside the context; `auto` lifts an outer force."""
    token = _forced.set(check_backend(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def chosen(backend: str = "auto") -> str:
    """The backend in force for a call that asks for `backend`."""
    if check_backend(backend) != "auto":
        return backend
    forced = _forced.get()
    if forced is not None:
        return forced
    return check_backend(os.environ.get("ERQ_BACKEND") or "auto")


def why_not(op: str, backend: str, *args: Any, **kwargs: Any) -> str | None:
    """The reason `backend` cannot run `op` with these arguments, or None if it can."""
    kernel = _kernels.get((op, backend))
    if kernel is None:
        return "this build has no such kernel"
    return kernel.why_not(*args, **kwargs)


def explain(op: str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """For each backend "usable", or the reason it cannot run `op` with these arguments.

    Where it can, but `auto` leaves it to another: "usable, not by auto: " and why.

    Raises:
        ValueError: an unknown op.
    """
    known = sorted({name for name, _ in _kernels})
    if op not in known:
        raise ValueError(f"unknown op {op!r}; choose one of {', '.join(known)}")
    found = {}
    for b in ORDER:
        reason = why_not(op, b, *args, **kwargs)
        if reason is None:
            rather_not = _kernels[op, b].rather_not(*args, **kwargs)
            reason = f"usable, not by auto: {rather_not}" if rather_not else "usable"
        found[b] = reason
    return found


def select(op: str, backend: str, *args: Any, **kwargs: Any) -> str:
    """Name of the backend that runs `op` with these arguments.

    Raises:
        BackendError: none can, or the forced one cannot; with the reason of each.
    """
    wanted = chosen(backend)
    reasons = {}
    for candidate in ORDER if wanted == "auto" else (wanted,):
        reason = why_not(op, candidate, *args, **kwargs)
        if reason is None and wanted == "auto":
            reason = _kernels[op, candidate].rather_not(*args, **kwargs)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    detail = "; ".join(f"{b}: {r}" for b, r in reasons.items())
    raise BackendError(f"no backend can run {op} as asked ({detail})")


def call(op: str, backend: str, *args: Any) -> Any:
    """Run `op` on the selected backend."""
    return _kernels[op, select(op, backend, *args)].run(*args)

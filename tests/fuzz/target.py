"""What a fuzz target is, and what it may come to."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

MESSAGE_LENGTH = 2000
"""An error that a person is to read is no longer than that."""


class Finding(AssertionError):
    """What went wrong in a case: no other way to say it than in words."""


class Target(ABC):
    """A way into erq. A case is bytes that `make` invents; `check` feeds them in and judges."""

    name: str

    @abstractmethod
    def make(self, rng: random.Random) -> bytes:
        """A case; nothing but `rng` decides it."""

    @abstractmethod
    def check(self, case: bytes) -> str:
        """What the case came to, in a few words: "accepted …" or "refused …".

        Raises:
            Finding: a wrong answer. Exception: whatever erq let through.
        """


def refusal(error: Exception, start: str = "") -> str:
    """`error` as the outcome of a case: its text without what varies.

    Raises:
        Finding: a text that is empty, too long, or does not begin with `start`.
    """
    message = str(error)
    require(message.strip() != "", f"{type(error).__name__} without a text")
    require(len(message) <= MESSAGE_LENGTH, f"a message of {len(message)} characters")
    require(message.startswith(start), f"the message does not begin with {start}: {message[:200]}")
    words = [w for w in message.removeprefix(start).split() if w.isalpha()]
    return f"refused {type(error).__name__}: {' '.join(words[:5])}"


def require(condition: bool, message: str) -> None:
    """Raise Finding with `message` unless `condition` holds."""
    if not condition:
        raise Finding(message)


def attempt(run: Callable[[], Any], *allowed: type[Exception], start: str = "") -> tuple[Any, str]:
    """(what `run` gives, "") or (None, the outcome of a refusal); anything else is raised."""
    try:
        return run(), ""
    except allowed as error:
        return None, refusal(error, start)

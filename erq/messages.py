"""How messages show values, which may come from a hostile file."""

from __future__ import annotations

from typing import Any

_SHOWN = 120
"""Characters of a value that a message repeats."""


def shown(value: Any) -> str:
    """`value` as messages repeat it: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; a list in lists in …
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def megabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e6:.2f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"

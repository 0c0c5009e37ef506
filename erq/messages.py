"""How messages show values, which may come from a hostile file."""

from __future__ import annotations

import reprlib
from typing import Any

_SHOWN = 120
"""Characters of a value that a message repeats."""

# Bounded on every level: the whole of a list of long texts would take minutes and gigabytes.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _SHOWN
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 8


def shown(value: Any) -> str:
    """`value` as messages repeat it: short, whatever it is."""
    try:
        text = _REPR.repr(value)
    except Exception:  # an int of thousands of digits, or whatever an object's own repr raises
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def megabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e6:.2f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"

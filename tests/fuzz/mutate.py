"""Hostile bytes, JSON trees and texts, from a source of randomness that decides everything."""

from __future__ import annotations

import copy
import math
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

INTEGERS = (
    -(2**63) - 1, -(2**63), -(2**31), -129, -1, 0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 127, 128, 255, 256,
    65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
)  # fmt: skip
FLOATS = (
    math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 0.5, -1.0, 1.5, 4.0, 1e-45, 1e-38, 1e-30, 1e30,
    3.4e38, 1e39, 1e308, -1e308, 5e-324,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\n", "a\nb", "[/bold]", "[red]", "<script>", "%s", "{}", "../..", "nan", "None",
    "true", "é", "名", "\ud800", "\x1b[31m", "x" * 300, "y" * 100_000,
    "w4a4", "w" + "9" * 5000 + "a4",
    "w４a４", "affine", "dual", "log_sqrt2", "linear", "conv", "matmul_qk", "matmul_av", "timm_vit",
    "timm_swin", "timm_features", "torchvision_vit", "float", "quantized", "official", "greedy",
    "bicubic", "bilinear", "random", "center", "squash", "border", "blocks.0.attn.qkv", "head", "*",
    "[", "[!", "gelu", "gelu_tanh", "silu", "avg", "token", "map", "none", "erq", "rtn",
    "LayerNorm",
)  # fmt: skip


def scalar(rng: random.Random) -> Any:
    """None, a boolean, a number or a text."""
    kind = rng.randrange(6)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind == 2:
        return rng.choice(INTEGERS)
    if kind == 3:
        return rng.choice(FLOATS)
    if kind == 4:
        return rng.choice(TEXTS)
    return rng.choice((rng.randint(-4, 70), rng.uniform(-4, 4), 10 ** rng.uniform(-40, 40)))


def value(rng: random.Random) -> Any:
    """A JSON value; now and then a deep one or a long one."""
    kind = rng.randrange(12)
    if kind == 0:
        return [scalar(rng) for _ in range(rng.randrange(4))]
    if kind == 1:
        return {rng.choice(TEXTS): scalar(rng) for _ in range(rng.randrange(3))}
    if kind == 2 and rng.random() < 0.2:
        deep: Any = scalar(rng)
        for _ in range(rng.choice((3, 50, 300))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 3 and rng.random() < 0.1:
        item = scalar(rng)
        long = isinstance(item, str) and len(item) > 100
        return [item] * (1000 if long else rng.choice((1000, 20_000)))
    return scalar(rng)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a tree of dicts and lists but its root."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, child in items:
        yield (*path, key)
        yield from paths(child, (*path, key))


def tree(rng: random.Random, original: Any, skip: Sequence[str] = ()) -> Any:
    """`original` with one to three changes: values replaced, dropped, moved, renamed, nudged.

    Args:
        skip: keys of the root that stay as they are.
    """
    changed = copy.deepcopy(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        top = [k for k in changed if k not in skip] if isinstance(changed, dict) else []
        if not top:
            return changed
        # First a field of the root, then a place in it: large fields are not hit more often.
        first = rng.choice(top)
        places = [(first,), *((first, *p) for p in paths(changed[first]))]
        path = rng.choice(places)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        _change(rng, changed, owner, path[-1])
    return changed


def _change(rng: random.Random, root: Any, owner: Any, key: Any) -> None:
    old = owner[key]
    kind = rng.randrange(10)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice((*TEXTS, f"{key}x", *map(str, owner)))] = owner.pop(key)
    elif kind == 2 and isinstance(owner, dict):
        owner[rng.choice(TEXTS)] = copy.deepcopy(old)
    elif kind == 3:
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        owner[key] = copy.deepcopy(owner[rng.choice(keys)])
    elif kind == 4 and type(old) in (int, float) and abs(old) < 1e300:
        owner[key] = rng.choice((old + 1, old - 1, -old, old * 2, float(old), str(old)))
    elif kind == 5:
        owner[key] = rng.choice(([old], {"a": old}, [old, old]))
    elif kind == 6 and isinstance(old, list) and old:
        owner[key] = rng.choice((old[:-1], old + old, old[::-1], []))
    else:
        owner[key] = value(rng)


_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x5B, 0x7B, 0x7D)


def data(rng: random.Random, original: bytes, others: Sequence[bytes] = ()) -> bytes:
    """`original` with one to four changes: bits, bytes, numbers, stretches, length, a splice."""
    out = bytearray(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        kind = rng.randrange(11)
        n = len(out)
        if kind == 8:
            out = out[: rng.randrange(n + 1)]
            continue
        # Half of the changes hit the first bytes: lengths, magic numbers, tables.
        at = rng.randrange(min(n, 64) if n and rng.random() < 0.5 else n) if n else 0
        stretch = rng.choice((1, 2, 3, 4, 8, 16, 64, 257, 1024))
        if kind <= 1 and n:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and n:
            out[at] = rng.choice(_INTERESTING)
        elif kind == 3:
            out[at:at] = bytes(rng.getrandbits(8) for _ in range(min(stretch, 16)))
        elif kind == 4:
            del out[at : at + stretch]
        elif kind == 5:
            out[at:at] = out[at : at + stretch]
        elif kind == 6:
            out[at : at + stretch] = bytes(len(out[at : at + stretch]))
        elif kind == 7:
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            size = struct.calcsize(form)
            number = rng.choice(INTEGERS) & (256**size - 1)
            out[at : at + size] = struct.pack(form, number)
        elif kind == 9 and others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + stretch] = other[start : start + stretch]
        elif kind == 10:
            out += bytes(rng.getrandbits(8) for _ in range(rng.choice((1, 8, 100))))
    return bytes(out)


def text(rng: random.Random, original: str) -> str:
    """`original` with one to three changes of characters or stretches."""
    out = original
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            out = out[:at] + out[at + rng.choice((1, 3)) :]
        elif kind == 1:
            out = out[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) + out[at:]
        elif kind == 2:
            out = out[:at] + rng.choice(TEXTS)[:400] + out[at:]
        elif kind == 3:
            out = out[:at] + str(rng.choice((*INTEGERS, *FLOATS))) + out[at:]
        elif kind == 4:
            out = out[:at] + rng.choice(".=,:*[](){}'\"\\-+eE_ x") + out[at + 1 :]
        else:
            out = out[:at] + out[:at]
    return out

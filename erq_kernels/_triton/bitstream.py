"""Codes cut out of a dense bit stream (`formats.pack`) in registers.

A unit is the least number of codes that fills whole 32-bit words. It is loaded as words, and each
code of it is cut out by a constant shift; codes of 3, 5, 6 and 7 bits cross from one word into the
next.
"""

from math import gcd

import triton
import triton.language as tl


def unit_of(bits: int) -> int:
    """Codes of a unit."""
    return 32 // gcd(bits, 32)


@triton.jit
def _cut(words, base, INDEX: tl.constexpr, BITS: tl.constexpr):
    """base | code INDEX of a unit."""
    word: tl.constexpr = INDEX * BITS // 32
    shift: tl.constexpr = INDEX * BITS % 32
    code = words[word] >> shift
    if shift + BITS > 32:
        code = code | (words[word + 1] << (32 - shift))
    return (code & (2**BITS - 1)) | base


@triton.jit
def _cut_every(
    words, base, FIRST: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, BITS: tl.constexpr
):
    """Codes FIRST, FIRST + STEP, … of a unit, side by side in the last dimension."""
    if STEP == UNIT:
        return _cut(words, base, FIRST, BITS)
    else:
        return tl.interleave(
            _cut_every(words, base, FIRST, 2 * STEP, UNIT, BITS),
            _cut_every(words, base, FIRST + STEP, 2 * STEP, UNIT, BITS),
        )


@triton.jit
def codes_of_words(
    packed, rows, start, units, base, BITS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """uint32 base | code [rows, BLOCK_K] of columns start…, a whole number of units.

    packed is int32 words, `units` units a row; base has bits above a code's only. Without EVEN,
    columns beyond the row are read as 0.
    """
    per_unit: tl.constexpr = UNIT * BITS // 32
    unit = start // UNIT + tl.arange(0, BLOCK_K // UNIT)
    row = rows.to(tl.int64)[:, None] * units
    first = packed + (row + unit[None, :]) * per_unit
    words = ()
    for i in tl.static_range(per_unit):
        if EVEN:
            word = tl.load(first + i)  # [rows, BLOCK_K / UNIT]
        else:
            word = tl.load(first + i, mask=(unit < units)[None, :], other=0)
        word = word.to(tl.uint32, bitcast=True)
        words = words + (word,)  # type: ignore[assignment]  # noqa: RUF005
    return _cut_every(words, base, 0, 1, UNIT, BITS)

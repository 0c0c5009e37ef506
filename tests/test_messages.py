"""Values in messages are short, and cost little, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest

from erq.messages import shown


class Counted:
    """Counts how often it is shown."""

    shows = 0

    def __repr__(self) -> str:
        Counted.shows += 1
        return "counted"


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [0.5, None, "w4a4", [1, "a"], {"a": 4}, (2, 3), True, -7])
def test_short_values_are_shown_as_they_are(value: Any) -> None:
    assert shown(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    ["y" * 100_000, ["y" * 1000] * 1000, nested(100_000), 10**10_000, {i: i for i in range(9999)},
     Unspeakable(), ValueError("x" * 10_000)],
    ids=["text", "texts", "nested", "integer", "dict", "object", "error"],
)  # fmt: skip
def test_every_value_is_shown_in_a_few_words(value: Any) -> None:
    assert 0 < len(shown(value)) <= 130


def test_not_all_of_a_long_list_is_looked_at() -> None:
    shown([Counted() for _ in range(1000)])
    assert Counted.shows <= 10

"""Lists, values and names in messages: short, whatever they are about."""

import pytest

from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.messages import LONG, listed, listed_below, require_known, shown


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (50, "0, 1, 2 and 47 more")]
)
def test_lists_of_names(count: int, text: str) -> None:
    assert listed([str(number) for number in range(count)], 3) == text


def test_lists_of_lines() -> None:
    assert listed_below([]) == ""
    assert listed_below(["a", "b"], 2) == "\n  a\n  b"
    assert listed_below(["a", "b", "c"], 2) == "\n  a\n  b\n  and 1 more"


@pytest.mark.parametrize("value", ["x" * 1000, 10**1000, [1] * 1000, {1: 2}, b"x" * 1000, object()])
def test_values_are_short(value: object) -> None:
    assert len(shown(value)) <= LONG + 5


def test_unknown_names_are_answered_with_known_ones() -> None:
    with pytest.raises(UsageError, match=r"^generate: wdith: unknown, did you mean width\?; zzzz: unknown$"):
        require_known("generate", ["width", "wdith", "zzzz"], ["width", "height"])

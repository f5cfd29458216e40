"""Lists in messages."""

from collections.abc import Sequence


def listed(items: Sequence[str], shown: int = 6) -> str:
    """Return the first `shown` items in one line, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], shown=2)
        'a, b and 1 more'
    """
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def listed_below(items: Sequence[str], shown: int = 6) -> str:
    """Return the first `shown` items, each on an indented line, and how many more there are."""
    rest = len(items) - shown
    return "".join(f"\n  {item}" for item in [*items[:shown], *([f"and {rest} more"] if rest > 0 else [])])

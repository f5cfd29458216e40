r"""Weights in prompts: (words:1.2) counts more, [words] counts less.

The syntax is that of AUTOMATIC1111's web UI (`parse_prompt_attention` in its modules/prompt_parser.py).
"""

import re
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_PROMPT_CHARACTERS

STRONGER, WEAKER = 1.1, 1 / 1.1
MAX_PROMPT_WEIGHT = 10.0  # far beyond any weight that still gives an image

_SYNTAX = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | : \s* (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)) \s* \)
    | [()\[\]:\\]
    | [^()\[\]:\\]+
    """,
    re.VERBOSE,
)
_CLOSING = {")": ("(", STRONGER), "]": ("[", WEAKER)}


class WeightedText(NamedTuple):
    """A piece of a prompt without the syntax of weights, and its weight."""

    text: str
    weight: float


def parse_weights(text: str) -> tuple[WeightedText, ...]:
    r"""Split `text` into pieces with their weights; neighbours of the same weight are joined.

    | syntax            | weight                               |
    |-------------------|--------------------------------------|
    | (a)               | times 1.1                            |
    | [a]               | divided by 1.1                       |
    | (a:1.3)           | times 1.3                            |
    | ((a):2)           | nested weights are multiplied        |
    | \( \) \[ \] and \\ | the characters themselves, as text   |

    A bracket that is never closed reaches to the end of the text. A bracket that was never opened is text, and so is a
    number outside (). Three things differ from the web UI. A backslash before any other character stays; there it
    vanishes. Brackets that cancel leave exactly 1. BREAK is a word like any other.

    Raises UsageError for a weight below 0 or above 10, and for a text that `check_length` refuses.
    """
    check_length(text)
    texts: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # for each open bracket, the place in `texts` after it
    factors: list[tuple[int, int, float]] = []  # from, to, factor

    for match in _SYNTAX.finditer(text):
        found, number = match[0], match["number"]
        opening, factor = ("(", float(number)) if number else _CLOSING.get(found, ("", 1.0))
        if found in opened:
            opened[found].append(len(texts))
        elif opening and opened[opening]:
            factors.append((opened[opening].pop(), len(texts), factor))
        else:
            texts.append(match["escaped"] or found)

    factors += [(start, len(texts), factor) for opening, factor in _CLOSING.values() for start in opened[opening]]
    weights = np.ones(len(texts))
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is refused below
        for start, stop, factor in factors:
            weights[start:stop] *= factor
        rounded = weights.round(9).tolist()
    pieces = zip(texts, rounded, strict=True)
    joined = groupby(pieces, key=lambda piece: piece[1])
    parts = tuple(WeightedText("".join(one for one, _ in group), _checked(weight, text)) for weight, group in joined)
    return parts or (WeightedText("", 1.0),)


def check_length(text: str) -> None:
    """Raise UsageError for a prompt of more than MAX_PROMPT_CHARACTERS characters."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            f"{text[:30]!r}...: a prompt of {len(text)} characters; expected at most {MAX_PROMPT_CHARACTERS}"
        )


def _checked(weight: float, text: str) -> float:
    if not 0 <= weight <= MAX_PROMPT_WEIGHT:  # NaN too
        raise UsageError(
            f"{text[:60]!r}: expected weights from 0 to {MAX_PROMPT_WEIGHT:g}, found {weight:g}; lower it, "
            r"use the negative prompt for what is to be absent, or write \( \) \[ \] for brackets that are text"
        )
    return weight


def unbalanced_brackets(text: str) -> str:
    """The brackets in `text` that have no partner, in their order, such as "(" or ")["; "" when all are paired."""
    alone: list[str] = []
    for match in _SYNTAX.finditer(text):
        last = match[0][-1] if match["escaped"] is None else ""
        if last in ("(", "["):
            alone.append(last)
        elif last in _CLOSING:
            partner = _CLOSING[last][0]
            if partner in alone:
                del alone[len(alone) - 1 - alone[::-1].index(partner)]
            else:
                alone.append(last)
    return "".join(alone)

"""PEFT's patterns for modules: regular expressions for the end of a module's name, the first that matches counts.

The rule is PEFT's own (src/peft/utils/other.py, get_pattern_key): `re.match(rf"(.*\\.)?({key})$", name)`. Files come
from anywhere, so patterns whose matching might take for ever are refused before one is tried.
"""

import re
from collections.abc import Mapping
from functools import cached_property

from ...schemas.limits import MAX_PATTERN_LENGTH, MAX_PATTERN_PATHS, MAX_PATTERNS

NAME_LENGTH = 64  # of the modules' names, roughly
NEVER = float("inf")

TOKEN = re.compile(
    r"(?P<atom>\\.|\[\^?\]?(?:\\.|[^\]\\])*\])"  # an escaped character, a set of characters
    r"|(?P<open>\((?:\?(?:[:=!>]|<[=!]|P?<\w+>))?)|(?P<close>\))|(?P<or>\|)"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})|(?P<maybe>\?)|(?P<other>.)",
    re.DOTALL,
)


class Patterns:
    """Values of modules by pattern, in the order of the file."""

    def __init__(self, name: str, values: Mapping[str, float]) -> None:
        """`name` is the setting's. Raises ValueError for what is no pattern or would take too long to match."""
        self._name, self._values = name, values
        self._known: dict[str, float | None] = {}
        if len(values) > MAX_PATTERNS:
            raise ValueError(f"{name}: expected at most {MAX_PATTERNS} patterns, found {len(values)}")
        _ = self._compiled

    def value(self, module: str, default: float) -> float:
        """The value of a module; `default` where no pattern matches its name."""
        if module not in self._known:
            self._known[module] = next((value for key, value in self._compiled if key.match(module)), None)
        found = self._known[module]
        return default if found is None else found

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], float]]:
        paths, compiled = 0.0, []
        for key, value in self._values.items():
            paths += paths_of(key)
            if paths > MAX_PATTERN_PATHS or len(key) > MAX_PATTERN_LENGTH:
                raise ValueError(f"{self._name}: {key[:80]}: takes too long to match; give fewer repetitions")
            try:
                compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{self._name}: {key}: not a regular expression: {error}") from error
        return compiled


def paths_of(pattern: str) -> float:
    """An upper bound on the ways in which a matcher that tries one after another may try to match `pattern`: the sum
    over alternatives of the product over repetitions. Repeating what itself can match in several ways is without
    bound."""
    groups: list[tuple[float, float]] = []  # alternatives before, product so far; of each open group
    before, product, last = 0.0, 1.0, 1.0
    quantified = False  # whether a quantifier has just been read, so that "?" means another order and no choice
    for token in TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind == "open":
            groups.append((before, product))
            before, product = 0.0, 1.0
        elif kind == "close" and groups:
            last = before + product
            before, product = groups.pop()
            product *= last
        elif kind == "or":
            before, product = before + product, 1.0
        elif kind == "repeat":
            product = NEVER if last > 1 else product * NAME_LENGTH
        elif kind == "maybe" and not quantified:
            product *= 2
        else:
            last = 1.0
        quantified = kind in ("repeat", "maybe")
    return before + product

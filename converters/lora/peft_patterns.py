"""PEFT's patterns for modules: regular expressions for the end of a module's name, of which the first match counts.

The rule is that of PEFT (src/peft/utils/other.py, get_pattern_key): `re.match(rf"(.*\\.)?({key})$", name)`. Adapters
come from anywhere, so a pattern that might take for ever to match is refused before it is used.
"""

import re
from collections.abc import Mapping

from ...schemas.limits import MAX_PATTERN_LENGTH, MAX_PATTERN_PATHS, MAX_PATTERNS

NAME_LENGTH = 64  # characters of the modules' names, roughly
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
        """`name` is the name of the setting. Raises ValueError for patterns that are invalid or too slow to match."""
        if len(values) > MAX_PATTERNS:
            raise ValueError(f"{name}: expected at most {MAX_PATTERNS} patterns, found {len(values)}")
        self._known: dict[str, float | None] = {}
        self._compiled: list[tuple[re.Pattern[str], float]] = []
        paths = 0.0
        for key, value in values.items():
            paths += paths_of(key)
            if paths > MAX_PATTERN_PATHS or len(key) > MAX_PATTERN_LENGTH:
                raise ValueError(f"{name}: {key[:80]}: takes too long to match; give fewer repetitions")
            try:
                self._compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{name}: {key}: not a regular expression: {error}") from error

    def value(self, module: str, default: float) -> float:
        """Return the value of a module; `default` when no pattern matches its name."""
        if module not in self._known:
            self._known[module] = next((value for key, value in self._compiled if key.match(module)), None)
        found = self._known[module]
        return default if found is None else found


def paths_of(pattern: str) -> float:
    """Return an upper bound on the number of ways in which a backtracking matcher may try to match `pattern`.

    The bound is the sum over alternatives of the product over repetitions. It is infinite for a repetition of a part
    that can match in several ways itself."""
    groups: list[tuple[float, float]] = []  # for each open group: the sum of alternatives before it, its product so far
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

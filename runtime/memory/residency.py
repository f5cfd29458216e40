"""Keeps stages in memory by a policy: all stages, one at a time, or as many as fit a budget."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

from ...schemas.callbacks import ignored
from ...schemas.errors import UsageError
from ...schemas.manifest import MAIN_GRAPH
from ...schemas.stages import Stage
from ..engines.protocol import Engine, StageRunner
from .give_back import large_blocks_given_back

Key = tuple[Stage, str]  # a stage and one of its graphs

UNITS = {"": 1 << 30, "GB": 1 << 30, "GIB": 1 << 30, "MB": 1 << 20, "MIB": 1 << 20}
NAMES = ("auto", "resident", "staged")
BUDGET = re.compile(r"(\d{1,9}(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class MemoryPolicy:
    """The rule that decides which stages stay in memory.

    | name     | a stage that is not in use                                              |
    |----------|-------------------------------------------------------------------------|
    | resident | stays loaded                                                            |
    | staged   | is freed before another stage is loaded                                 |
    | budget   | is freed, the longest unused first, until the next fits into `budget` bytes |
    | auto     | as with "resident" if all stages fit into the memory here, else "staged" |

    `choose_policy.chosen_policy` turns "auto" into one of these two when a cascade is opened.
    "staged" and "budget" also load with less memory at the peak, and more slowly."""

    name: str
    budget: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "auto", "resident", "staged" or a size such as "8 GB" (of 2^30 bytes each).

        Raises UsageError for other text."""
        if text in NAMES:
            return cls(text)
        match = BUDGET.fullmatch(text.strip())
        if not match or match[2].upper() not in UNITS or not float(match[1]):
            raise UsageError(f"memory {text!r}: expected auto, resident, staged, or a size such as 8GB or 500MB")
        return cls("budget", int(float(match[1]) * UNITS[match[2].upper()]))


AUTO, RESIDENT, STAGED = map(MemoryPolicy, NAMES)


class Residency:
    """Loads stages when they are used and frees others by the policy; a stage in use is never freed."""

    def __init__(self, engine: Engine, policy: MemoryPolicy, size_of: Callable[[Stage, str], int]) -> None:
        """`size_of` gives the bytes that a graph of a stage takes once it is loaded."""
        self._engine = engine
        self.policy = policy
        self._size_of = size_of
        self.on_load: Callable[[Stage], object] = ignored  # called before a graph of a stage is loaded
        self._loaded: dict[Key, StageRunner] = {}  # in the order of their last use
        self._in_use: list[Key] = []

    @contextmanager
    def use(self, stage: Stage, graph: str = MAIN_GRAPH) -> Iterator[StageRunner]:
        """The stage's runner, in memory for as long as the context lasts."""
        key = stage, graph
        runner = self._loaded.pop(key, None)
        if runner is None:
            self._make_room(key)
            self.on_load(stage)
            with nullcontext() if self.policy == RESIDENT else large_blocks_given_back():
                runner = self._engine.load(stage, graph)
        self._loaded[key] = runner
        self._in_use.append(key)
        try:
            yield runner
        finally:
            self._in_use.remove(key)

    def close(self) -> None:
        """Free every stage; they are loaded again when used."""
        for key in list(self._loaded):
            self._free(key)

    def _make_room(self, key: Key) -> None:
        if self.policy == RESIDENT:
            return
        for old in [old for old in self._loaded if old not in self._in_use]:
            if self.policy.budget is not None and self._needed(key) <= self.policy.budget:
                return
            self._free(old)

    def _needed(self, key: Key) -> int:
        return sum(self._size_of(*each) for each in (*self._loaded, key))

    def _free(self, key: Key) -> None:
        self._loaded.pop(key).close()

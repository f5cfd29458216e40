"""The result of a bisection: the error of every part of a graph, and the faulty parts in words."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...schemas.precision import FP16_MAX, Precision
from ...schemas.stages import Stage
from .module_map import block_of

FACTOR = 8.0  # a part's error may be so many times that of the reference's module in the same precision
MOST = {Precision.FP32: np.inf, Precision.FP16: FP16_MAX, Precision.BF16: np.inf}
SHOWN = 5  # the number of faulty parts that are shown; parts after an overflow are usually wrong as well


@dataclass(frozen=True)
class PartError:
    """The error of one part of a graph, by itself and in the whole graph."""

    name: str  # the module's path; "@1" after it for a second pass
    relative_l2: float  # when the part's inputs are the reference's values
    worst_channel: float  # the largest error of a channel, relative to that channel or to a usual one if larger
    floor: float  # worst_channel of the reference's module in the graph's precision; infinite where it overflows
    limit: float  # a larger worst_channel is a fault
    max_abs: float  # largest magnitude of the reference's value
    nonfinite: int  # number of values that are NaN or infinite
    inputs: dict[str, float] = field(default_factory=dict)  # largest magnitude of each of the part's inputs, by name
    nodes: tuple[str, ...] = ()  # the names of the graph's nodes in this part
    accumulated: float | None = None  # relative L2 in the whole graph; None where it was not measured

    @property
    def faulty(self) -> bool:
        return self.nonfinite > 0 or not self.worst_channel <= self.limit

    @property
    def held_to(self) -> float:
        """The floor, or the rounding error of values and sums in the precision if that is larger."""
        return self.limit / FACTOR

    @property
    def block(self) -> str:
        return block_of(self.name)[0]

    @property
    def label(self) -> str:
        block, rest = block_of(self.name)
        return f"{block} {rest}".strip()

    def to_json(self) -> dict[str, Any]:
        figures = {name: _plain(value) for name, value in asdict(self).items() if name != "nodes"}
        return {**figures, "block": self.block, "faulty": self.faulty}


@dataclass(frozen=True)
class Bisection:
    """All parts of a stage's graph in the order they run; true when none is faulty."""

    stage: Stage
    precision: Precision
    parts: tuple[PartError, ...]
    slices: int
    note: str = ""

    def __bool__(self) -> bool:
        return not self.faulty

    @property
    def depth(self) -> tuple[PartError, ...]:
        """The parts whose accumulated error was measured."""
        return tuple(part for part in self.parts if part.accumulated is not None)

    @property
    def faulty(self) -> tuple[PartError, ...]:
        return tuple(part for part in self.parts if part.faulty)

    @property
    def first(self) -> PartError | None:
        return next(iter(self.faulty), None)

    @property
    def suspects(self) -> tuple[str, ...]:
        """The nodes of the first faulty part that no healthy part has; only those in all faulty parts, if any are."""
        if self.first is None:
            return ()
        healthy = {node for part in self.parts if not part.faulty for node in part.nodes}
        own = [node for node in self.first.nodes if node not in healthy]
        shared = [node for node in own if all(node in part.nodes for part in self.faulty)]
        return tuple(shared or own)

    def described(self) -> list[str]:
        """The result in words: a line for each of the first SHOWN faulty parts."""
        if not self.faulty:
            return [f"{self.stage}: {len(self.parts)} parts compared, none is faulty"]
        lines = [f"{self.stage}: {self._line(part)}" for part in self.faulty[:SHOWN]]
        if len(self.faulty) > SHOWN:
            lines.append(f"{self.stage}: and {len(self.faulty) - SHOWN} more parts")
        suspects = self.suspects
        more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
        return [*lines, f"{self.stage}: look at the nodes {', '.join(suspects[:3])}{more}"]

    def _line(self, part: PartError) -> str:
        line = f"{part.label}: relative L2 {part.relative_l2:.1e} by itself, worst channel {part.worst_channel:.1e}"
        usual = f"has {part.floor:.1e}" if np.isfinite(part.floor) else "overflows"
        line += f" where the reference in {self.precision} {usual}"
        parts = self.parts[: self.parts.index(part)]
        before = [other.accumulated for other in parts if other.accumulated is not None]
        if before:
            line += f"; {before[-1]:.1e} was the error before it"
        most = MOST[self.precision]
        for name, largest in {**part.inputs, part.name: part.max_abs}.items():
            if largest > most:
                line += f"; max |{name}| {largest:,.0f} > {most:,.0f} ({self.precision})".replace(",", " ")
        if part.nonfinite:
            line += f"; {part.nonfinite} values are NaN or infinite"
        ranges = ", ".join(f"{name} {largest:.3g}" for name, largest in part.inputs.items())
        return f"{line}; largest inputs: {ranges or 'those of the stage'}"

    def to_json(self) -> dict[str, Any]:
        first = self.first
        return {
            "stage": str(self.stage),
            "precision": str(self.precision),
            "passed": bool(self),
            "first": first.name if first else None,
            "suspects": list(self.suspects),
            "note": self.note,
            "slices": self.slices,
            "points": [part.to_json() for part in self.parts],
        }


def _plain(value: Any) -> Any:
    """The value as JSON has it: infinity and NaN become None."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value

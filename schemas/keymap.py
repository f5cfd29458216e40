"""Rules that turn one layout's tensor names into another's, each with its inverse.

Every rule is a rename, a cut between rows, or (for one matrix) a transposition. Applying a map computes nothing: its
result names the source rows that hold the values of each tensor of the target layout.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .errors import LayoutError
from .tensors import Shape


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` along the first axis of the source tensor `name`; all of its rows without a stop.

    `transposed` exchanges the two axes of a matrix."""

    name: str
    start: int = 0
    stop: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of the target layout: its shape, and the source rows that hold its values, one after another."""

    shape: Shape
    rows: tuple[Rows, ...]


GroupShapes = Mapping[str, Shape]  # the shapes of the source tensors that one application of a rule takes, by full name


class Rule(Protocol):
    """Turns the tensors matching `sources` into those named by `targets`; "{}" stands for a common prefix."""

    @property
    def sources(self) -> tuple[str, ...]: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def inverse(self) -> "Rule": ...
    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]: ...


@dataclass(frozen=True)
class Rename:
    """The tensor `source` is called `target` in the other layout."""

    source: str
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def inverse(self) -> "Rename":
        return Rename(self.target, self.source)

    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]:
        return {targets[0]: MappedTensor(shapes[sources[0]], (Rows(sources[0]),))}


@dataclass(frozen=True)
class SplitRows:
    """The tensor `source` is cut along its first axis into equal parts, one for each name in `targets`."""

    source: str
    targets: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def inverse(self) -> "JoinRows":
        return JoinRows(self.targets, self.source)

    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]:
        shape = shapes[sources[0]]
        if not shape or not shape[0] or shape[0] % len(targets):
            raise LayoutError(f"{sources[0]}: shape {list(shape)} cannot be cut into {len(targets)} equal parts")
        rows = shape[0] // len(targets)
        return {
            target: MappedTensor((rows, *shape[1:]), (Rows(sources[0], i * rows, (i + 1) * rows),))
            for i, target in enumerate(targets)
        }


@dataclass(frozen=True)
class JoinRows:
    """The tensors `sources` are stacked along their first axis into `target`."""

    sources: tuple[str, ...]
    target: str

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def inverse(self) -> SplitRows:
        return SplitRows(self.target, self.sources)

    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]:
        missing = [name for name in sources if name not in shapes]
        if missing:
            raise LayoutError(f"{targets[0]} needs {', '.join(missing)}, which is missing")
        shape = shapes[sources[0]]
        for name in sources:
            if shapes[name] != shape:
                raise LayoutError(f"{name}: expected shape {list(shape)} as {sources[0]}, found {list(shapes[name])}")
        parts = tuple(Rows(name) for name in sources)
        return {targets[0]: MappedTensor((shape[0] * len(sources), *shape[1:]), parts)}


@dataclass(frozen=True)
class Transpose(Rename):
    """The matrix `source` is called `target` in the other layout, where its two axes are exchanged."""

    @property
    def inverse(self) -> "Transpose":
        return Transpose(self.target, self.source)

    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]:
        shape = shapes[sources[0]]
        if len(shape) != 2:
            raise LayoutError(f"{sources[0]}: expected a matrix, found shape {list(shape)}")
        return {targets[0]: MappedTensor(shape[::-1], (Rows(sources[0], transposed=True),))}


@dataclass(frozen=True)
class Drop:
    """The target layout does not need the tensor `source`. The inverse rule drops the same tensor."""

    source: str
    targets: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def inverse(self) -> "Drop":
        return self

    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]:
        return {}


@dataclass(frozen=True)
class KeyMap:
    """A table of rules from one layout's tensor names to another's. A tensor that no rule names keeps its name."""

    rules: tuple[Rule, ...] = ()

    @cached_property
    def inverse(self) -> "KeyMap":
        return KeyMap(tuple(rule.inverse for rule in self.rules))

    @cached_property
    def _sources(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_pattern(source), rule) for rule in self.rules for source in rule.sources]

    def apply(self, shapes: Mapping[str, Shape]) -> dict[str, MappedTensor]:
        """Return every tensor of the target layout with the source rows it consists of, in the order of the sources.

        Raises LayoutError when rows cannot be cut or joined, or when two tensors would get one name."""
        mapped: dict[str, MappedTensor] = {}
        done: set[str] = set()
        for name in shapes:
            if name in done:
                continue
            group, tensors = self._apply_one(name, shapes)
            done.update(group)
            for target, tensor in tensors.items():
                if target in mapped:
                    raise LayoutError(f"{name}: the name {target} is taken already by another tensor")
                mapped[target] = tensor
        return mapped

    def _apply_one(self, name: str, shapes: Mapping[str, Shape]) -> tuple[GroupShapes, dict[str, MappedTensor]]:
        """Return the sources that the rule for `name` takes, and the tensors it maps them to."""
        for pattern, rule in self._sources:
            if match := pattern.fullmatch(name):
                prefix = match[1] if pattern.groups else ""
                sources = _fill(rule.sources, prefix)
                group = {source: shapes[source] for source in sources if source in shapes}
                return group, rule.apply(sources, _fill(rule.targets, prefix), group)
        return {name: shapes[name]}, {name: MappedTensor(shapes[name], (Rows(name),))}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("(.+)".join(re.escape(piece) for piece in template.split("{}")))


def _fill(templates: Iterable[str], prefix: str) -> list[str]:
    return [template.replace("{}", prefix) for template in templates]

"""Rules that turn one layout's tensor names into another's, each with its inverse.

Every rule is a rename, a cut between rows, or (for one matrix) a transposition. Applying a map computes nothing: its
result names the source rows that hold the values of each tensor of the target layout.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Rule:
    """Turns the tensors named `sources` into those named `targets`; "{}" stands for a common prefix.

    | sources | targets | the rule |
    |---|---|---|
    | 1 | 1 | renames the tensor; when `transposed`, a matrix whose two axes are exchanged |
    | 1 | more | cuts the tensor along its first axis into equal parts |
    | more | 1 | stacks the tensors along their first axis |
    | 1 | 0 | drops the tensor, which the target layout does not need; the inverse drops the same tensor |
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transposed: bool = False

    @property
    def inverse(self) -> "Rule":
        return Rule(self.targets, self.sources, self.transposed) if self.targets else self

    def apply(self, sources: Sequence[str], targets: Sequence[str], shapes: GroupShapes) -> dict[str, MappedTensor]:
        """Return the tensors `targets`, made of the tensors `sources`; both are the rule's names with their prefix."""
        if len(sources) > 1:
            return {targets[0]: _stacked(sources, targets[0], shapes)}
        name, shape = sources[0], shapes[sources[0]]
        if self.transposed:
            if len(shape) != 2:
                raise LayoutError(f"{name}: expected a matrix, found shape {list(shape)}")
            return {targets[0]: MappedTensor(shape[::-1], (Rows(name, transposed=True),))}
        return _parts(name, targets, shape) if len(targets) > 1 else {new: _whole(name, shape) for new in targets}


def rename(source: str, target: str) -> Rule:
    """The tensor `source` is called `target` in the other layout."""
    return Rule((source,), (target,))


def cut(source: str, *targets: str) -> Rule:
    """The tensor `source` is cut along its first axis into equal parts, which have the names `targets`."""
    return Rule((source,), targets)


def transpose(source: str, target: str) -> Rule:
    """The matrix `source` is called `target` in the other layout, where its two axes are exchanged."""
    return Rule((source,), (target,), transposed=True)


def drop(source: str) -> Rule:
    """The other layout does not need the tensor `source`."""
    return Rule((source,), ())


def _whole(name: str, shape: Shape) -> MappedTensor:
    return MappedTensor(shape, (Rows(name),))


def _parts(name: str, targets: Sequence[str], shape: Shape) -> dict[str, MappedTensor]:
    if not shape or not shape[0] or shape[0] % len(targets):
        raise LayoutError(f"{name}: shape {list(shape)} cannot be cut into {len(targets)} equal parts")
    rows = shape[0] // len(targets)
    return {
        target: MappedTensor((rows, *shape[1:]), (Rows(name, i * rows, (i + 1) * rows),))
        for i, target in enumerate(targets)
    }


def _stacked(sources: Sequence[str], target: str, shapes: GroupShapes) -> MappedTensor:
    missing = [name for name in sources if name not in shapes]
    if missing:
        raise LayoutError(f"{target} needs {', '.join(missing)}, which is missing")
    shape = shapes[sources[0]]
    for name in sources:
        if shapes[name] != shape:
            raise LayoutError(f"{name}: expected shape {list(shape)} as {sources[0]}, found {list(shapes[name])}")
    return MappedTensor((shape[0] * len(sources), *shape[1:]), tuple(Rows(name) for name in sources))


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
        return {name: shapes[name]}, {name: _whole(name, shapes[name])}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("(.+)".join(re.escape(piece) for piece in template.split("{}")))


def _fill(templates: Iterable[str], prefix: str) -> list[str]:
    return [template.replace("{}", prefix) for template in templates]

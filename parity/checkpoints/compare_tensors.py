"""Whether two checkpoints, in any layouts, hold the same tensors: value by value, memory-mapped, in two threads."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from ...converters.checkpoints.component import Component
from ...converters.checkpoints.open_model import Model
from ...schemas.callbacks import Progress
from ...schemas.errors import UsageError
from ...schemas.stages import Stage
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import DTYPE_SIZES, TensorRange
from ...storage.weights_file import read_weights
from .compare_values import Difference, MappedFiles, Pair, blocks_of, comparable, differences, read_as

THREADS = 2


class Status(StrEnum):
    """How a tensor compares. Cast: of two dtypes, and equal once the wider is rounded as torch rounds."""

    EQUAL = "equal"
    CAST = "cast"
    DIFFERING = "differing"
    SHAPE = "other shape"
    DTYPE = "other dtype"
    MISSING = "missing"  # only in what is compared against
    UNEXPECTED = "unexpected"  # only in what is compared


GOOD = (Status.EQUAL, Status.CAST)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: under which name, in which of that tensor's rows (None: all of it)."""

    file: str
    name: str
    dtype: str
    rows: tuple[int, int] | None
    transposed: bool

    def __str__(self) -> str:
        rows = f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else ""
        return self.name + rows + (" transposed" if self.transposed else "")


@dataclass(frozen=True)
class TensorMatch:
    """One tensor, by its diffusers name, in both checkpoints. `differing` values are not equal (of two dtypes: after
    the cast), by at most `max_abs` (None: not numbers that can be subtracted here), the first at index `first`."""

    stage: Stage
    name: str
    status: Status
    shape: Shape
    found: Place | None
    expected: Place | None
    differing: int = 0
    max_abs: float | None = None
    first: tuple[int, ...] | None = None
    detail: str = ""

    def __bool__(self) -> bool:
        return self.status in GOOD


@dataclass(frozen=True)
class CheckpointComparison:
    """All tensors of all stages that both hold; true when all are equal, or equal but for a cast. `layouts` are the
    two of each stage. `unmatched` stages are only in what was compared, which fails; `left_out` ones only in what it
    was compared against."""

    tensors: tuple[TensorMatch, ...]
    layouts: dict[Stage, tuple[str, str]]
    unmatched: tuple[Stage, ...]
    left_out: tuple[Stage, ...]
    nbytes: int

    def __bool__(self) -> bool:
        return bool(self.tensors) and all(self.tensors) and not self.unmatched

    @property
    def counts(self) -> dict[Status, int]:
        found = Counter(tensor.status for tensor in self.tensors)
        return {status: found[status] for status in Status}

    def to_json(self) -> dict[str, Any]:
        """Plain values; each tensor with where it lies in both."""
        return {
            "passed": bool(self),
            "counts": self.counts,
            "layouts": {stage: list(pair) for stage, pair in self.layouts.items()},
            "unmatched_stages": list(self.unmatched),
            "left_out_stages": list(self.left_out),
            "bytes": self.nbytes,
            "tensors": [_plain(tensor) for tensor in self.tensors],
        }


def compare_checkpoints(
    found: Model, expected: Model, stages: Sequence[Stage] = (), progress: Progress | None = None
) -> CheckpointComparison:
    """Compare every tensor of the stages both models hold (of `stages` alone, when given); `progress` is told of the
    bytes done, of both together.

    Values are equal when their bits are. Raises UsageError when the models share no stage, or lack a chosen one;
    CheckpointError when a file cannot be read."""
    chosen = list(stages) or [stage for stage in found.components if stage in expected.components]
    for model in (found, expected):
        absent = [stage for stage in chosen if stage not in model.components]
        if absent or not chosen:
            have = ", ".join(model.components) or "nothing"
            wanted = absent[0] if absent else "stage in common"
            raise UsageError(f"one of the two checkpoints has no {wanted}; it has {have}")
    matches: list[TensorMatch] = []
    pairs: dict[int, Pair] = {}  # by position in `matches`
    for stage in chosen:
        for match, pair in _matched(stage, found.components[stage], expected.components[stage]):
            if pair is not None:
                pairs[len(matches)] = pair
            matches.append(match)
    for index, difference in _differences(pairs, progress):
        matches[index] = _judged(matches[index], difference)
    return CheckpointComparison(
        tensors=tuple(matches),
        layouts={s: (str(found.components[s].layout), str(expected.components[s].layout)) for s in chosen},
        unmatched=() if stages else tuple(s for s in found.components if s not in chosen),
        left_out=() if stages else tuple(s for s in expected.components if s not in chosen),
        nbytes=sum(pair.found.nbytes + pair.expected.nbytes for pair in pairs.values()),
    )


def total_bytes(found: Model, expected: Model) -> int:
    """What a comparison of two models reads at most."""
    models = (found, expected)
    return sum(t.nbytes for model in models for c in model.components.values() for t in c.tensors.values())


def _matched(stage: Stage, found: Component, expected: Component) -> Iterator[tuple[TensorMatch, Pair | None]]:
    """Every tensor of a stage, and what has to be read of it; what is settled by the headers has None."""
    places = [_places(component) for component in (found, expected)]
    for name in {**expected.tensors, **found.tensors}:
        x, y = found.tensors.get(name), expected.tensors.get(name)
        pair = None
        detail = ""
        if x is None or y is None:
            status = Status.MISSING if x is None else Status.UNEXPECTED
        elif x.shape != y.shape:
            status, detail = Status.SHAPE, f"{list(x.shape)}, expected {list(y.shape)}"
        elif not comparable(x, y):
            status, detail = Status.DTYPE, f"{x.dtype}, expected {y.dtype}"
        else:
            status, pair = Status.EQUAL if read_as(x) == read_as(y) else Status.CAST, Pair(x, y)
        shape = x.shape if x is not None else y.shape if y is not None else ()
        yield TensorMatch(stage, name, status, shape, places[0].get(name), places[1].get(name), detail=detail), pair


def _places(component: Component) -> dict[str, Place]:
    """Where each tensor lies, by its diffusers name: found again in the headers by its bytes."""
    headers: dict[Path, list[tuple[int, str, TensorRange]]] = {}
    places = {}
    for name, tensor in component.tensors.items():
        if tensor.path not in headers:
            header = read_weights(tensor.path)
            headers[tensor.path] = sorted((t.offset, own, t) for own, t in header.tensors.items() if t.nbytes)
        places[name] = _place(tensor, headers[tensor.path], name)
    return places


def _place(tensor: TensorRange, known: list[tuple[int, str, TensorRange]], name: str) -> Place:
    at = bisect_right(known, tensor.offset, key=lambda item: item[0]) - 1
    if at < 0 or not tensor.nbytes:
        return Place(tensor.path.name, name, tensor.dtype, None, tensor.transposed)
    start, own, whole = known[at]
    rows = None
    if tensor.nbytes != whole.nbytes:
        row = whole.nbytes // whole.shape[0]
        rows = ((tensor.offset - start) // row, (tensor.offset - start + tensor.nbytes) // row)
    return Place(tensor.path.name, own, tensor.dtype, rows, tensor.transposed)


def _differences(pairs: Mapping[int, Pair], progress: Progress | None) -> Iterator[tuple[int, Difference]]:
    """What the values of each pair differ by, in order."""
    with MappedFiles() as files, ThreadPoolExecutor(THREADS) as pool:
        blocks = [(index, pair, span) for index, pair in pairs.items() for span in blocks_of(pair)]
        results = pool.map(lambda block: differences(files, block[1], block[2]), blocks)
        current: tuple[int, Difference] | None = None
        for (index, pair, span), difference in zip(blocks, results, strict=True):
            if current is not None and current[0] == index:
                difference = current[1].joined(difference)
            elif current is not None:
                yield current
            current = (index, difference)
            if progress:
                progress(len(span) * (DTYPE_SIZES[pair.found.dtype] + DTYPE_SIZES[pair.expected.dtype]))
        if current is not None:
            yield current


def _judged(match: TensorMatch, difference: Difference) -> TensorMatch:
    if not difference.count:
        return match
    first = tuple(map(int, np.unravel_index(difference.first, match.shape)))
    return TensorMatch(
        match.stage,
        match.name,
        Status.DIFFERING,
        match.shape,
        match.found,
        match.expected,
        difference.count,
        difference.max_abs,
        first,
    )


def _plain(tensor: TensorMatch) -> dict[str, Any]:
    return {**asdict(tensor), "found_as": str(tensor.found or ""), "expected_as": str(tensor.expected or "")}

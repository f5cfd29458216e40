"""Compares the tensors of two checkpoints in any layouts, value by value, memory-mapped and in two threads."""

from __future__ import annotations  # help() shows the types as they are written here

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...converters.checkpoints.component import Component
from ...converters.checkpoints.open_model import Model, open_model
from ...schemas.block_types import nbytes_of
from ...schemas.callbacks import Progress, StartFile
from ...schemas.choices import stages_of
from ...schemas.errors import UsageError
from ...schemas.messages import known_keywords
from ...schemas.stages import Stage
from ...schemas.tensors import Shape
from ...storage.safetensors_reader import TensorRange
from ...storage.weights_file import read_weights
from .compare_values import Difference, MappedFiles, Pair, blocks_of, comparable, differences, read_as

THREADS = 2


class Status(StrEnum):
    """The result for one tensor. CAST: dtypes differ, and values are equal once the wider are rounded as in torch."""

    EQUAL = "equal"
    CAST = "cast"
    DIFFERING = "differing"
    SHAPE = "other shape"
    DTYPE = "other dtype"
    MISSING = "missing"  # only in the expected checkpoint
    UNEXPECTED = "unexpected"  # only in the found checkpoint


GOOD = (Status.EQUAL, Status.CAST)


@dataclass(frozen=True)
class TensorLocation:
    """The place of a tensor: file, name, dtype, and its rows of the stored tensor (None for all rows)."""

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
    """One tensor, by its diffusers name, in both checkpoints.

    `differing` values are not equal, after the cast if dtypes differ. They differ by at most `max_abs`, which is None
    for dtypes whose values cannot be subtracted. `first` is the index of the first of them."""

    stage: Stage
    name: str
    status: Status
    shape: Shape
    found: TensorLocation | None
    expected: TensorLocation | None
    differing: int = 0
    max_abs: float | None = None
    first: tuple[int, ...] | None = None
    detail: str = ""

    def __bool__(self) -> bool:
        return self.status in GOOD


@dataclass(frozen=True)
class CheckpointComparison:
    """All tensors of all stages that both checkpoints have; true when all are equal, or equal after a cast.

    `layouts` are the layouts of each stage, found and expected. `unmatched` stages are in the found checkpoint alone,
    which makes the comparison fail. `left_out` stages are in the expected checkpoint alone."""

    tensors: tuple[TensorMatch, ...]
    layouts: dict[Stage, tuple[str, str]]
    unmatched: tuple[Stage, ...]
    left_out: tuple[Stage, ...]
    nbytes: int

    def __bool__(self) -> bool:
        return bool(self.tensors) and all(self.tensors) and not self.unmatched

    def __repr__(self) -> str:  # there are thousands of tensors
        counts = {str(status): count for status, count in self.counts.items() if count}
        return f"CheckpointComparison(passed={bool(self)}, counts={counts})"

    @property
    def counts(self) -> dict[Status, int]:
        found = Counter(tensor.status for tensor in self.tensors)
        return {status: found[status] for status in Status}

    def to_json(self) -> dict[str, Any]:
        """Plain values; each tensor with its location in both checkpoints."""
        return {
            "passed": bool(self),
            "counts": self.counts,
            "layouts": {stage: list(pair) for stage, pair in self.layouts.items()},
            "unmatched_stages": list(self.unmatched),
            "left_out_stages": list(self.left_out),
            "bytes": self.nbytes,
            "tensors": [_plain(tensor) for tensor in self.tensors],
        }


@known_keywords
def compare_checkpoints(
    found: str | Path | Model,
    expected: str | Path | Model,
    stages: Sequence[Stage | str] = (),
    *,
    start_file: StartFile | None = None,
) -> CheckpointComparison:
    """Compare every tensor of the stages that both checkpoints have, or of `stages` alone.

    The checkpoints may be files, folders or opened models, in any layouts. Two values are equal when their bits are.
    If dtypes differ, the wider values are rounded to the narrower dtype first. `start_file` is called with the number
    of bytes that are read from both checkpoints together.

    ```python
    result = cascadekit.compare_checkpoints("model", "original")
    assert result, [str(tensor.found) for tensor in result.tensors if not tensor]
    ```

    Raises UsageError when the checkpoints share no stage or lack a chosen one, CheckpointError when a file cannot be
    read."""
    models = [model if isinstance(model, Model) else open_model([model]) for model in (found, expected)]
    chosen = list(stages_of(stages)) or [s for s in models[0].components if s in models[1].components]
    if not chosen:
        has = " and ".join(", ".join(model.components) or "nothing" for model in models)
        raise UsageError(f"the two checkpoints have no stage in common; they have {has}")
    for model, which in zip(models, ("first", "second"), strict=True):
        if absent := [stage for stage in chosen if stage not in model.components]:
            has = ", ".join(model.components)
            raise UsageError(f"the {which} checkpoint has no {absent[0]}, only {has}; choose other stages=...")
    matches: list[TensorMatch] = []
    pairs: dict[int, Pair] = {}  # by position in `matches`
    ours, theirs = (model.components for model in models)
    for stage in chosen:
        for match, pair in _matched(stage, ours[stage], theirs[stage]):
            if pair is not None:
                pairs[len(matches)] = pair
            matches.append(match)
    nbytes = sum(pair.found.nbytes + pair.expected.nbytes for pair in pairs.values())
    progress = start_file("comparing", nbytes) if start_file else None
    for index, difference in _differences(pairs, progress):
        matches[index] = _judged(matches[index], difference)
    return CheckpointComparison(
        tensors=tuple(matches),
        layouts={s: (str(ours[s].layout), str(theirs[s].layout)) for s in chosen},
        unmatched=() if stages else tuple(s for s in ours if s not in chosen),
        left_out=() if stages else tuple(s for s in theirs if s not in chosen),
        nbytes=nbytes,
    )


def _matched(stage: Stage, found: Component, expected: Component) -> Iterator[tuple[TensorMatch, Pair | None]]:
    """Every tensor of a stage, with the pair of ranges to read; None where the headers alone decide."""
    locations = [_locations(component) for component in (found, expected)]
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
        found_at, expected_at = (each.get(name) for each in locations)
        yield TensorMatch(stage, name, status, shape, found=found_at, expected=expected_at, detail=detail), pair


def _locations(component: Component) -> dict[str, TensorLocation]:
    """The location of each tensor by its diffusers name; byte ranges in the headers identify the stored names."""
    headers: dict[Path, list[tuple[int, str, TensorRange]]] = {}
    places = {}
    for name, tensor in component.tensors.items():
        if tensor.path not in headers:
            header = read_weights(tensor.path)
            headers[tensor.path] = sorted((t.offset, own, t) for own, t in header.tensors.items() if t.nbytes)
        places[name] = _location(tensor, headers[tensor.path], name)
    return places


def _location(tensor: TensorRange, known: list[tuple[int, str, TensorRange]], name: str) -> TensorLocation:
    at = bisect_right(known, tensor.offset, key=lambda item: item[0]) - 1
    if at < 0 or not tensor.nbytes:
        return TensorLocation(tensor.path.name, name, tensor.dtype, None, tensor.transposed)
    start, own, whole = known[at]
    rows = None
    if tensor.nbytes != whole.nbytes:
        row = whole.nbytes // whole.shape[0]
        rows = ((tensor.offset - start) // row, (tensor.offset - start + tensor.nbytes) // row)
    return TensorLocation(tensor.path.name, own, tensor.dtype, rows, tensor.transposed)


def _differences(pairs: Mapping[int, Pair], progress: Progress | None) -> Iterator[tuple[int, Difference]]:
    """The difference of each pair, in order."""
    files = MappedFiles()
    with ThreadPoolExecutor(THREADS) as pool:
        blocks = [(index, pair, span) for index, pair in pairs.items() for span in blocks_of(pair)]
        results = pool.map(lambda block: differences(files, block[1], block[2]), blocks)

        def found() -> Iterator[tuple[int, Difference]]:
            for (index, pair, span), difference in zip(blocks, results, strict=True):
                if progress:
                    progress(sum(nbytes_of(tensor.dtype, len(span)) for tensor in (pair.found, pair.expected)))
                yield index, difference

        for index, parts in groupby(found(), key=lambda item: item[0]):
            yield index, reduce(Difference.joined, (difference for _, difference in parts))


def _judged(match: TensorMatch, difference: Difference) -> TensorMatch:
    if not difference.count:
        return match
    first = tuple(map(int, np.unravel_index(difference.first, match.shape)))
    return replace(
        match, status=Status.DIFFERING, differing=difference.count, max_abs=difference.max_abs, first=first, detail=""
    )


def _plain(tensor: TensorMatch) -> dict[str, Any]:
    return {**asdict(tensor), "found_as": str(tensor.found or ""), "expected_as": str(tensor.expected or "")}

"""Applies the changes of LoRAs to a checkpoint's tensors: reads, changes and rounds a block of rows at a time."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ...schemas.dtypes import FLOATS
from ...schemas.errors import ConversionError
from ...storage.atomic_file import room_advice
from ...storage.safetensors_plan import CalculatedRange, Range, TensorPlan
from ...storage.safetensors_reader import Header, TensorRange
from .adapters import Adapter
from .encoding import Array, Bytes, compute_type, decode, encode, spacing
from .factors import read_bytes, read_numbers
from .formulas import RowReader, applied, blocks
from .lora_file import Embedding

Change = Callable[[RowReader, type[np.floating]], RowReader]
Changes = Mapping[str, Sequence[Change]]  # by the tensor's diffusers name


def adapter_change(adapter: Adapter, strength: float) -> Change:
    """Return the change that an adapter makes to its weight."""
    return lambda weight, dtype: applied(weight, adapter, strength, dtype)


def embedding_change(embedding: Embedding, strength: float) -> Change:
    """Return the change that adds the embedding's rows to rows of the token table."""

    def change(weight: RowReader, dtype: type[np.floating]) -> RowReader:
        added = embedding.rows.load().astype(dtype) * dtype(strength)
        indices = np.asarray(embedding.index_values)

        def rows(start: int, stop: int) -> Array:
            result = np.array(weight(start, stop))
            here = (indices >= start) & (indices < stop)
            np.add.at(result, indices[here] - start, added[here])
            return result

        return rows

    return change


@dataclass
class Effect:
    """The effect of a merge on a tensor, complete once the tensor has been written.

    `largest_change` is that of any value. `rounding` bounds the error of a value after a merge and its undoing."""

    name: str
    dtype: str
    changes: int
    largest_change: float = 0.0
    rounding: float = 0.0


def changed(name: str, tensor: TensorRange, changes: Sequence[Change]) -> tuple[CalculatedRange, Effect]:
    """Return a range of the bytes of `tensor` with `changes` applied in their order, and a record of their effect.

    The record is complete when the range has been calculated: in float32 (float64 for F64), rounded once to nearest,
    ties to even. Raises ConversionError for values that are no floats or have scales, and during the calculation when
    a finite value becomes infinite or NaN."""
    if tensor.dtype not in FLOATS or tensor.scale:
        found = f"{tensor.dtype} with scales" if tensor.scale else tensor.dtype
        raise ConversionError(
            f"{tensor.path}: {name}: expected a dtype of {', '.join(FLOATS)}, found {found}; cast the checkpoint first"
        )
    effect = Effect(name, tensor.dtype, len(changes))
    return CalculatedRange(tensor.nbytes, lambda: _encoded(tensor, changes, effect)), effect


def _encoded(tensor: TensorRange, changes: Sequence[Change], effect: Effect) -> Iterator[Bytes]:
    dtype = compute_type(tensor.dtype)
    turned = tensor.transposed
    before = _turned_rows(tensor) if turned else _rows(tensor)
    after = before
    for change in changes:
        after = change(after, dtype)
    height, width = tensor.shape[0], math.prod(tensor.shape[1:])
    for start, stop in [(0, height)] if turned else blocks(height, width):
        old, new = before(start, stop), after(start, stop)
        data, overflows = encode(new.T if turned else new, tensor.dtype)
        if overflows or not np.isfinite(new).all():
            _require_damage_before(old, tensor, effect)
        _record(old, new, effect)
        yield data


def _rows(tensor: TensorRange) -> RowReader:
    """Return a reader of rows in the file. It keeps the last rows read, as each block is read twice."""

    @lru_cache(maxsize=1)
    def read(start: int, stop: int) -> Array:
        rows = tensor.rows(start, stop, ())
        return decode(read_bytes(rows), tensor.dtype).reshape(stop - start, -1)

    return read


def _turned_rows(tensor: TensorRange) -> RowReader:
    """Return a reader of rows of a matrix that the file holds transposed; `shape` is that of the matrix."""
    matrix = read_numbers(replace(tensor, shape=tensor.shape[::-1], transposed=False)).T
    return lambda start, stop: matrix[start:stop]


def _require_damage_before(old: Array, tensor: TensorRange, effect: Effect) -> None:
    """Raise ConversionError when a merge made values of finite weights infinite or NaN."""
    if np.isfinite(old).all():
        raise ConversionError(
            f"{tensor.path}: {effect.name}: the merged weight is not finite in {tensor.dtype}; "
            "the LoRA is damaged, or its strength too large for this dtype"
        )


def _record(old: Array, new: Array, effect: Effect) -> None:
    if not old.size:
        return
    effect.largest_change = max(effect.largest_change, _largest(new - old))
    sizes = _largest(old), _largest(new)
    effect.rounding = max(effect.rounding, sum(spacing(size, effect.dtype) / 2 for size in sizes if np.isfinite(size)))


def _largest(values: Array) -> float:
    """Return the largest absolute value."""
    return max(float(values.max()), -float(values.min()))


def rewritten(header: Header, calculated: Mapping[TensorRange, CalculatedRange]) -> dict[str, TensorPlan]:
    """Return a plan of every tensor of a file, in its order. Ranges in `calculated` get their new values."""
    changed_here = sorted((old for old in calculated if old.path == header.path), key=lambda old: old.offset)
    plans = {}
    for name, tensor in header.tensors.items():
        end = tensor.offset + tensor.nbytes
        inside = [old for old in changed_here if tensor.offset <= old.offset and old.offset + old.nbytes <= end]
        plans[name] = TensorPlan(tensor.dtype, tensor.shape, tuple(_ranges(tensor, inside, calculated)))
    return plans


def _ranges(
    tensor: TensorRange, inside: Sequence[TensorRange], calculated: Mapping[TensorRange, CalculatedRange]
) -> Iterator[Range]:
    """Yield the ranges of a tensor, with those `inside` it calculated and the others copied."""
    position, end = tensor.offset, tensor.offset + tensor.nbytes
    for old in inside:
        if old.offset > position:
            yield replace(tensor, offset=position, nbytes=old.offset - position)
        yield calculated[old]
        position = old.offset + old.nbytes
    if position < end:
        yield replace(tensor, offset=position, nbytes=end - position)


def overwrite(tensors: Mapping[str, TensorRange], changes: Changes) -> list[Effect]:
    """Apply `changes` to the tensors in their files, a block of rows at a time.

    Each block is read before it is written, and DoRA's norms are taken before the first block is written. No other
    program may use the files, because a killed process leaves them half merged. The files are on disk (fsync) at the
    end. Raises ConversionError when a result is not finite or a file cannot be written."""
    effects = []
    for name, of_tensor in changes.items():
        tensor = tensors[name]
        calculated, effect = changed(name, tensor, of_tensor)
        try:
            with tensor.path.open("r+b") as file:
                file.seek(tensor.offset)
                for block in calculated.blocks():
                    file.write(block.data)
        except OSError as error:
            raise ConversionError(f"{tensor.path}: cannot be written: {error.strerror}{room_advice(error)}") from error
        effects.append(effect)
    for path in {tensors[name].path for name in changes}:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return effects

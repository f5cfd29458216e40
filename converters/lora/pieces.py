"""Writes safetensors files whose tensors are partly copied and partly calculated, one piece at a time."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...schemas.errors import ConversionError
from ...schemas.tensors import Shape
from ...storage.copy_ranges import copy_range
from ...storage.safetensors_header import Progress, TensorRange, encode_header
from ...storage.safetensors_writer import reserve, what_failed
from .encoding import Bytes, encode
from .factors import Factor


@dataclass(frozen=True)
class ComputedBytes:
    """`nbytes` bytes that are made when their turn comes, a block at a time."""

    nbytes: int
    blocks: Callable[[], Iterable[Bytes]]


Piece = TensorRange | ComputedBytes


@dataclass(frozen=True)
class TensorPieces:
    """A tensor to write: its dtype and shape, and the pieces its bytes are, one after another."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def factor_pieces(factor: Factor) -> TensorPieces:
    """A factor as a tensor: the bytes it is a copy of, or its numbers encoded."""
    if factor.source is not None:
        return TensorPieces(factor.dtype, factor.shape, (factor.source,))
    made = ComputedBytes(factor.nbytes, lambda: [encode(factor.load(), factor.dtype)[0]])
    return TensorPieces(factor.dtype, factor.shape, (made,))


def write_pieces(
    path: Path, tensors: Mapping[str, TensorPieces], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write a safetensors file in the order of `tensors`, on disk (fsync) when this returns; whoever calls renames it.

    Raises ConversionError when the disk is full or a source cannot be read. Memory: one block."""
    plans: Mapping[str, Any] = tensors  # the header needs what both kinds of plan have: dtype, shape, nbytes
    header = encode_header(plans, metadata)
    total = len(header) + sum(plan.nbytes for plan in tensors.values())
    try:
        with path.open("wb") as out:
            reserve(out.fileno(), total)
            out.write(header)
            for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
                _write_piece(piece, out, progress)
            if out.tell() != total:
                raise ConversionError(f"{path}: wrote {out.tell()} bytes instead of {total}; this is a bug, report it")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise ConversionError(what_failed(path, total, error)) from error


def _write_piece(piece: Piece, out: BinaryIO, progress: Progress | None) -> None:
    """Append a piece at the file's position."""
    if isinstance(piece, TensorRange):
        out.flush()  # the copy goes past Python's buffer
        at = out.tell()
        copy_range(piece.path, piece.offset, piece.nbytes, at, out.fileno(), progress)
        out.seek(at + piece.nbytes)
        return
    for block in piece.blocks():
        out.write(block.data)
        if progress:
            progress(block.nbytes)

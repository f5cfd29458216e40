"""Writes safetensors files whose tensors are partly copied and partly calculated, one piece at a time."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.errors import ConversionError
from ...schemas.tensors import Shape
from ..copying import COPY_BLOCK
from ..safetensors_file import Progress, TensorRange, encode_header
from .factors import Factor
from .numbers import Bytes, encode


@dataclass(frozen=True)
class Calculated:
    """`nbytes` bytes that are made when their turn comes, a block at a time."""

    nbytes: int
    blocks: Callable[[], Iterable[Bytes]]


Piece = TensorRange | Calculated


@dataclass(frozen=True)
class Pieces:
    """A tensor to write: its dtype and shape, and the pieces its bytes are, one after another."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def factor_pieces(factor: Factor) -> Pieces:
    """A factor as a tensor: the bytes it is a copy of, or its numbers encoded."""
    if factor.source is not None:
        return Pieces(factor.dtype, factor.shape, (factor.source,))
    made = Calculated(factor.nbytes, lambda: [encode(factor.load(), factor.dtype)[0]])
    return Pieces(factor.dtype, factor.shape, (made,))


def write_pieces(
    path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write a safetensors file in the order of `tensors`, on disk (fsync) when this returns; whoever calls renames it.

    Raises ConversionError when the disk is full or a source cannot be read. Memory: one block."""
    plans: Mapping[str, Any] = tensors  # the header needs what both kinds of plan have: dtype, shape, nbytes
    header = encode_header(plans, metadata)
    total = len(header) + sum(plan.nbytes for plan in tensors.values())
    try:
        with path.open("wb") as out:
            if total and hasattr(os, "posix_fallocate"):  # a full disk shows before the first tensor is calculated
                os.posix_fallocate(out.fileno(), 0, total)
            out.write(header)
            for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
                for block in _blocks(piece):
                    out.write(block)
                    if progress:
                        progress(len(block))
            if out.tell() != total:
                raise ConversionError(f"{path}: wrote {out.tell()} bytes instead of {total}; this is a bug, report it")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written ({total} bytes needed): {error.strerror}") from error


def _blocks(piece: Piece) -> Iterable[Any]:
    if isinstance(piece, Calculated):
        yield from (block.data for block in piece.blocks())
        return
    with piece.path.open("rb") as file:
        file.seek(piece.offset)
        left = piece.nbytes
        while left:
            block = file.read(min(left, COPY_BLOCK))
            if not block:
                raise OSError(0, f"{piece.path} ended {left} bytes too early; was it changed meanwhile?")
            left -= len(block)
            yield block

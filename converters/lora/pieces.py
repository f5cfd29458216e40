"""Plans of safetensors files whose tensors are partly copied and partly calculated."""

from collections.abc import Mapping
from pathlib import Path

from ...schemas.callbacks import Progress
from ...storage.safetensors_plan import Calculated, Part, TensorPlan
from ...storage.safetensors_writer import write_safetensors
from .factors import Factor
from .numbers import encode

__all__ = ["Calculated", "Piece", "Pieces", "factor_pieces", "write_pieces"]

Piece = Part
Pieces = TensorPlan


def factor_pieces(factor: Factor) -> TensorPlan:
    """A factor as a tensor: the bytes of which it is a copy, or its numbers encoded."""
    if factor.source is not None:
        return TensorPlan(factor.dtype, factor.shape, (factor.source,))
    made = Calculated(factor.nbytes, lambda: [encode(factor.load(), factor.dtype)[0]])
    return TensorPlan(factor.dtype, factor.shape, (made,))


def write_pieces(
    path: Path, tensors: Mapping[str, TensorPlan], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write a safetensors file in the order of `tensors`; see ``storage.safetensors_writer.write_safetensors``.

    Raises ConversionError when the disk is full or a source cannot be read."""
    write_safetensors(path, tensors, metadata, progress)

"""Merges LoRAs into weights where they lie, for files that nothing else refers to yet."""

import os
from collections.abc import Mapping, Sequence

from ...schemas.errors import ConversionError
from ...storage.safetensors_header import TensorRange
from .changed_tensors import Change, Effect, changed

Changes = Mapping[str, Sequence[Change]]  # by the tensor's diffusers name


def overwrite(tensors: Mapping[str, TensorRange], changes: Changes) -> list[Effect]:
    """Write the changed bytes of each tensor over its old ones, a block of rows at a time, as `merge_loras` makes
    them: each block is read before it is written, and DoRA's norms are taken before the first.

    The files must be the caller's alone: what is killed on the way is half merged. They are on disk (fsync) when this
    returns. Raises ConversionError when a result is not finite or a file cannot be written."""
    effects = []
    for name, parts in changes.items():
        tensor = tensors[name]
        calculated, effect = changed(name, tensor, parts)
        try:
            with tensor.path.open("r+b") as file:
                file.seek(tensor.offset)
                for block in calculated.blocks():
                    file.write(block.data)
        except OSError as error:
            raise ConversionError(f"{tensor.path}: cannot be written: {error.strerror}") from error
        effects.append(effect)
    for path in {tensors[name].path for name in changes}:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return effects

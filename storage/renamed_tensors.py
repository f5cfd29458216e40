"""The byte ranges of tensors under their diffusers names, whatever layout a file has."""

from collections.abc import Mapping
from dataclasses import replace

from ..schemas.layouts import Layout, to_diffusers
from ..schemas.stages import Stage
from ..schemas.tensors import Shape
from .safetensors_reader import TensorRange


def diffusers_tensors(
    tensors: Mapping[str, TensorRange], stage: Stage, layout: Layout
) -> tuple[dict[str, TensorRange], list[str]]:
    """Return the tensors by their diffusers names, and the names of those that have no diffusers name."""
    renamed = {}
    used = set()
    for name, mapped in to_diffusers(stage, layout).apply(shapes_of(tensors)).items():
        (rows,) = mapped.rows  # no rule towards diffusers joins tensors
        source = tensors[rows.name]
        used.add(rows.name)
        if rows.transposed:
            source = replace(source, shape=mapped.shape, transposed=True)
        renamed[name] = source if rows.stop is None else source.rows(rows.start, rows.stop, mapped.shape)
    return renamed, [name for name in tensors if name not in used]


def shapes_of(tensors: Mapping[str, TensorRange]) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}

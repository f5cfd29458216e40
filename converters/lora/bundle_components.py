"""Describes a stage of an exported bundle as a component, so that LoRAs can be merged into its weights."""

import math
from pathlib import Path

from ...schemas.config_json import from_json
from ...schemas.dtypes import DTYPE_SIZES, FLOATS
from ...schemas.errors import CheckpointError
from ...schemas.layouts import Layout
from ...schemas.stages import Stage
from ...schemas.tensors import Shape, expected_tensors
from ...storage.bundle import Bundle
from ...storage.safetensors_reader import TensorRange
from ..checkpoints.component import Component, Problems
from ..export.graph_files import ExternalTensor, external_data, load_graph


def bundle_component(bundle: Bundle, stage: Stage) -> Component:
    """Return a stage with the range of each tensor that its graphs read, whatever layout the files have.

    Raises CheckpointError when a graph refers to a file outside the bundle, or a tensor has another size than its
    config asks for."""
    entry = bundle.entry(stage)
    config = from_json(stage, entry.config)
    expected = expected_tensors(config)
    files = {bundle.root / file.path for file in entry.files}
    tensors = {}
    for graph in entry.graphs.values():
        path = bundle.root / graph.path
        for data in external_data(load_graph(path)):
            if path.parent / data.location not in files:
                raise CheckpointError(
                    f"{path}: {data.name} is in {data.location!r}, which is no file of the bundle; export the model "
                    "again"
                )
            if data.name in expected:
                tensors[data.name] = _range(path, data, expected[data.name])
    return Component(
        path=bundle.root / stage,
        stage=stage,
        layout=Layout.DIFFUSERS,
        config=config,
        tensors=tensors,
        metadata={},
        problems=Problems(),
    )


def _range(graph: Path, data: ExternalTensor, shape: Shape) -> TensorRange:
    if data.length != math.prod(shape) * DTYPE_SIZES.get(data.dtype, 0):
        raise CheckpointError(
            f"{graph}: {data.name}: expected {list(shape)} of {', '.join(FLOATS)}, found {data.length} bytes of "
            f"{data.dtype or 'another dtype'}; export the model again"
        )
    return TensorRange(graph.parent / data.location, data.dtype, shape, data.offset, data.length)

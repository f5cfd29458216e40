"""How much memory stages take once loaded."""

from math import prod

from ..schemas.bundle import Manifest
from ..schemas.config_json import from_json
from ..schemas.precision import Precision
from ..schemas.stages import Stage
from ..schemas.tensors import expected_tensors

BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}


def loaded_bytes(manifest: Manifest, stage: Stage, graph: str) -> int:
    """Weights of a stage in the type it computes in."""
    entry = manifest.stages[stage]
    count = sum(prod(spec) for spec in expected_tensors(from_json(stage, entry.config)).values())
    return count * BYTES[entry.precision]

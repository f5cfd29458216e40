"""The ports of a plan: checked against the manifest, and the conversion of arrays to and from the types of the plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from ....schemas.errors import EngineError
from ....schemas.manifest import GraphEntry
from ....schemas.plan_entries import PlanEntry

# The host's dtype for each type of TensorRT.
HOST_TYPES: Mapping[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}


class PlanPorts:
    """The inputs and outputs of a plan. `types` has TensorRT's type of each port, `outputs` the dtype that the graph
    has for each output."""

    def __init__(self, engine: Any, path: Path, plan: PlanEntry, graph: GraphEntry) -> None:
        """`engine` was read from `path`. Raises EngineError when its ports or profiles are not those of `plan` and
        `graph`, or when a port has a type that the host lacks."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        expected = {port.name for port in (*graph.inputs, *graph.outputs)}
        if set(names) != expected or engine.num_optimization_profiles != len(plan.profiles):
            raise EngineError(
                f"{path}: not the plan that the manifest describes: expected ports {', '.join(sorted(expected))} "
                f"and {len(plan.profiles)} profiles, found {', '.join(sorted(names))} and "
                f"{engine.num_optimization_profiles}; build it again"
            )
        self.types: dict[str, str] = {name: engine.get_tensor_dtype(name).name for name in names}
        self.outputs = {port.name: np.dtype(port.dtype) for port in graph.outputs}
        strange = [f"{name} is {kind}" for name, kind in self.types.items() if kind not in HOST_TYPES]
        if strange:
            raise EngineError(f"{path}: expected ports of {', '.join(HOST_TYPES)}; {', '.join(strange)}")

    def host_type(self, name: str) -> np.dtype[Any]:
        """The dtype in which the values of a port are copied to and from the device."""
        return HOST_TYPES[self.types[name]]

    def to_plan(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """An input in the type of the plan, C-contiguous."""
        return np.ascontiguousarray(array, self.host_type(name))

    def from_plan(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """An output in the dtype of the graph."""
        return array.astype(self.outputs[name], copy=False)

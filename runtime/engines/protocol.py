"""The protocol that every engine follows, and the check of a stage's inputs."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ...schemas.control import is_control
from ...schemas.errors import EngineError
from ...schemas.hoisted import MODULATION
from ...schemas.manifest import MAIN_GRAPH
from ...schemas.precision import Precision
from ...schemas.stages import Stage

Tensors = Mapping[str, NDArray[Any]]
F32 = NDArray[np.float32]
Run = Callable[[Tensors], dict[str, NDArray[Any]]]


class PortSpec(Protocol):
    """The fields of a port that are checked; `schemas.ports.Port` and `schemas.manifest.PortEntry` have them."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def dims(self) -> tuple[int | str, ...]: ...


class StageRunner(Protocol):
    """One loaded stage, a context manager that closes it at the end.

    It is called with an array for each input port and returns an array for each output port."""

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]: ...

    def bind(self, constants: Tensors) -> Run:
        """The stage with the inputs `constants` fixed: a function of the other inputs.

        An engine with its own memory copies the constants there once."""

    def keep(self, inputs: Tensors, read: Collection[str]) -> Mapping[str, Any]:
        """Run the stage, and leave every output but `read` in the engine's own memory if it has one.

        What is returned can be given to `bind` of another graph of the same stage and engine."""
        return self(inputs)

    def close(self) -> None:
        """Free the memory of the weights."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class HostRunner(StageRunner, Protocol):
    """A runner that computes in the memory of its inputs, so that binding copies nothing."""

    def bind(self, constants: Tensors) -> Run:
        return lambda inputs: self({**constants, **inputs})


class Engine(Protocol):
    """Loads stages for execution."""

    name: str
    precision: Precision | None  # of the computation; None: that of each graph

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        """The names of the stage's graphs that `load` takes; "model" is the whole network."""

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        """Load a graph of a stage. Raises EngineError that names what to install or export when it cannot be loaded."""


def complete_inputs(stage: Stage, ports: Sequence[PortSpec], inputs: Tensors) -> Tensors:
    """`inputs` with zeros for the ControlNet ports that it leaves out, and with one row where a port of the modulation
    takes one for all samples. Raises EngineError as `check_inputs` does."""
    inputs = with_one_modulation(stage, ports, with_absent_control(ports, inputs))
    check_inputs(stage, ports, inputs)
    return inputs


def with_one_modulation(stage: Stage, ports: Iterable[PortSpec], inputs: Tensors) -> Tensors:
    """`inputs` with the first row of the modulation, if its port takes one row. Raises EngineError if rows differ."""
    rows = inputs.get(MODULATION)
    if rows is None or len(rows) == 1 or not any(port.name == MODULATION and port.dims[0] == 1 for port in ports):
        return inputs
    if (rows != rows[:1]).any():
        raise EngineError(f"{stage}, input {MODULATION}: the samples of a batch must have the same timestep ratio")
    return {**inputs, MODULATION: rows[:1]}


def with_absent_control(ports: Iterable[PortSpec], inputs: Tensors) -> Tensors:
    """`inputs` with zeros, float32 (B, c, 1, 1), for each missing ControlNet port. The zeros change nothing."""
    absent = [port for port in ports if is_control(port.name) and port.name not in inputs]
    if not absent:
        return inputs
    batch = next(iter(inputs.values())).shape[0] if inputs else 1
    zeros = {port.name: np.zeros((batch, int(port.dims[1]), 1, 1), np.float32) for port in absent}
    return {**inputs, **zeros}


def check_inputs(stage: Stage, ports: Iterable[PortSpec], inputs: Tensors) -> None:
    """Raise EngineError unless `inputs` has exactly `ports`, in their dtypes and in shapes that agree."""
    expected = {port.name: port for port in ports}
    if expected.keys() != inputs.keys():
        raise EngineError(f"{stage}: expected inputs {', '.join(expected)}, found {', '.join(inputs)}")
    sizes: dict[str, int] = {}
    for name, port in expected.items():
        array = inputs[name]
        fits = array.ndim == len(port.dims) and all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(port.dims, array.shape, strict=True)
        )
        if array.dtype != np.dtype(port.dtype) or not fits:
            dims = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else str(dim) for dim in map(str, port.dims))
            raise EngineError(
                f"{stage}, input {name}: expected {port.dtype} [{dims}], found {array.dtype} {list(array.shape)}"
            )

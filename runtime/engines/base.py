"""The protocol every engine follows, and the check of what is fed to a stage."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ...schemas.bundle import MAIN_GRAPH
from ...schemas.control import is_control
from ...schemas.errors import EngineError
from ...schemas.precision import Precision
from ...schemas.stages import Stage

Tensors = Mapping[str, NDArray[Any]]
F32 = NDArray[np.float32]
Run = Callable[[Tensors], dict[str, NDArray[Any]]]


class PortSpec(Protocol):
    """What a port has to say for the check: `schemas.ports.Port` and `schemas.bundle.PortEntry` both do."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def dims(self) -> tuple[int | str, ...]: ...


class StageRunner(Protocol):
    """One loaded stage: call it with an array for each input port, get one for each output port. As a context manager
    it is closed at the end."""

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]: ...

    def bind(self, constants: Tensors) -> Run:
        """The stage with some inputs fixed, called with the others. Where the engine has a memory of its own they are
        brought there once."""

    def close(self) -> None:
        """Give back the memory of the weights."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class HostRunner(StageRunner, Protocol):
    """What a runner does that computes where its inputs are: binding copies nothing."""

    def bind(self, constants: Tensors) -> Run:
        return lambda inputs: self({**constants, **inputs})


class Engine(Protocol):
    """Loads stages for execution."""

    name: str
    precision: Precision | None  # what it computes in whatever a graph says; None: what that says

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        """What `load` may be asked for of a stage; "model" is the whole."""

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        """Raises EngineError when the stage cannot be loaded, naming what to install or export."""


def complete_inputs(stage: Stage, ports: Sequence[PortSpec], inputs: Tensors) -> Tensors:
    """`inputs` with zeros for the ControlNet ports that it leaves out. Raises EngineError as `check_inputs` does."""
    inputs = with_absent_control(ports, inputs)
    check_inputs(stage, ports, inputs)
    return inputs


def with_absent_control(ports: Iterable[PortSpec], inputs: Tensors) -> Tensors:
    """`inputs`, and for every ControlNet port they leave out zeros (B, c, 1, 1) float32, which change nothing."""
    absent = [port for port in ports if is_control(port.name) and port.name not in inputs]
    if not absent:
        return inputs
    batch = next(iter(inputs.values())).shape[0] if inputs else 1
    zeros = {port.name: np.zeros((batch, int(port.dims[1]), 1, 1), np.float32) for port in absent}
    return {**inputs, **zeros}


def check_inputs(stage: Stage, ports: Iterable[PortSpec], inputs: Tensors) -> None:
    """Raise EngineError unless `inputs` has exactly the ports of `stage`, in the right dtype and shape."""
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

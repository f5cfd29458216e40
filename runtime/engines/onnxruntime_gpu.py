"""A stage of ONNX Runtime on a GPU: its inputs and outputs stay at fixed addresses in GPU memory."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from ...schemas.callbacks import Say
from ...schemas.errors import EngineError
from ...schemas.manifest import GraphEntry
from ...schemas.messages import one_line
from ...schemas.stages import Stage
from ..memory.give_back import give_back_memory
from .cuda_graphs import GPU, Slot, Slots
from .device_arrays import ArraySpec, DeviceMemory, read_value, spec_of
from .protocol import REASON_LENGTH, Outputs, Run, StageRunner, Tensors, complete_inputs


class GpuStage(StageRunner):
    """The session of one graph of a stage on a GPU. `memory` is shared by the graphs of the stage."""

    def __init__(
        self, stage: Stage, entry: GraphEntry, session: Any, memory: DeviceMemory, *, captures: bool, say: Say
    ) -> None:
        """`captures` says that the session was created for CUDA graphs; `say` is called if they cannot be used."""
        self.stage = stage
        self.entry = entry
        self._session = session
        self._memory = memory
        self.slots = Slots(session, memory, captures=captures, say=lambda text: say(f"{stage}: {text}"))
        self._outputs = [port.name for port in entry.outputs]
        self._kept: dict[tuple[Any, ...], dict[str, ArraySpec]] = {}  # of the outputs of `keep`, by shapes of inputs

    def __call__(self, inputs: Tensors) -> Outputs:
        given = complete_inputs(self.stage, self.entry.inputs, inputs)
        with self.working():
            found = self._session.run(self._outputs, dict(given), self.slots.options())
            return dict(zip(self._outputs, found, strict=True))

    def bind(self, constants: Tensors) -> Run:
        return BoundSession(self, constants)

    def keep(self, inputs: Tensors, read: Collection[str]) -> Mapping[str, Any]:
        """The outputs as device arrays, and `read` as arrays.

        Arrays of one size lie at addresses that come back, so that a captured graph that reads them stays valid."""
        given = complete_inputs(self.stage, self.entry.inputs, inputs)
        key = tuple((name, spec_of(array)) for name, array in given.items())
        with self.working():
            binding = self._session.io_binding()
            for name, array in given.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            if key not in self._kept:
                self._kept[key] = self._measured(binding, read)
            kept = self._memory.lend(self._kept[key])
            for name in self._outputs:
                if name in kept:
                    binding.bind_ortvalue_output(name, kept[name].value)
                else:
                    binding.bind_output(name)
            self._session.run_with_iobinding(binding, self.slots.options())
            outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            return {**kept, **{name: read_value(outputs[name]) for name in read}}

    def close(self) -> None:
        self._session = self.slots = None  # type: ignore[assignment]
        self._memory.forget()
        give_back_memory()  # the session holds gigabytes; do not wait for the collector

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Holds the GPU, and turns exceptions of ONNX Runtime into EngineError."""
        try:
            with GPU:
                yield
        except Exception as error:
            raise EngineError(f"{self.stage}: onnxruntime failed: {one_line(error, REASON_LENGTH)}") from error

    def _measured(self, binding: Any, read: Collection[str]) -> dict[str, ArraySpec]:
        """Run once to learn the shapes of the outputs other than `read`, which no port's dims have to tell."""
        for name in self._outputs:
            binding.bind_output(name, self._memory.device)
        self._session.run_with_iobinding(binding, self.slots.options())
        shapes = dict(zip(self._outputs, (tuple(value.shape()) for value in binding.get_outputs()), strict=True))
        return {port.name: (shapes[port.name], port.dtype) for port in self.entry.outputs if port.name not in read}


class BoundSession:
    """A stage with some inputs fixed: a function of the other inputs, on buffers that are its own while it lives."""

    def __init__(self, stage: GpuStage, constants: Tensors) -> None:
        self._stage = stage
        self._constants = dict(constants)
        self._slots: dict[tuple[Any, ...], Slot] = {}  # by the shapes of the inputs

    def __call__(self, inputs: Tensors) -> Outputs:
        stage = self._stage
        given = complete_inputs(stage.stage, stage.entry.inputs, {**self._constants, **inputs})
        key = tuple(spec_of(given[port.name]) for port in stage.entry.inputs)
        with stage.working():
            new = key not in self._slots
            if new:
                self._slots[key] = stage.slots.acquire(self, stage.entry, given)
            slot = self._slots[key]
            for name, array in given.items():
                if new or name in inputs:
                    slot.inputs[name].write(array)
            stage.slots.run(slot)
            return slot.read()

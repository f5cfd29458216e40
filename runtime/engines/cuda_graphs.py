"""Runs a session of ONNX Runtime on buffers at fixed addresses, and captures the runs as CUDA graphs.

A captured graph launches the kernels of a whole run at once. What it needs, and what happens otherwise:

| a captured graph                                       | therefore                                                 |
|--------------------------------------------------------|-----------------------------------------------------------|
| reads and writes the addresses of its first run        | each set of shapes has buffers and an id of its own       |
| never reads inputs that are bound on the host          | every input is copied to the device in place              |
| belongs to the thread that captured it                 | other threads run without capture                         |
| fails if another thread uses CUDA while it is captured | `GPU` is held by every load and every run                 |
| lives until it is released, or as long as the session  | at most MOST_GRAPHS are kept, the oldest are released     |
| may read stale memory where a kernel keeps host arrays | the first replay is compared with a run without capture   |
"""

import threading
import weakref
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.callbacks import Say
from ...schemas.manifest import GraphEntry
from ...schemas.messages import one_line
from .device_arrays import DeviceArray, DeviceMemory, resolved, spec_of

GPU = threading.RLock()  # held while ONNX Runtime uses CUDA: a capture ends with error 900 if another thread does

GRAPH_ID = "gpu_graph_id"
UNCAPTURED = "-1"  # the id of runs without capture and replay
MOST_GRAPHS = 4  # of a session that are kept
MOST_CAPTURES = 32  # of a session in all: a provider may ignore that a graph is released
REPLAY_TOLERANCE = 1e-2  # relative L2 between a replay and a run; kernels that add in another order differ by 1e-3
REASON_LENGTH = 300

Inputs = Mapping[str, "NDArray[Any] | DeviceArray"]


class Slot:
    """A session's IO binding for one set of shapes, with a buffer for every input and output.

    `graph_id` is None if the slot is never captured."""

    def __init__(self, session: Any, memory: DeviceMemory, entry: GraphEntry, given: Inputs) -> None:
        """Outputs whose shape does not follow from those of `given` get a new array on the host in every run."""
        self.specs = {name: spec_of(array) for name, array in given.items()}
        self.lent = {name: array.value for name, array in given.items() if isinstance(array, DeviceArray)}
        self.inputs = {
            name: DeviceArray(self.lent[name], spec) if name in self.lent else memory.array(spec)
            for name, spec in self.specs.items()
        }
        self.graph_id: int | None = None
        self.captured = self.proved = False
        self.holder: weakref.ref[Any] | None = None
        self.binding = session.io_binding()
        for name, array in self.inputs.items():
            self.binding.bind_ortvalue_input(name, array.value)
        self._ports = entry.outputs
        self.outputs: dict[str, DeviceArray] = {}
        sizes = sizes_of(entry, given)
        for port in self._ports:
            if shape := resolved(port.dims, sizes):
                self.outputs[port.name] = memory.array((shape, port.dtype))
                self.binding.bind_ortvalue_output(port.name, self.outputs[port.name].value)

    @property
    def fixed(self) -> bool:
        """True if all outputs have buffers."""
        return len(self.outputs) == len(self._ports)

    @property
    def idle(self) -> bool:
        return self.holder is None or self.holder() is None

    def fits(self, given: Inputs) -> bool:
        """True if `given` has the slot's shapes, and its device arrays lie at the slot's addresses."""
        lent = {name: array.value for name, array in given.items() if isinstance(array, DeviceArray)}
        return (
            self.specs == {name: spec_of(array) for name, array in given.items()}
            and lent.keys() == self.lent.keys()
            and all(value is self.lent[name] for name, value in lent.items())
        )

    def read(self) -> dict[str, NDArray[Any]]:
        """The outputs of the last run, on the host."""
        if self.fixed:
            return {port.name: self.outputs[port.name].read() for port in self._ports}
        return dict(zip((port.name for port in self._ports), self.binding.copy_outputs_to_cpu(), strict=True))

    def bind_free_outputs(self) -> None:
        for port in self._ports:
            if port.name not in self.outputs:
                self.binding.bind_output(port.name)


class Slots:
    """The slots of one session, and its CUDA graphs."""

    def __init__(self, session: Any, ort: Any, memory: DeviceMemory, *, captures: bool, say: Say) -> None:
        """`captures` says that the session was created for CUDA graphs. `say` is called with a line when it turns out
        that they cannot be used."""
        self._session, self._ort, self._memory, self._say = session, ort, memory, say
        self._for_graphs = captures
        self.capturing = captures
        self._slots: list[Slot] = []  # in the order of their last use
        self._ids = count(1)  # 0 is the id of runs that name none; no id is used twice
        self._captures = 0
        self._thread: threading.Thread | None = None
        self._release = getattr(session, "release_captured_graph", None)

    def acquire(self, holder: object, entry: GraphEntry, given: Inputs) -> Slot:
        """A slot for the shapes of `given`, which belongs to `holder` as long as `holder` lives."""
        slot = next((slot for slot in self._slots if slot.idle and slot.fits(given)), None)
        if slot is None:
            self._make_room()
            slot = Slot(self._session, self._memory, entry, given)
            if slot.fixed and self._may_capture() and self._captures < MOST_CAPTURES and self._kept() < MOST_GRAPHS:
                slot.graph_id = next(self._ids)
        else:
            self._slots.remove(slot)
        slot.holder = weakref.ref(holder)
        self._slots.append(slot)
        return slot

    def run(self, slot: Slot) -> None:
        """Run the session on the slot's buffers: by its graph if it has one that this thread may use."""
        slot.bind_free_outputs()
        if slot.graph_id is None or not self._may_capture():
            self._run(slot, UNCAPTURED)
        elif not slot.captured:
            self._capture(slot)
        else:
            self._run(slot, str(slot.graph_id))
            if not slot.proved:
                self._prove(slot)

    def options(self, graph_id: str = UNCAPTURED) -> Any:
        """The options of a run; None for a session without CUDA graphs."""
        if not self._for_graphs:
            return None
        options = self._ort.RunOptions()
        options.add_run_config_entry(GRAPH_ID, graph_id)
        return options

    def _run(self, slot: Slot, graph_id: str) -> None:
        self._session.run_with_iobinding(slot.binding, self.options(graph_id))

    def _capture(self, slot: Slot) -> None:
        """The first run of a graph's id: ONNX Runtime runs the session twice, captures the third run and replays it."""
        self._thread = self._thread or threading.current_thread()
        self._captures += 1
        try:
            self._run(slot, str(slot.graph_id))
            slot.captured = True
        except Exception as error:  # onnxruntime has an exception class for each status code
            self._stop(one_line(error, REASON_LENGTH))
            self._run(slot, UNCAPTURED)

    def _prove(self, slot: Slot) -> None:
        """Compare the first replay with a run; if they differ, the run's outputs remain and no graph is used again."""
        replayed = slot.read()
        self._run(slot, UNCAPTURED)
        computed = slot.read()
        slot.proved = True
        apart = max(_distance(replayed[name], computed[name]) for name in computed)
        if not apart <= REPLAY_TOLERANCE:
            self._stop(f"its replay is {apart:.1e} away from a run without it")

    def _stop(self, reason: str) -> None:
        self.capturing = False
        self._say(f"runs without a CUDA graph, because {reason}")

    def _may_capture(self) -> bool:
        return self.capturing and self._thread in (None, threading.current_thread())

    def _kept(self) -> int:
        return sum(slot.graph_id is not None for slot in self._slots)

    def _make_room(self) -> None:
        """Drop idle slots: all without a graph, and the oldest while there is no room for a new graph."""
        self._slots = [slot for slot in self._slots if slot.graph_id is not None or not slot.idle]
        if not self._release or not self._may_capture() or self._captures >= MOST_CAPTURES:
            return
        while self._kept() >= MOST_GRAPHS:
            oldest = next((slot for slot in self._slots if slot.idle and slot.graph_id is not None), None)
            if oldest is None:
                return
            self._slots.remove(oldest)
            if oldest.captured:
                self._release(oldest.graph_id)


def sizes_of(entry: GraphEntry, given: Inputs) -> dict[str, int]:
    """The sizes of the named dims of a graph's inputs."""
    return {
        dim: size
        for port in entry.inputs
        for dim, size in zip(port.dims, given[port.name].shape, strict=True)
        if isinstance(dim, str)
    }


def _distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Relative L2; NaN if only one of them is finite, 0 if neither is: a stage that overflows does so in both."""
    if not np.isfinite(expected).all():
        return 0.0 if not np.isfinite(found).all() else float("nan")
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    apart = float(np.linalg.norm(found.astype(np.float64) - expected))
    return apart / scale if scale else apart

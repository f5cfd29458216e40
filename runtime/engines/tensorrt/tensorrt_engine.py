"""Runs the plans of a bundle with TensorRT or TensorRT-RTX, on numpy arrays."""

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

from numpy.typing import NDArray

from ....schemas.errors import EngineError
from ....schemas.manifest import MAIN_GRAPH
from ....schemas.plan_entries import Backend, PlanEntry
from ....schemas.precision import Precision
from ....schemas.stages import EVERY_IMAGE, Stage
from ....storage.bundle import Bundle
from ....storage.user_cache import user_cache
from ...memory.give_back import give_back_memory
from ...memory.gpu_budget import DeviceBudget, gib
from ..protocol import StageRunner, Tensors, complete_inputs
from .cuda import DeviceMemoryError
from .execution import Execution
from .host import Host, make_runtime, open_host
from .plan_choice import check_plan, choose, graphs_with_plans, runnable_plans

Outputs = dict[str, NDArray[Any]]
Refit = Callable[[Any, Path], object]  # takes an engine of TensorRT and the ONNX file of its new weights
T = TypeVar("T")

NOTHING_HELD = 0  # the key of calls without constants
_keys = count(NOTHING_HELD + 1)


class TensorRTEngine:
    """An engine for the stages of `bundle` that have plans for this machine; `host` is what `host.open_host` gives.

    Stages stay on the device as long as they fit into `memory_budget` bytes (None: into the memory that is free). The
    stage that was used longest ago is evicted first, and is loaded again when it is called. A plan built for weight
    streaming keeps as many weights on the device as fit. TensorRT-RTX compiles kernels, which are kept in the folder
    `cache` between runs (None: the user's cache folder).

    `refit` writes the weights of an ONNX file into an engine (see ``converters.tensorrt.refit``). With it, refittable
    plans run with the bundle's present weights, whatever weights they were built from."""

    precision: Precision | None = None  # a plan computes as its graph says

    def __init__(
        self,
        bundle: Bundle,
        host: Host,
        *,
        memory_budget: int | None = None,
        cache: Path | None = None,
        refit: Refit | None = None,
    ) -> None:
        self.bundle = bundle
        self.host = host
        self.name: str = host.backend
        self.refit = refit
        self.room = DeviceBudget(host.cuda.free_memory, memory_budget)
        self.cache = cache or user_cache("tensorrt-rtx")
        self.runtime = make_runtime(host)

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return graphs_with_plans(self.bundle.entry(stage), self.host, refits=self.refit is not None)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "TensorRTStage":
        return TensorRTStage(self, stage, graph)


class TensorRTStage(StageRunner):
    """One graph of a stage, with its plans for this machine. At most one plan is on the device."""

    def __init__(self, engine: TensorRTEngine, stage: Stage, graph: str) -> None:
        """Raises EngineError, with the reason and the command that builds a plan, when no plan can run here."""
        self.stage = stage
        self._engine = engine
        self._plans = runnable_plans(engine.bundle, stage, graph, engine.host, refits=engine.refit is not None)
        self._entry = engine.bundle.entry(stage).graphs[graph]
        self._execution: Execution | None = None
        if len(self._plans) == 1:  # of several plans, the sizes of the first inputs decide
            self._with_room(lambda: self._ready(self._plans[0]))

    def __call__(self, inputs: Tensors) -> Outputs:
        return self.run(inputs, {}, NOTHING_HELD)

    def bind(self, constants: Tensors) -> "BoundStage":
        """The stage with the inputs `constants` fixed, which are copied to the device once."""
        return BoundStage(self, constants)

    def run(self, inputs: Tensors, constants: Tensors, key: int) -> Outputs:
        """The outputs for `inputs` and `constants`, which are held on the device under `key`."""
        twice = inputs.keys() & constants.keys()
        if twice:
            raise EngineError(f"{self.stage}: {', '.join(sorted(twice))} given, though bound already")
        everything = complete_inputs(self.stage, self._entry.inputs, {**constants, **inputs})
        shapes = {name: array.shape for name, array in everything.items()}
        loaded = self._execution.plan if self._execution else None
        plan, profile = choose(self._engine.bundle, self.stage, self._plans, shapes, loaded)

        def attempt() -> Outputs:
            execution = self._ready(plan, profile)
            execution.hold(key, constants)
            rest = {name: array for name, array in everything.items() if name not in constants}
            return execution.run(profile, rest, constants, key)

        return self._with_room(attempt)

    def release(self, key: int) -> None:
        """Forget the constants held under `key`."""
        if self._execution:
            self._execution.release(key)

    def close(self) -> None:
        self._engine.room.forget(self)
        self.evict()
        give_back_memory()

    @property
    def device_bytes(self) -> int:
        return self._execution.device_bytes if self._execution else 0

    def facts(self) -> dict[str, Any]:
        """For reports: the plan in use, its bytes on the device, and whether it replays a CUDA graph."""
        execution = self._execution
        if execution is None:
            return {}
        return {
            "plan": execution.plan.path,
            "device_bytes": execution.device_bytes,
            "weight_bytes": execution.weights_on_device,
            "replays_cuda_graph": execution.replays,
        }

    def evict(self) -> None:
        """Free all device memory. The next call loads the plan again."""
        if self._execution:
            execution, self._execution = self._execution, None
            execution.close()

    def _with_room(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`. While memory is short for it, other stages are evicted from the device."""
        while True:
            try:
                return attempt()
            except DeviceMemoryError as error:
                if not self._engine.room.evict_oldest(self):
                    free = gib(self._engine.host.cuda.free_memory())
                    self.evict()
                    raise EngineError(
                        f"{self.stage}: the GPU's memory does not hold it ({error}; {free} free); choose a "
                        "smaller size or fewer images"
                    ) from error

    def _ready(self, plan: PlanEntry, profile: int | None = None) -> Execution:
        """The plan on the device, with room for the scratch memory of `profile`."""
        room = self._engine.room
        if self._execution and self._execution.plan is not plan:
            room.forget(self)
            self.evict()
        if self._execution is None:
            self._execution = self._open(plan)
        if profile is not None and profile != self._execution.profile:
            room.make_room(self._execution.scratch(profile), self)
        room.use(self)
        return self._execution

    def _open(self, plan: PlanEntry) -> Execution:
        engine = self._engine
        path = check_plan(engine.bundle, self.stage, plan)
        engine.room.make_room(plan.bytes, self)
        cache = engine.cache / f"{plan.sha256}-{engine.host.device.capability}-{engine.host.version}.kernels"
        execution = Execution(engine.host, engine.runtime, path, plan=plan, graph=self._entry, cache=cache)
        try:
            if engine.refit and not engine.bundle.entry(self.stage).is_current(plan):
                engine.refit(execution.engine, engine.bundle.graph(self.stage, plan.graph))
            if execution.streamable:
                self._stream_weights(execution)
            self._require_budget(execution)
        except EngineError:
            execution.close()
            raise
        return execution

    def _stream_weights(self, execution: Execution) -> None:
        """Keep as many weights on the device as fit."""
        kept = execution.streamable
        for _ in range(3):  # the scratch memory of a profile depends on how much is streamed
            execution.keep_weights(kept)
            scratch = max(map(execution.scratch, range(len(execution.plan.profiles))))
            needed = execution.weights_on_device + scratch
            lacking = needed - self._engine.room.make_room(needed, self)
            if lacking <= 0 or kept == 0:
                return
            kept = max(0, kept - lacking)
        execution.keep_weights(kept)

    def _require_budget(self, execution: Execution) -> None:
        budget = self._engine.room.budget
        needed = execution.weights_on_device + execution.scratch(0)
        if budget is not None and needed > budget:
            raise EngineError(
                f"{self.stage}: its plan needs {gib(needed)} of the GPU's memory, the budget is {gib(budget)}; "
                "raise the budget"
            )


class BoundStage:
    """A stage with some inputs fixed; it is called with the others. When the object is collected, its constants leave
    the device."""

    def __init__(self, stage: TensorRTStage, constants: Tensors) -> None:
        self._stage = stage
        self._constants: Mapping[str, NDArray[Any]] = dict(constants)
        self._key = next(_keys)
        finalize(self, stage.release, self._key).atexit = False  # the driver may be gone by then

    def __call__(self, inputs: Tensors) -> Outputs:
        return self._stage.run(inputs, self._constants, self._key)


def make_tensorrt(
    bundle: Bundle, backend: Backend, memory_budget: int | None = None, refit: Refit | None = None
) -> TensorRTEngine:
    """The engine on this machine's GPU. Raises EngineError when TensorRT, a driver or a GPU are missing."""
    return TensorRTEngine(bundle, open_host(backend), memory_budget=memory_budget, refit=refit)


def has_plans(bundle: Bundle, backend: Backend) -> bool:
    """True if every stage that `generate` needs has plans of `backend` that can run here."""
    entries = [bundle.manifest.stages.get(stage) for stage in EVERY_IMAGE]
    if not all(entry and any(plan.backend == backend for plan in entry.plans) for entry in entries):
        return False
    try:
        host = open_host(backend)
    except EngineError:
        return False
    return all(entry and graphs_with_plans(entry, host) for entry in entries)

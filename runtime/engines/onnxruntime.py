"""Runs the graphs of a bundle with ONNX Runtime."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ...schemas.bundle import MAIN_GRAPH, GraphEntry
from ...schemas.errors import EngineError
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ..bundle import Bundle
from .base import Tensors, check_inputs, with_absent_control
from .memory import give_back_memory

if TYPE_CHECKING:
    from onnx import ModelProto

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
MEMORY_POLICIES = ("fast", "mapped")
IN_MEMORY_SINCE = (1, 21)  # graphs in memory with weights in files


class OnnxRuntimeEngine:
    """An engine for every stage of `bundle` on `device`, "cpu" or "cuda".

    `memory` says where the weights are. "fast": in memory, once, cast and rearranged as the kernels like them.
    "mapped": in their files, which the system reads in and drops as it likes; weights stored in 16 bits are cast anew
    in every pass, and memory goes back to the system after each operation. `threads` None leaves their number to
    ONNX Runtime.
    """

    def __init__(
        self, bundle: Bundle, device: str = "cpu", *, memory: str = "fast", threads: int | None = None
    ) -> None:
        """Raises EngineError when device or policy are unknown, or ONNX Runtime or its provider is not installed."""
        if device not in PROVIDERS:
            raise EngineError(f"device {device!r}: expected one of {', '.join(PROVIDERS)}")
        if memory not in MEMORY_POLICIES:
            raise EngineError(f"memory {memory!r}: expected one of {', '.join(MEMORY_POLICIES)}")
        self.bundle = bundle
        self.device = device
        self.precision: Precision | None = None
        self.memory = memory
        self.threads = threads
        self.name = "onnxruntime" if memory == "fast" else f"onnxruntime-{memory}"
        self._ort = import_onnxruntime(device)

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return tuple(self.bundle.entry(stage).graphs)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "OnnxRuntimeStage":
        entry = self.bundle.entry(stage)
        if entry.precision is Precision.BF16 and self.device == "cpu":
            raise EngineError(
                f"{stage}: its graphs compute in bf16, for which onnxruntime has no CPU kernels; "
                f"export it with --precision {stage}=fp32, or run it with --device cuda"
            )
        path = self.bundle.graph(stage, graph)
        provider = PROVIDERS[self.device]
        options, disabled = self._options()
        try:
            session = self._ort.InferenceSession(path, options, providers=[provider], disabled_optimizers=disabled)
        except Exception as error:  # onnxruntime raises a class of its own for each status code
            raise EngineError(f"{path}: onnxruntime cannot load the {stage}: {error}") from error
        if provider not in session.get_providers():  # it falls back to the CPU in silence
            raise EngineError(f"{stage}: onnxruntime did not start its {provider}; check the driver, or use device cpu")
        give_back_memory()
        return OnnxRuntimeStage(stage, entry.graphs[graph], session)

    def _options(self) -> tuple[Any, list[str]]:
        """Session options, and the names of optimizers to do without."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only: what matters comes as an exception
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.memory == "fast":
            return options, []
        options.add_session_config_entry("session.disable_prepacking", "1")  # each would be a copy in memory
        options.enable_cpu_mem_arena = False  # it would keep the casts of all weights
        return options, ["ConstantFolding"]  # it would cast them for good


class OnnxRuntimeStage:
    """One stage's session."""

    def __init__(self, stage: Stage, entry: GraphEntry, session: Any) -> None:
        self.stage = stage
        self.entry = entry
        self._session = session

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        inputs = with_absent_control(self.entry.inputs, inputs)
        check_inputs(self.stage, self.entry.inputs, inputs)
        names = [port.name for port in self.entry.outputs]
        try:
            outputs = self._session.run(names, dict(inputs))
        except Exception as error:
            raise EngineError(f"{self.stage}: onnxruntime failed: {error}") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        self._session = None
        give_back_memory()  # the session holds gigabytes; do not wait for the collector


def open_session(path: Path) -> Any:
    """A session of any graph on the CPU, for a short run. Raises EngineError when it cannot be loaded."""
    ort = import_onnxruntime("cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=[PROVIDERS["cpu"]])
    except Exception as error:
        raise EngineError(f"{path}: onnxruntime cannot load it: {error}") from error


def open_proto(model: "ModelProto", folder: Path) -> Any:
    """A session of `model`, which is on no disk, on the CPU; its weights lie in `folder`. Raises EngineError when it
    cannot be loaded, or ONNX Runtime is older than 1.21."""
    ort = import_onnxruntime("cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS["cpu"]])
    except Exception as error:
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < IN_MEMORY_SINCE:
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot load parts of a graph: pip install 'onnxruntime>=1.21'"
            ) from error
        raise EngineError(f"{folder}: onnxruntime cannot load a part of its graph: {error}") from error


def import_onnxruntime(device: str) -> Any:
    """The module, able to use `device`. Raises EngineError saying what to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime is not installed: pip install 'cascadekit[{EXTRAS[device]}]'") from error
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise EngineError(
            f"this ONNX Runtime has no {PROVIDERS[device]}: pip uninstall onnxruntime, "
            f"then pip install 'cascadekit[{EXTRAS[device]}]'"
        )
    return onnxruntime

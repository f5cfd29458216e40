"""Runs the graphs of a bundle with ONNX Runtime, on the CPU or on a GPU."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import EngineError, reraise_interrupt
from ...schemas.manifest import MAIN_GRAPH, GraphEntry
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ...storage.hub_cache_links import without_links
from ...storage.user_cache import user_cache
from ..memory.give_back import give_back_memory
from .installed_packages import onnxruntime_conflict, provider_problem
from .protocol import HostRunner, Run, Tensors, complete_inputs
from .telemetry import silence, switch_off_telemetry

if TYPE_CHECKING:
    from onnx import ModelProto

Outputs = dict[str, NDArray[Any]]

CPU = "CPUExecutionProvider"
# The execution providers of a device: the first runs the graph, the second the operators that the first does not know.
# "tensorrt" is the GPU, too.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
EXTRAS = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu"}
MEMORY_POLICIES = ("fast", "mapped")
IN_MEMORY_SINCE = (1, 21)  # the version that first loads a graph from memory with its weights in files

# The operators that take the time of a network. Others may run on the CPU, where ONNX Runtime computes shapes.
HEAVY = ("Attention", "Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "MultiHeadAttention")
ERROR, FATAL = 3, 4  # severities of ONNX Runtime's log
REASON_LENGTH = 400
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"


class OnnxRuntimeEngine:
    """An engine for every stage of `bundle`.

    `device` is "cpu", "cuda" or "tensorrt". The last is the GPU through ONNX Runtime's TensorRT provider, which builds
    engines of its own, minutes each, and keeps them in the user's cache folder.

    `memory` says where the weights are. "fast" keeps one copy in memory, cast and rearranged for the kernels. "mapped"
    leaves them in their files, which the system reads and drops as it likes. Weights stored in 16 bits are then cast in
    every pass, and memory is returned to the system after each operation.

    `threads=None` leaves their number to ONNX Runtime. With `allow_cpu` the CPU runs operators that the GPU cannot run;
    without it they are an error."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        memory: str = "fast",
        threads: int | None = None,
        allow_cpu: bool = False,
    ) -> None:
        """Raises EngineError for an unknown device or policy, or without ONNX Runtime or the provider of `device`."""
        if device not in PROVIDERS:
            raise EngineError(f"device {device!r}: expected one of {', '.join(PROVIDERS)}")
        if memory not in MEMORY_POLICIES:
            raise EngineError(f"memory {memory!r}: expected one of {', '.join(MEMORY_POLICIES)}")
        self.bundle = bundle
        self.device = device
        self.precision: Precision | None = None
        self.memory = memory
        self.threads = threads
        self.allow_cpu = allow_cpu
        self.name = "-".join(("onnxruntime", *[part for part in (memory, device) if part in ("mapped", "tensorrt")]))
        self._ort = import_onnxruntime(device, allow_cpu=allow_cpu)

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return tuple(self.bundle.entry(stage).graphs)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "OnnxRuntimeStage":
        entry = self.bundle.entry(stage)
        if entry.precision is Precision.BF16 and self.device == "cpu":
            raise EngineError(
                f"{stage}: its graphs compute in bf16, for which onnxruntime has no CPU kernels; "
                f'set device="cuda", or export it again: cascadekit export MODEL -o BUNDLE --precision {stage}=fp32'
            )
        with without_links(self.bundle.graph(stage, graph)) as path:
            session = self._start(stage, path)
        on_device = self._check_placement(stage, session)
        give_back_memory()
        return OnnxRuntimeStage(stage, entry.graphs[graph], session, self._ort if on_device else None)

    def _start(self, stage: Stage, path: Path) -> Any:
        """A session on the device. With `allow_cpu` it is on the CPU where it cannot be on the device."""
        chosen = self._providers()
        for providers in (chosen, [CPU]) if self.allow_cpu else (chosen,):
            options, disabled = self._options()
            try:  # ONNX Runtime's own fallback would print an error and go on
                return self._ort.InferenceSession(
                    path, options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
                )
            except Exception as error:  # onnxruntime has an exception class for each status code
                failed = error
        reason = " ".join(str(failed).split())[:REASON_LENGTH]
        raise EngineError(f"{path}: onnxruntime cannot load the {stage}: {reason}") from failed

    def _options(self) -> tuple[Any, list[str]]:
        """Session options, and the names of the optimizers to switch off."""
        options = quiet_options(self._ort)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.device != "cpu":
            options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
        # Each session has an arena of its own. A shared arena would keep what a stage needed after the stage is
        # closed: 2.4 GB of a vqgan at 1024x1024.
        if self.memory == "fast":
            return options, []
        return options, keep_mapped(options)

    def _providers(self) -> list[str | tuple[str, dict[str, Any]]]:
        """The device's providers that this ONNX Runtime has, with their options."""
        cache = str(user_cache("onnxruntime"))
        tensorrt: dict[str, Any] = {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": cache,
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": cache,
        }
        wanted = [*PROVIDERS[self.device], *([CPU] if self.allow_cpu and self.device != "cpu" else [])]
        available = {*self._ort.get_available_providers(), CPU}
        return [
            (name, tensorrt) if name == "TensorrtExecutionProvider" else name for name in wanted if name in available
        ]

    def _check_placement(self, stage: Stage, session: Any) -> bool:
        """True if the session is on the GPU. Raises EngineError if a part of it is on the CPU and must not be."""
        wanted = PROVIDERS[self.device][0]
        if wanted == CPU:
            return False
        started = session.get_providers()
        if wanted not in started:  # ONNX Runtime says nothing and uses the providers that are left
            if self.allow_cpu:
                return any(name != CPU for name in started)
            reason = provider_problem(self._ort, wanted) or "check the driver with nvidia-smi"
            raise EngineError(
                f"{stage}: onnxruntime did not start its {wanted} and would compute on the CPU: {reason}; "
                f"install CUDA's libraries with pip install 'onnxruntime-gpu[cuda,cudnn]', or set allow_cpu=True"
            )
        left = operators_on_cpu(session)
        if left and not self.allow_cpu:
            what = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
            raise EngineError(
                f"{stage}: {wanted} has no kernels for some of its operators and left {what} to the CPU; "
                f"export it in another precision, or set allow_cpu=True"
            )
        return True


class OnnxRuntimeStage(HostRunner):
    """The session of one stage. `device_ort` is the module onnxruntime if the session is on a GPU, else None."""

    def __init__(self, stage: Stage, entry: GraphEntry, session: Any, device_ort: Any = None) -> None:
        self.stage = stage
        self.entry = entry
        self._session = session
        self._device_ort = device_ort
        self._outputs = [port.name for port in entry.outputs]

    def __call__(self, inputs: Tensors) -> Outputs:
        given = complete_inputs(self.stage, self.entry.inputs, inputs)
        with self._errors():
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(given)), strict=True))

    def bind(self, constants: Tensors) -> Run:
        if self._device_ort is None:
            return super().bind(constants)
        fixed = dict(constants)
        binding = self._session.io_binding()
        with self._errors():
            for name, array in fixed.items():
                value = self._device_ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
                binding.bind_ortvalue_input(name, value)

        def run(inputs: Tensors) -> Outputs:
            given = complete_inputs(self.stage, self.entry.inputs, {**fixed, **inputs})
            fed = {name: np.ascontiguousarray(array) for name, array in given.items() if name not in fixed}
            with self._errors():
                for name, array in fed.items():
                    binding.bind_cpu_input(name, array)
                for name in self._outputs:
                    binding.bind_output(name)  # in every run: the size of the output may differ
                self._session.run_with_iobinding(binding)
                return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

        return run

    def close(self) -> None:
        self._session = None
        give_back_memory()  # the session holds gigabytes; do not wait for the collector

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise EngineError(f"{self.stage}: onnxruntime failed: {error}") from error


def operators_on_cpu(session: Any) -> Counter[str]:
    """The number of HEAVY operators of each kind that the session left to the CPU.

    The count is empty for an ONNX Runtime before 1.24, which does not say where operators run."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Counter()
    parts = session.get_provider_graph_assignment_info()
    on_cpu = (node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes())
    return Counter(kind for kind in on_cpu if kind in HEAVY)


def quiet_options(ort: Any) -> Any:
    """Session options that log errors alone: everything that matters is raised as an exception."""
    options = ort.SessionOptions()
    options.log_severity_level = ERROR
    return options


def keep_mapped(options: Any) -> list[str]:
    """Set `options` to leave weights in their files; returns the names of the optimizers to switch off."""
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are copies in memory
    options.enable_cpu_mem_arena = False  # an arena would keep the casts of all weights
    return ["ConstantFolding"]  # folding would cast the weights for good


def open_session(path: Path) -> Any:
    """A session of any graph on the CPU, for a short run: its weights stay in their files.

    Raises EngineError when it cannot be loaded."""
    ort = import_onnxruntime("cpu")
    options = quiet_options(ort)
    disabled = keep_mapped(options)
    try:
        return ort.InferenceSession(path, options, providers=[CPU], disabled_optimizers=disabled)
    except Exception as error:
        raise EngineError(f"{path}: onnxruntime cannot load it: {error}") from error


def open_proto(model: "ModelProto", folder: Path) -> Any:
    """A session on the CPU of `model`, which is in memory; its weights are files in `folder`.

    Raises EngineError when the graph cannot be loaded, or ONNX Runtime is older than 1.21."""
    ort = import_onnxruntime("cpu")
    options = quiet_options(ort)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except Exception as error:
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < IN_MEMORY_SINCE:
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot load parts of a graph: pip install 'onnxruntime>=1.21'"
            ) from error
        raise EngineError(f"{folder}: onnxruntime cannot load a part of its graph: {error}") from error


def import_onnxruntime(device: str, *, allow_cpu: bool = False) -> Any:
    """The module onnxruntime, able to use `device` (unless `allow_cpu`), with its telemetry off. cascadekit imports
    onnxruntime here alone. Raises EngineError that says what to install."""
    switch_off_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        reraise_interrupt(error)
        raise EngineError(f"ONNX Runtime is not installed: pip install 'cascadekit[{EXTRAS[device]}]'") from error
    silence(onnxruntime)
    wanted = PROVIDERS[device][0]
    if wanted not in onnxruntime.get_available_providers() and not allow_cpu:
        advice = onnxruntime_conflict() or (
            f"pip uninstall onnxruntime, then pip install 'cascadekit[{EXTRAS[device]}]'"
        )
        raise EngineError(f"this ONNX Runtime has no {wanted}: {advice}")
    if device != "cpu":
        onnxruntime.set_default_logger_severity(FATAL)  # its coloured messages repeat what the exceptions say
        if hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):  # it prints which CUDA libraries are not in packages
                onnxruntime.preload_dlls()
    return onnxruntime

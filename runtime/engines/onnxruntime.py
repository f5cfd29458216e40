"""Runs the graphs of a bundle with ONNX Runtime, on the CPU or on a GPU."""

import contextlib
import ctypes
import io
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.bundle import MAIN_GRAPH, GraphEntry
from ...schemas.errors import EngineError, reraise_interrupt
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ...storage.hub_cache_links import without_links
from ..memory.give_back import give_back_memory
from .base import HostRunner, Run, Tensors, check_inputs, with_absent_control
from .installs import onnxruntime_conflict
from .telemetry import silence, switch_off_telemetry
from .tensorrt.nvidia import cache_folder

if TYPE_CHECKING:
    from onnx import ModelProto

Outputs = dict[str, NDArray[Any]]

CPU = "CPUExecutionProvider"
# By device, the provider that is to run a graph and the one for what it does not know; "tensorrt" is the GPU too.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
EXTRAS = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu"}
MEMORY_POLICIES = ("fast", "mapped")
IN_MEMORY_SINCE = (1, 21)  # graphs in memory with weights in files

# Where a network's time goes. Other operators may well be on the CPU: it computes shapes there on purpose.
HEAVY = ("Attention", "Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "MultiHeadAttention")
FATAL = 4  # of onnxruntime's severities
REASON_LENGTH = 400
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"


class OnnxRuntimeEngine:
    """An engine for every stage of `bundle` on `device`: "cpu", "cuda", or "tensorrt", which is the GPU through ONNX
    Runtime's TensorRT provider (it builds engines of its own, minutes each, and keeps them in the user's cache folder).

    `memory` says where the weights are. "fast": in memory, once, cast and rearranged as the kernels like them.
    "mapped": in their files, which the system reads in and drops as it likes; weights stored in 16 bits are cast anew
    in every pass, and memory goes back to the system after each operation. `threads` None leaves their number to
    ONNX Runtime. `allow_cpu` lets it compute on the CPU what it cannot on the GPU, which is an error otherwise.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        memory: str = "fast",
        threads: int | None = None,
        allow_cpu: bool = False,
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
                f"export it with --precision {stage}=fp32, or run it with --device cuda"
            )
        with without_links(self.bundle.graph(stage, graph)) as path:
            session = self._start(stage, path)
        on_device = self._check_placement(stage, session)
        give_back_memory()
        return OnnxRuntimeStage(stage, entry.graphs[graph], session, self._ort if on_device else None)

    def _start(self, stage: Stage, path: Path) -> Any:
        """A session; on the CPU where it may be there and cannot be elsewhere."""
        chosen = self._providers()
        for providers in (chosen, [CPU]) if self.allow_cpu else (chosen,):
            options, disabled = self._options()
            try:
                # Its own fallback prints what went wrong, and goes on.
                return self._ort.InferenceSession(
                    path, options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
                )
            except Exception as error:  # onnxruntime raises a class of its own for each status code
                failed = error
        reason = " ".join(str(failed).split())[:REASON_LENGTH]
        raise EngineError(f"{path}: onnxruntime cannot load the {stage}: {reason}") from failed

    def _options(self) -> tuple[Any, list[str]]:
        """Session options, and the names of optimizers to do without."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only: what matters comes as an exception
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.device != "cpu":
            options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
        # Every session has an arena of its own: one that they share keeps what a stage has needed after that is closed,
        # 2.4 GB of a vqgan at 1024x1024.
        if self.memory == "fast":
            return options, []
        options.add_session_config_entry("session.disable_prepacking", "1")  # each would be a copy in memory
        options.enable_cpu_mem_arena = False  # it would keep the casts of all weights
        return options, ["ConstantFolding"]  # it would cast them for good

    def _providers(self) -> list[str | tuple[str, dict[str, Any]]]:
        """The providers with their options, of those that this ONNX Runtime has."""
        cache = str(cache_folder("onnxruntime"))
        options: Mapping[str, dict[str, Any]] = {
            "TensorrtExecutionProvider": {
                "trt_engine_cache_enable": True,
                "trt_engine_cache_path": cache,
                "trt_timing_cache_enable": True,
                "trt_timing_cache_path": cache,
            }
        }
        available = self._ort.get_available_providers()
        named = [name for name in PROVIDERS[self.device] if name in available]
        chosen: list[str | tuple[str, dict[str, Any]]] = [
            (name, options[name]) if name in options else name for name in named
        ]
        return [*chosen, CPU] if self.allow_cpu and CPU not in named else chosen

    def _check_placement(self, stage: Stage, session: Any) -> bool:
        """Whether the session is on the GPU. Raises EngineError where it should be and is not, or is in part."""
        wanted = PROVIDERS[self.device][0]
        if wanted == CPU:
            return False
        started = session.get_providers()
        if wanted not in started:  # it goes on with what is left, in silence
            if self.allow_cpu:
                return any(name != CPU for name in started)
            reason = provider_problem(self._ort, wanted) or "check the driver with nvidia-smi"
            raise EngineError(
                f"{stage}: onnxruntime did not start its {wanted} and would compute on the CPU: {reason}; "
                f"pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA's libraries, --allow-cpu does without"
            )
        left = operators_on_cpu(session)
        if left and not self.allow_cpu:
            what = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
            raise EngineError(
                f"{stage}: {wanted} has no kernels for some of its operators and left {what} to the CPU; "
                f"export it in another precision, or --allow-cpu"
            )
        return True


class OnnxRuntimeStage(HostRunner):
    """One stage's session; `device_ort` is the module where the session is on a GPU."""

    def __init__(self, stage: Stage, entry: GraphEntry, session: Any, device_ort: Any = None) -> None:
        self.stage = stage
        self.entry = entry
        self._session = session
        self._device_ort = device_ort

    def __call__(self, inputs: Tensors) -> Outputs:
        inputs = self._complete(inputs)
        names = [port.name for port in self.entry.outputs]
        return dict(zip(names, self._failing(lambda: self._session.run(names, dict(inputs))), strict=True))

    def bind(self, constants: Tensors) -> Run:
        if self._device_ort is None:
            return super().bind(constants)
        fixed = dict(constants)
        ort = self._device_ort
        binding = self._session.io_binding()

        def place() -> None:
            for name, array in fixed.items():
                value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
                binding.bind_ortvalue_input(name, value)

        self._failing(place)
        return lambda inputs: self._run_bound(binding, fixed, inputs)

    def close(self) -> None:
        self._session = None
        give_back_memory()  # the session holds gigabytes; do not wait for the collector

    def _run_bound(self, binding: Any, fixed: Tensors, inputs: Tensors) -> Outputs:
        everything = self._complete({**fixed, **inputs})
        given = {name: np.ascontiguousarray(array) for name, array in everything.items() if name not in fixed}
        names = [port.name for port in self.entry.outputs]

        def run() -> list[NDArray[Any]]:
            for name, array in given.items():
                binding.bind_cpu_input(name, array)
            for name in names:
                binding.bind_output(name)  # anew: its size may be another
            self._session.run_with_iobinding(binding)
            arrays: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
            return arrays

        return dict(zip(names, self._failing(run), strict=True))

    def _complete(self, inputs: Tensors) -> Tensors:
        inputs = with_absent_control(self.entry.inputs, inputs)
        check_inputs(self.stage, self.entry.inputs, inputs)
        return inputs

    def _failing(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise EngineError(f"{self.stage}: onnxruntime failed: {error}") from error


def provider_problem(ort: Any, provider: str) -> str | None:
    """Why the library of a GPU provider cannot be loaded, as the system says; None when it can, or is not there."""
    folder = Path(ort.__file__).parent / "capi"
    pattern = "onnxruntime_providers_{}.dll" if sys.platform == "win32" else "libonnxruntime_providers_{}.so"
    library = folder / pattern.format(provider.removesuffix("ExecutionProvider").lower())
    if not library.is_file():
        return None
    try:
        ctypes.CDLL(str(folder / pattern.format("shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def operators_on_cpu(session: Any) -> Counter[str]:
    """How many operators that matter, by kind, the session left to the CPU. None are known of an ONNX Runtime that does
    not tell (before 1.24)."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Counter()
    parts = session.get_provider_graph_assignment_info()
    on_cpu = (node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes())
    return Counter(kind for kind in on_cpu if kind in HEAVY)


def open_session(path: Path) -> Any:
    """A session of any graph on the CPU, for a short run. Raises EngineError when it cannot be loaded."""
    ort = import_onnxruntime("cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=[CPU])
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
        return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except Exception as error:
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < IN_MEMORY_SINCE:
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot load parts of a graph: pip install 'onnxruntime>=1.21'"
            ) from error
        raise EngineError(f"{folder}: onnxruntime cannot load a part of its graph: {error}") from error


def import_onnxruntime(device: str, *, allow_cpu: bool = False) -> Any:
    """The module, able to use `device` unless the CPU will do, and silent about its use. Every import of it in
    cascadekit is this one. Raises EngineError saying what to install."""
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
        onnxruntime.set_default_logger_severity(FATAL)  # it colours standard error with what we say in one line
        if hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):  # it prints which of CUDA's libraries are not in packages
                onnxruntime.preload_dlls()
    return onnxruntime

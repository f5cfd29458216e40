"""Runs the graphs of a bundle with ONNX Runtime, on the CPU or on a GPU."""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas.callbacks import Say, ignored
from ...schemas.errors import EngineError, reraise_interrupt
from ...schemas.hoisted import FASTER_IN_PARTS, FEWER_KERNELS_IN_PARTS
from ...schemas.manifest import MAIN_GRAPH, GraphEntry
from ...schemas.messages import one_line
from ...schemas.precision import Precision
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ...storage.hub_cache_links import without_links
from ...storage.install_hint import install_hint
from ..memory.give_back import give_back_memory
from .cuda_graphs import GPU
from .device_arrays import DeviceMemory
from .environment_threads import environment_threads
from .installed_packages import onnxruntime_conflict, provider_problem
from .omitted_inputs import require_inputs_named, require_inputs_named_in
from .onnxruntime_gpu import GpuStage
from .protocol import REASON_LENGTH, HostRunner, Outputs, StageRunner, Tensors, complete_inputs
from .provider_options import CAPTURED, CUDA_PROVIDER, GPU_SESSION, TENSORRT_PROVIDER, provider_options
from .telemetry import silence, switch_off_telemetry

if TYPE_CHECKING:
    from onnx import ModelProto

CPU = "CPUExecutionProvider"
# The execution providers of a device: the first runs the graph, the second the operators that the first does not know.
# "tensorrt" is the GPU, too.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA_PROVIDER,),
    "tensorrt": (TENSORRT_PROVIDER, CUDA_PROVIDER),
}
EXTRAS = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "gpu"}
# The first two optimizers would keep weights that they have cast; the second casts fp16 alone. The third merges equal
# casts: the weight of a module that runs twice would be cast once, and kept in between.
FOLDING = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer", "CommonSubexpressionElimination")
IN_MEMORY_SINCE = (1, 21)  # the version that first loads a graph from memory with its weights in files

# The operators that take the time of a network. Others may run on the CPU, where ONNX Runtime computes shapes.
HEAVY = ("Attention", "Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "MultiHeadAttention")
ERROR, FATAL = 3, 4  # severities of ONNX Runtime's log


class OnnxRuntimeEngine:
    """An engine for every stage of `bundle`.

    `device` is "cpu", "cuda" or "tensorrt". The last is the GPU through ONNX Runtime's TensorRT provider. It builds
    engines of its own, which takes minutes for each, and keeps them in the user's cache folder.

    One copy of the weights is in memory, cast and rearranged for the kernels. With `mapped` they stay in their files,
    which the system reads and drops as it likes. Weights stored in 16 bits are then cast in every pass, and memory is
    returned to the system after each operation.

    `threads=None` leaves their number to OMP_NUM_THREADS, and without it to ONNX Runtime. With `allow_cpu` the CPU runs
    operators that the GPU cannot run; without it they are an error.

    With `cuda_graph` the steps of prior and decoder are captured as CUDA graphs on "cuda". `tf32` lets the GPU multiply
    fp32 in ten bits. `say` is called with a line for the user."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        mapped: bool = False,
        threads: int | None = None,
        allow_cpu: bool = False,
        cuda_graph: bool = True,
        tf32: bool = False,
        say: Say = ignored,
    ) -> None:
        """Raises EngineError for an unknown device, or without ONNX Runtime or the provider of `device`."""
        if device not in PROVIDERS:
            raise EngineError(f"device {device!r}: expected one of {', '.join(PROVIDERS)}")
        self.bundle = bundle
        self.device = device
        self.precision: Precision | None = None
        self.mapped = mapped
        self.threads = threads
        self.allow_cpu = allow_cpu
        self.cuda_graph = cuda_graph and device == "cuda"
        self.in_parts = FEWER_KERNELS_IN_PARTS if device == "cuda" else FASTER_IN_PARTS
        self.tf32 = tf32
        self._say = say
        self._memories: dict[Stage, DeviceMemory] = {}
        self.name = "onnxruntime" + "-mapped" * mapped + "-tensorrt" * (device == "tensorrt")
        self._ort = import_onnxruntime(device, allow_cpu=allow_cpu)

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return tuple(self.bundle.entry(stage).graphs)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        entry = self.bundle.entry(stage)
        if entry.precision is Precision.BF16 and self.device == "cpu":
            raise EngineError(
                f"{stage}: its graphs compute in bf16, for which onnxruntime has no CPU kernels; "
                f'set device="cuda", or export it again: cascadekit export MODEL -o BUNDLE --precision {stage}=fp32'
            )
        captures = self.cuda_graph and (stage, graph) in CAPTURED
        with GPU if self.device != "cpu" else contextlib.nullcontext():
            with without_links(self.bundle.graph(stage, graph)) as path:
                require_inputs_named(path)
                nhwc = entry.precision is Precision.FP16
                session, captures = self._start(stage, path, captures=captures, nhwc=nhwc)
            on_device = self._check_placement(stage, session)
        give_back_memory()
        if not on_device:
            return OnnxRuntimeStage(stage, entry.graphs[graph], session)
        memory = self._memories.setdefault(stage, DeviceMemory(self._ort))
        return GpuStage(stage, entry.graphs[graph], session, memory, captures=captures, say=self._say)

    def _start(self, stage: Stage, path: Path, *, captures: bool, nhwc: bool) -> tuple[Any, bool]:
        """A session on the device, and whether it is made for CUDA graphs: if it refuses them, it is made without.

        With `allow_cpu` the session is on the CPU if it cannot be on the device."""
        attempts = [
            (self._providers(cuda_graph=wanted, nhwc=nhwc), wanted)
            for wanted in ((True, False) if captures else (False,))
        ]
        if self.allow_cpu:
            attempts.append(([(CPU, {})], False))
        refused = None
        for providers, cuda_graph in attempts:
            options, disabled = self._options()
            try:  # ONNX Runtime's own fallback would print an error and go on
                session = self._ort.InferenceSession(
                    path, options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
                )
            except Exception as error:  # onnxruntime has an exception class for each status code
                failed, reason = error, one_line(error, REASON_LENGTH)
                refused = reason if cuda_graph else refused
                continue
            if refused:
                self._say(f"{stage}: runs without a CUDA graph, because onnxruntime refuses it: {refused}")
            return session, cuda_graph
        raise EngineError(f"{path}: onnxruntime cannot load the {stage}: {reason}") from failed

    def _options(self) -> tuple[Any, list[str]]:
        """Session options, and the names of the optimizers to switch off."""
        options = quiet_options(self._ort)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.device != "cpu":
            for name, value in GPU_SESSION.items():
                options.add_session_config_entry(name, value)
        # Each session has an arena of its own. A shared arena would keep what a stage needed after the stage is
        # closed: 2.4 GB of a vqgan at 1024x1024.
        return options, keep_mapped(options) if self.mapped else []

    def _providers(self, *, cuda_graph: bool, nhwc: bool) -> list[tuple[str, dict[str, str]]]:
        """The device's providers that this ONNX Runtime has, with their options."""
        wanted = [*PROVIDERS[self.device], *([CPU] if self.allow_cpu and self.device != "cpu" else [])]
        available = {*self._ort.get_available_providers(), CPU}
        return [
            (name, provider_options(name, tf32=self.tf32, cuda_graph=cuda_graph, nhwc=nhwc))
            for name in wanted
            if name in available
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
    """The session of one stage on the CPU."""

    def __init__(self, stage: Stage, entry: GraphEntry, session: Any) -> None:
        self.stage = stage
        self.entry = entry
        self._session = session
        self._outputs = [port.name for port in entry.outputs]

    def __call__(self, inputs: Tensors) -> Outputs:
        given = complete_inputs(self.stage, self.entry.inputs, inputs)
        try:
            found = self._session.run(self._outputs, dict(given))
        except Exception as error:
            raise EngineError(f"{self.stage}: onnxruntime failed: {one_line(error, REASON_LENGTH)}") from error
        # An array lies in the session's arena and keeps all of it in memory, also after the session is closed.
        return {name: np.array(value) for name, value in zip(self._outputs, found, strict=True)}

    def close(self) -> None:
        self._session = None
        give_back_memory()


def operators_on_cpu(session: Any) -> Counter[str]:
    """The number of HEAVY operators of each kind that the session left to the CPU.

    The count is empty for an ONNX Runtime before 1.24, which does not say where operators run."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Counter()
    parts = session.get_provider_graph_assignment_info()
    on_cpu = (node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes())
    return Counter(kind for kind in on_cpu if kind in HEAVY)


def quiet_options(ort: Any) -> Any:
    """Session options that log errors alone: everything that matters is raised as an exception.

    A session has the threads that the environment allows, else as many as ONNX Runtime likes."""
    options = ort.SessionOptions()
    options.log_severity_level = ERROR
    options.intra_op_num_threads = environment_threads()
    return options


def keep_mapped(options: Any) -> list[str]:
    """Set `options` to leave weights in their files; returns the names of the optimizers to switch off."""
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are copies in memory
    options.enable_cpu_mem_arena = False  # an arena would keep the casts of all weights
    return list(FOLDING)


def open_session(path: Path, device: str = "cpu") -> Any:
    """A session of any graph for a short run, on "cpu" or "cuda".

    On the CPU its weights stay in their files; on the GPU they are as they were stored.

    Raises EngineError when it cannot be loaded."""
    ort = import_onnxruntime(device)
    options = quiet_options(ort)
    disabled = keep_mapped(options)
    require_inputs_named(path)
    providers = [(name, provider_options(name)) for name in dict.fromkeys((*PROVIDERS[device], CPU))]
    try:
        return ort.InferenceSession(path, options, providers=providers, disabled_optimizers=disabled, enable_fallback=0)
    except Exception as error:
        raise EngineError(f"{path}: onnxruntime cannot load it: {one_line(error, REASON_LENGTH)}") from error


def open_proto(model: "ModelProto", folder: Path) -> Any:
    """A session on the CPU of `model`, which is in memory; its weights are files in `folder`.

    Raises EngineError when the graph cannot be loaded, or ONNX Runtime is older than 1.21."""
    ort = import_onnxruntime("cpu")
    options = quiet_options(ort)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    content = model.SerializeToString()
    require_inputs_named_in(content, str(folder))
    try:
        return ort.InferenceSession(content, options, providers=[CPU])
    except Exception as error:
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < IN_MEMORY_SINCE:
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot load parts of a graph: pip install 'onnxruntime>=1.21'"
            ) from error
        reason = one_line(error, REASON_LENGTH)
        raise EngineError(f"{folder}: onnxruntime cannot load a part of its graph: {reason}") from error


def import_onnxruntime(device: str, *, allow_cpu: bool = False) -> Any:
    """The module onnxruntime, able to use `device` (unless `allow_cpu`), with its telemetry off. cascadekit imports
    onnxruntime here alone. Raises EngineError that says what to install."""
    switch_off_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        reraise_interrupt(error)
        raise EngineError(f"ONNX Runtime is not installed: {install_hint(EXTRAS[device])}") from error
    silence(onnxruntime)
    wanted = PROVIDERS[device][0]
    if wanted not in onnxruntime.get_available_providers() and not allow_cpu:
        advice = onnxruntime_conflict() or (f"pip uninstall onnxruntime, then {install_hint(EXTRAS[device])}")
        raise EngineError(f"this ONNX Runtime has no {wanted}: {advice}")
    if device != "cpu":
        onnxruntime.set_default_logger_severity(FATAL)  # its coloured messages repeat what the exceptions say
        if hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):  # it prints which CUDA libraries are not in packages
                onnxruntime.preload_dlls()
    return onnxruntime

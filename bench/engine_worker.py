"""The process that measures one engine: loads a stage, runs it, and prints its measurements as one line of JSON."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..converters.checkpoints.open_model import open_model
from ..runtime.engines.engine_table import make_engine
from ..runtime.engines.onnxruntime import OnnxRuntimeStage, import_onnxruntime
from ..runtime.engines.openvino import import_openvino
from ..runtime.engines.protocol import StageRunner
from ..runtime.memory.free_memory import byte_fields
from ..runtime.sampling.denoiser import HoistedStage, prepare
from ..schemas.hoisted import CONDITIONING, STEP
from ..schemas.manifest import MAIN_GRAPH
from ..schemas.ports import ports_of
from ..schemas.stages import Stage
from ..storage.bundle import open_bundle
from .process import WorkerJob

GEMM = "gemm"
GEMM_SHAPE = (1152, 1536, 6144)  # of the widest products of the lite prior at 1024x1024 with guidance
GEMM_SECONDS = 0.7  # for each dtype


@dataclass(frozen=True)
class EngineJob(WorkerJob):
    """`runs` forwards of one stage on one engine."""

    engine: str
    stage: str
    source: str  # the checkpoint, for engines that read it
    bundle: str
    inputs: str  # .npz, an array for each port
    outputs: str  # .npz to write
    folder: str  # for files that an engine writes

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"TORCHINDUCTOR_CACHE_DIR": str(Path(self.folder) / "inductor")}


# Libraries that report their use to their makers unless they are imported in this way.
IMPORTS: Mapping[str, Callable[[], Any]] = {
    "onnxruntime": lambda: import_onnxruntime("cpu"),
    "openvino": import_openvino,
}


def main() -> None:
    job = EngineJob(**json.loads(sys.argv[1]))
    print(json.dumps({"rates": _gemm_rates()} if job.engine == GEMM else _measure(job)))


def _measure(job: EngineJob) -> dict[str, Any]:
    inputs = dict(np.load(job.inputs))
    os.chdir(job.folder)
    load, needs = LOADERS[job.engine]
    for name in needs:
        IMPORTS[name]() if name in IMPORTS else import_module(name)  # before the clock: an import is no part of loading
    start = perf_counter()
    runner = load(job)
    loaded, rss = perf_counter() - start, resident()
    outputs = runner(inputs)  # compiles, packs, grows its memory
    first = perf_counter() - start - loaded
    seconds, cpu = [], []
    for _ in range(job.runs):
        wall, own = perf_counter(), process_time()
        outputs = runner(inputs)
        seconds.append(perf_counter() - wall)
        cpu.append(process_time() - own)
    save_arrays(Path(job.outputs), outputs)
    return {
        "load_seconds": loaded,
        "first_seconds": first,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rss_after_load": rss,
        "rss_after_runs": resident(),
        "version": version(needs[0]),
    }


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` to `path` as .npz."""
    np.savez(path, allow_pickle=False, **arrays)


def resident() -> dict[str, int]:
    """Bytes in memory: the process's own, and pages of files, which the system may drop."""
    fields = byte_fields(Path("/proc/self/status"))
    return {"anonymous": fields["RssAnon"], "file": fields["RssFile"]}


def _bundled(name: str) -> Callable[[EngineJob], StageRunner]:
    return lambda job: make_engine(name, open_bundle(Path(job.bundle)), threads=job.threads).load(Stage(job.stage))


def _hoisted(name: str) -> Callable[[EngineJob], StageRunner]:
    """The step graph; its conditions are computed before the measurement."""

    def loaded(job: EngineJob) -> StageRunner:
        engine, stage = make_engine(name, open_bundle(Path(job.bundle)), threads=job.threads), Stage(job.stage)
        inputs = dict(np.load(job.inputs))
        ratios = inputs["timestep_ratio"]
        conditions = {port: value for port, value in inputs.items() if port not in ("sample", "timestep_ratio")}
        with engine.load(stage, CONDITIONING) as first:
            prepared = dict(prepare(first, stage, inputs["sample"], conditions, ratios))
        return HoistedStage(engine.load(stage, STEP), prepared, ratios)

    return loaded


def _reference(dtype: str, *, compiled: bool = False) -> Callable[[EngineJob], StageRunner]:
    def loaded(job: EngineJob) -> StageRunner:
        from ..parity.reference.loading import reference_engine

        stage = Stage(job.stage)
        return reference_engine(open_model([Path(job.source)]), [stage], dtype=dtype, compiled=compiled).load(stage)

    return loaded


def _diffusers(dtype: str) -> Callable[[EngineJob], StageRunner]:
    def loaded(job: EngineJob) -> StageRunner:
        from ..parity.reference.loading import independent_engine

        stage = Stage(job.stage)
        return independent_engine(open_model([Path(job.source)]), [stage], dtype=dtype).load(stage)

    return loaded


def _traced(job: EngineJob) -> StageRunner:
    """The reference network, exported by torch."""
    session = import_onnxruntime("cpu")
    options = session.SessionOptions()
    options.intra_op_num_threads = job.threads
    loaded = session.InferenceSession(traced_graph(job), options, providers=["CPUExecutionProvider"])
    stage = Stage(job.stage)
    return OnnxRuntimeStage(stage, open_bundle(Path(job.bundle)).entry(stage).graphs[MAIN_GRAPH], loaded)


def traced_graph(job: EngineJob) -> Path:
    """The path of the traced graph; the first worker writes it, before any engine is measured."""
    path = Path(job.folder) / "traced.onnx"
    if not path.exists():
        import torch

        from ..parity.reference.loading import load_component

        component = open_model([Path(job.source)]).component(Stage(job.stage))
        names = [port.name for port in ports_of(component.config).outputs]
        tensors = {name: torch.from_numpy(array) for name, array in np.load(job.inputs).items()}
        torch.onnx.export(
            load_component(component),
            (),
            path,
            kwargs=tensors,
            output_names=names,
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    return path


def _gemm_rates() -> dict[str, float]:
    """Multiply-adds per second of a product like the prior's, for each installed library and dtype."""
    rates = {"numpy fp32": _numpy_rate()}
    if find_spec("torch") is not None:
        rates["torch fp32"] = _torch_rate("float32")
        rates["torch bf16"] = _torch_rate("bfloat16")
    return rates


def _torch_rate(dtype: str) -> float:
    """Multiply-adds per second of torch.mm, the best of as many products as fit into GEMM_SECONDS."""
    import torch

    rows, inner, columns = GEMM_SHAPE
    kind = getattr(torch, dtype)
    a, b = torch.rand(rows, inner).to(kind), torch.rand(columns, inner).to(kind).T  # as a Linear has them
    begin = perf_counter()
    torch.mm(a, b)
    best = perf_counter() - begin  # counts where no second product fits, as in bf16 on CPUs that emulate it
    while perf_counter() < begin + GEMM_SECONDS:
        start = perf_counter()
        torch.mm(a, b)
        best = min(best, perf_counter() - start)
    return rows * inner * columns / best


def _numpy_rate() -> float:
    rows, inner, columns = GEMM_SHAPE
    random = np.random.default_rng(0)
    a, b = random.random((rows, inner), np.float32), random.random((columns, inner), np.float32).T
    best = float("inf")
    end = perf_counter() + GEMM_SECONDS
    while perf_counter() < end:
        start = perf_counter()
        a @ b
        best = min(best, perf_counter() - start)
    return rows * inner * columns / best


ONNXRUNTIME, OPENVINO, TORCH, DIFFUSERS = ("onnxruntime",), ("openvino",), ("torch",), ("diffusers", "torch")

# The loader of each engine, and the packages it needs; the version of the first one is reported.
LOADERS: Mapping[str, tuple[Callable[[EngineJob], StageRunner], tuple[str, ...]]] = {
    "onnxruntime": (_bundled("onnxruntime"), ONNXRUNTIME),
    "onnxruntime-hoisted": (_hoisted("onnxruntime"), ONNXRUNTIME),
    "onnxruntime-mapped": (_bundled("onnxruntime-mapped"), ONNXRUNTIME),
    "onnxruntime-traced": (_traced, (*ONNXRUNTIME, *TORCH, "onnxscript")),
    "openvino": (_bundled("openvino"), OPENVINO),
    "openvino-bf16": (_bundled("openvino-bf16"), OPENVINO),
    "openvino-bf16-hoisted": (_hoisted("openvino-bf16"), OPENVINO),
    "torch": (_reference("F32"), TORCH),
    "torch-bf16": (_reference("BF16"), TORCH),
    "torch-compiled": (_bundled("torch-compiled"), TORCH),
    "aotinductor": (_bundled("aotinductor"), TORCH),
    "torch-compile": (_reference("F32", compiled=True), TORCH),
    "torch-compile-bf16": (_reference("BF16", compiled=True), TORCH),
    "diffusers": (_diffusers("F32"), DIFFUSERS),
    "diffusers-bf16": (_diffusers("BF16"), DIFFUSERS),
}

"""Measures networks of diffusers and transformers: eager, as a CUDA graph, compiled; and keeps the reference."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ...schemas.config_json import from_json
from ...schemas.manifest import PortEntry
from ...schemas.messages import one_line
from ...schemas.ports import ports_of
from ...schemas.stages import Stage
from .job import Arrays, GpuJob, relative_l2, stage_inputs
from .phases import SAMPLED, Phase

Pass = Callable[[], dict[str, Any]]
REFERENCE = "float32"
TYPES = ("bfloat16", "float16")
REASON_LENGTH = 300
WARM = 2


def measure_diffusers(job: GpuJob, phase: Phase) -> dict[str, Any]:
    """Milliseconds of one pass by type and mode, the distance of each to fp32 without TF32, and the allocator's peak.

    A type that fails, as fp32 on a small card does, leaves the results of the others."""
    torch = import_module("torch")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {"version": import_module("diffusers").__version__, "torch": torch.__version__}
    reference: Arrays | None = None
    for dtype in (REFERENCE, *(TYPES if job.device == "cuda" else TYPES[:1])):
        try:
            with torch.inference_mode():
                outputs, eager, captured = _measured(torch, job, phase, dtype)
        except RuntimeError as error:
            found[f"{dtype} eager"] = {"error": one_line(error, REASON_LENGTH)}
            continue
        if dtype == REFERENCE:
            reference = outputs
            np.savez(job.reference(phase), **outputs)  # type: ignore[arg-type]
        eager["relative_l2"] = None if reference is None else _distance(outputs, reference)
        found |= {f"{dtype} eager": eager} | ({f"{dtype} CUDA graph": captured} if captured else {})
    return found


def _measured(torch: Any, job: GpuJob, phase: Phase, dtype: str) -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
    """The outputs, and what was measured eager and as a CUDA graph; the network is freed."""
    on_gpu = job.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = _network(torch, job, phase, dtype)
    outputs = _arrays(run())
    eager = {"ms": _milliseconds(torch, run, job)}
    if on_gpu:
        eager["memory_mb"] = torch.cuda.max_memory_allocated() >> 20
    captures = on_gpu and dtype != REFERENCE and phase.stage in SAMPLED
    return outputs, eager, _captured(torch, run, job) if captures else {}


def measure_compiled(job: GpuJob, phase: Phase) -> dict[str, Any]:
    """torch.compile with CUDA graphs, bf16: milliseconds of a pass, and seconds until the first one."""
    if job.device != "cuda":
        return {"missing": "a GPU"}
    torch = import_module("torch")
    with torch.inference_mode():
        began = perf_counter()
        run = _network(torch, job, phase, "bfloat16", compiled=True)
        run()
        torch.cuda.synchronize()
        return {"first_s": perf_counter() - began, "ms": _milliseconds(torch, run, job)}


def _network(torch: Any, job: GpuJob, phase: Phase, dtype: str, *, compiled: bool = False) -> Pass:
    """A pass of the stage's network on fixed inputs that are on the device already."""
    kind = getattr(torch, dtype)
    network = _load(job, phase, kind).to(job.device).eval()
    given = {
        name: tensor.to(kind) if tensor.is_floating_point() else tensor
        for name, array in _inputs(job, phase, network).items()
        for tensor in (torch.from_numpy(array).to(job.device),)
    }
    if phase.stage is Stage.VQGAN:
        scale = network.config.scale_factor
        return lambda: {"images": network.decode(scale * given["latents"]).sample.clamp(0, 1)}
    if phase.stage is Stage.TEXT_ENCODER:
        return lambda: _embeds(network(**given, output_hidden_states=True))
    call = torch.compile(network, mode="reduce-overhead", dynamic=False) if compiled else network
    return lambda: {"noise_pred": call(**given, return_dict=False)[0]}


def _load(job: GpuJob, phase: Phase, kind: Any) -> Any:
    folder = job.model(phase) / str(phase.stage)
    if phase.stage is Stage.TEXT_ENCODER:
        return import_module("transformers").CLIPTextModelWithProjection.from_pretrained(folder, dtype=kind)
    if phase.stage is Stage.VQGAN:
        module = import_module("diffusers.pipelines.deprecated.wuerstchen")
        return module.PaellaVQModel.from_pretrained(folder, torch_dtype=kind)
    return import_module("diffusers").StableCascadeUNet.from_pretrained(folder, torch_dtype=kind)


def _embeds(found: Any) -> dict[str, Any]:
    return {"prompt_embeds": found.hidden_states[-1], "pooled": found.text_embeds[:, None]}


def _inputs(job: GpuJob, phase: Phase, network: Any) -> Arrays:
    """The inputs that the bundle's stage gets, from the network's own config."""
    assert phase.stage is not None
    values: Mapping[str, Any] = network.config if isinstance(network.config, dict) else network.config.to_dict()
    config = from_json(phase.stage, values)
    ports = tuple(PortEntry(name=port.name, dtype=port.dtype, dims=port.dims) for port in ports_of(config).inputs)
    return stage_inputs(ports, phase.stage, job.side, values.get("vocab_size", 0))


def _captured(torch: Any, run: Pass, job: GpuJob) -> dict[str, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        return {"error": one_line(error, REASON_LENGTH)}
    return {"ms": _milliseconds(torch, graph.replay, job)}


def _milliseconds(torch: Any, run: Callable[[], object], job: GpuJob) -> float:
    """The median of `runs` passes, each to its end on the device."""
    return 1e3 * median(_seconds(torch, run, job))


def _seconds(torch: Any, run: Callable[[], object], job: GpuJob) -> Iterator[float]:
    wait = torch.cuda.synchronize if job.device == "cuda" else lambda: None
    for _ in range(WARM):
        run()
    wait()
    for _ in range(job.runs):
        began = perf_counter()
        run()
        wait()
        yield perf_counter() - began


def _arrays(outputs: Mapping[str, Any]) -> Arrays:
    return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}


def _distance(outputs: Arrays, reference: Arrays) -> float | None:
    return relative_l2(outputs, reference) if all(np.isfinite(each).all() for each in outputs.values()) else None

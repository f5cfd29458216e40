"""Predicts the memory that generating images takes at its peak.

Weights are counted exactly. Loading and activations are factors, measured with onnxruntime 1.32 on a CPU in fp32 (lite
stages of real size, 512x512 and 1024x1024). Other engines take about as much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ...schemas.config_json import from_json
from ...schemas.hoisted import CONDITIONING, STEP, attention_ports
from ...schemas.manifest import MAIN_GRAPH, Manifest
from ...schemas.precision import Precision
from ...schemas.settings import Settings
from ...schemas.sizes import latent_sizes
from ...schemas.stages import Stage, UNetConfig
from ...schemas.tensors import expected_tensors, is_counter
from .residency import RESIDENT, MemoryPolicy

BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}
ALWAYS = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)  # every generation runs them
PROCESS = 115 << 20  # the interpreter, numpy and an engine's library
# GPU memory beside weights and activations: CUDA's context, and the libraries' handles and workspaces. An estimate, not
# measured.
CUDA_CONTEXT = 600 << 20
TEXT_TOKENS = 77  # whose keys and values a prior keeps for all steps, see `schemas.hoisted`

# Parts of the names of tensors that only one graph of the prior has, or both. Only the conditioning graph maps
# conditions and timesteps. Both graphs compute keys and values: one those of the conditions, the other its own.
CONDITIONING_ONLY = ("kv_mapper", "clip_", ".mapper")
CONDITIONING_TOO = ("to_k", "to_v")

# The memory that a stage takes while it is loaded, as a factor of its weights: some weights are in memory twice, cast
# and not yet rearranged. The first factor is for the policy "resident", the second for the others.
LOADING: Mapping[Stage, tuple[float, float]] = {Stage.DECODER: (1.45, 1.35)}
LOADING_ELSE = (1.17, 1.05)  # of the other stages

# Activations in bytes for each pixel of one image; guidance counts an image twice. For prior and decoder the factor is
# multiplied by the channels of the first level, which has the widest map.
ACTIVATIONS: Mapping[Stage, float] = {Stage.PRIOR: 0.082, Stage.DECODER: 0.92, Stage.VQGAN: 2480}


@dataclass(frozen=True)
class Peak:
    """The most memory that generating images takes at once, in bytes, and the stage at which it does."""

    nbytes: int
    stage: Stage


def loaded_bytes(manifest: Manifest, stage: Stage, graph: str = MAIN_GRAPH) -> int:
    """Bytes of the weights of one graph of a stage, in the precision it computes in."""
    entry = manifest.stages[stage]
    shapes = expected_tensors(from_json(stage, entry.config))
    count = sum(prod(shape) for name, shape in shapes.items() if not is_counter(name) and _is_in(graph, name))
    return count * BYTES[entry.precision]


def predict_peak(
    manifest: Manifest, policy: MemoryPolicy, settings: Settings, images: int, *, device: str = "cpu"
) -> Peak:
    """The peak for `images` images generated together. It exceeds the budget when the largest stage does not fit.

    With the device "cuda" it is the peak of GPU memory. Weights are copied there once, so loading takes no more."""
    stages = [stage for stage in ALWAYS if stage in manifest.stages]
    runs = [(stage, graph) for stage in stages for graph in _graphs(manifest, stage)]
    alone = {run: loaded_bytes(manifest, *run) for run in runs}
    on_gpu = device == "cuda"
    loading = {run: 0 if on_gpu else _loading(run[0], policy) * alone[run] for run in runs}
    extra = {run: _extra(manifest, run[0], loading[run], settings, images) for run in runs}
    base = CUDA_CONTEXT if on_gpu else PROCESS
    if on_gpu:
        extra |= {run: extra[run] + _kept(manifest, settings, images) for run in runs if run[1] in (CONDITIONING, STEP)}
    if policy == RESIDENT:
        largest = max(runs, key=lambda run: extra[run])
        return Peak(base + sum(alone.values()) + extra[largest], largest[0])
    largest = max(runs, key=lambda run: alone[run] + extra[run])
    peak = alone[largest] + extra[largest]
    return Peak(base + max(peak, min(policy.budget or 0, sum(alone.values()))), largest[0])


def _graphs(manifest: Manifest, stage: Stage) -> tuple[str, ...]:
    has_parts = stage is Stage.PRIOR and {CONDITIONING, STEP} <= manifest.stages[stage].graphs.keys()
    return (CONDITIONING, STEP) if has_parts else (MAIN_GRAPH,)


def _is_in(graph: str, name: str) -> bool:
    apart = any(part in name for part in CONDITIONING_ONLY)
    if graph == CONDITIONING:
        return apart or any(part in name for part in CONDITIONING_TOO)
    return not (apart and graph == STEP)


def _loading(stage: Stage, policy: MemoryPolicy) -> float:
    """The memory that loading takes beyond a stage's weights, as a share of them."""
    resident, sparing = LOADING.get(stage, LOADING_ELSE)
    return (resident if policy == RESIDENT else sparing) - 1


def _kept(manifest: Manifest, settings: Settings, images: int) -> int:
    """Bytes of the keys and values that the prior's conditioning graph leaves on the GPU."""
    config = from_json(Stage.PRIOR, manifest.stages[Stage.PRIOR].config)
    assert isinstance(config, UNetConfig)
    ports = manifest.stages[Stage.PRIOR].graphs[STEP].inputs
    halved = any(port.name.endswith(".keys") and port.dtype != "float32" for port in ports)
    rows = images * (2 if settings.prior.guides else 1)
    tokens = TEXT_TOKENS + 2 * config.clip_seq  # of the pooled text and of one image prompt
    channels = sum(int(port.dims[2]) for port in attention_ports(config))
    return rows * tokens * channels * BYTES[Precision.FP16 if halved else Precision.FP32]


def _extra(manifest: Manifest, stage: Stage, loading: float, settings: Settings, images: int) -> int:
    """Bytes beyond the weights: those for `loading`, or those for running the stage if these are more."""
    entry = manifest.stages[stage]
    config = from_json(stage, entry.config)
    sampling = {Stage.PRIOR: settings.prior, Stage.DECODER: settings.decoder}.get(stage)
    rows = images * (2 if sampling and sampling.guides else 1)
    rows = 1 if stage is Stage.VQGAN else rows  # the vqgan decodes one image at a time
    width = config.block_out_channels[0] if isinstance(config, UNetConfig) else 1
    pixels = prod(latent_sizes(settings.height, settings.width, settings.size_policy).image)
    running = ACTIVATIONS.get(stage, 0) * width * rows * pixels * BYTES[entry.precision] / BYTES[Precision.FP32]
    return int(max(running, loading))

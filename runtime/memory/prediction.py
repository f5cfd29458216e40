"""How much memory a generation takes, told before it starts.

A model, not a measurement: weights are counted exactly, the rest are factors measured with onnxruntime 1.32 on a CPU
in fp32 (lite stages of real size, 512x512 and 1024x1024). Other engines take about as much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ...schemas.bundle import MAIN_GRAPH, Manifest
from ...schemas.config_json import from_json
from ...schemas.hoisted import CONDITIONING, STEP
from ...schemas.precision import Precision
from ...schemas.settings import Settings
from ...schemas.sizes import latent_sizes
from ...schemas.stages import Stage, UNetConfig
from ...schemas.tensors import expected_tensors, is_counter
from .residency import RESIDENT, MemoryPolicy

BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}
ALWAYS = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)  # every generation runs them
PROCESS = 115 << 20  # the interpreter, numpy and an engine's library

# Tensors that the prior's two graphs do not share, by parts of their names: what conditions and timesteps are mapped
# by is the conditioning's, and so are keys and values, which the step needs for its own tokens too.
CONDITIONING_ONLY = ("kv_mapper", "clip_", ".mapper")
CONDITIONING_TOO = ("to_k", "to_v")

# While it is loaded a stage takes this much of its weights: cast and not yet rearranged, some are there twice.
# Where a policy spares memory, less is.
LOADING: Mapping[Stage, float] = {Stage.DECODER: 1.45}
LOADING_ELSE = 1.17
SPARING: Mapping[Stage, float] = {Stage.DECODER: 1.35}
SPARING_ELSE = 1.05

# Activations in bytes for each pixel of one image (with guidance an image counts twice), and of networks with levels
# for each channel of the widest map, the first.
ACTIVATIONS: Mapping[Stage, float] = {Stage.PRIOR: 0.082, Stage.DECODER: 0.92, Stage.VQGAN: 2480}


@dataclass(frozen=True)
class Peak:
    """The most memory a generation takes at once, in bytes, and the stage that takes it."""

    nbytes: int
    stage: Stage


def loaded_bytes(manifest: Manifest, stage: Stage, graph: str = MAIN_GRAPH) -> int:
    """Weights of one graph of a stage, in the type it computes in."""
    entry = manifest.stages[stage]
    shapes = expected_tensors(from_json(stage, entry.config))
    count = sum(prod(shape) for name, shape in shapes.items() if not is_counter(name) and _is_in(graph, name))
    return count * BYTES[entry.precision]


def predict_peak(manifest: Manifest, policy: MemoryPolicy, settings: Settings, images: int) -> Peak:
    """For `images` images drawn together. A budget is kept to only as far as the largest stage fits into it."""
    stages = [stage for stage in ALWAYS if stage in manifest.stages]
    runs = [(stage, graph) for stage in stages for graph in _graphs(manifest, stage)]
    alone = {run: loaded_bytes(manifest, *run) for run in runs}
    extra = {run: _extra(manifest, run[0], _loading(run[0], policy) * alone[run], settings, images) for run in runs}
    if policy == RESIDENT:
        largest = max(runs, key=lambda run: extra[run])
        return Peak(PROCESS + sum(alone.values()) + extra[largest], largest[0])
    largest = max(runs, key=lambda run: alone[run] + extra[run])
    peak = alone[largest] + extra[largest]
    return Peak(PROCESS + max(peak, min(policy.budget or 0, sum(alone.values()))), largest[0])


def _graphs(manifest: Manifest, stage: Stage) -> tuple[str, ...]:
    has_parts = stage is Stage.PRIOR and {CONDITIONING, STEP} <= manifest.stages[stage].graphs.keys()
    return (CONDITIONING, STEP) if has_parts else (MAIN_GRAPH,)


def _is_in(graph: str, name: str) -> bool:
    apart = any(part in name for part in CONDITIONING_ONLY)
    if graph == CONDITIONING:
        return apart or any(part in name for part in CONDITIONING_TOO)
    return not (apart and graph == STEP)


def _loading(stage: Stage, policy: MemoryPolicy) -> float:
    """What loading takes on top of a stage's weights, as a share of them."""
    factors, usual = (LOADING, LOADING_ELSE) if policy == RESIDENT else (SPARING, SPARING_ELSE)
    return factors.get(stage, usual) - 1


def _extra(manifest: Manifest, stage: Stage, loading: float, settings: Settings, images: int) -> int:
    """What comes on top of the weights: bytes for `loading`, or for running where that is more."""
    entry = manifest.stages[stage]
    config = from_json(stage, entry.config)
    guidance = {Stage.PRIOR: settings.prior_guidance, Stage.DECODER: settings.decoder_guidance}.get(stage, 0.0)
    rows = 1 if stage is Stage.VQGAN else images * (2 if guidance > 1 else 1)  # it decodes one by one
    width = config.block_out_channels[0] if isinstance(config, UNetConfig) else 1
    pixels = prod(latent_sizes(settings.height, settings.width, settings.size_policy).image)
    running = ACTIVATIONS.get(stage, 0) * width * rows * pixels * BYTES[entry.precision] / BYTES[Precision.FP32]
    return int(max(running, loading))

"""Predicts the memory that generating images takes at its peak.

Weights are counted exactly. Loading and activations are factors, measured with onnxruntime 1.32 on a CPU in fp32 (lite
stages of real size, 512x512 and 1024x1024). Other engines take about as much.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ...schemas.config_json import from_json
from ...schemas.hoisted import CONDITIONING, STEP, attention_ports
from ...schemas.layer_tensors import inverted_residuals
from ...schemas.manifest import ENCODER_GRAPH, MAIN_GRAPH, Manifest
from ...schemas.precision import Precision
from ...schemas.settings import Settings
from ...schemas.sizes import ROW_AREA, latent_sizes
from ...schemas.stages import (
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    UNetConfig,
    VQGANConfig,
)
from ...schemas.tensors import expected_tensors, is_counter
from .residency import RESIDENT, MemoryPolicy

BYTES = {precision: 4 if precision is Precision.FP32 else 2 for precision in Precision}  # of a value
EFFNET_AREA = 32 * 32  # pixels of the effnet's input for each of the prior's latents
VQGAN_ENCODER = ("in_block", "down_blocks", "vquantizer")  # tensors of the vqgan's encoder; the decoder has the others
PROCESS = 115 << 20  # the interpreter, numpy and an engine's library
# GPU memory beside weights and activations: CUDA's context, and the libraries' handles and workspaces. An estimate, not
# measured.
CUDA_CONTEXT = 600 << 20
TEXT_TOKENS = 77  # whose keys and values a prior keeps for all steps, see `schemas.hoisted`

SESSION = 8 << 20  # what ONNX Runtime takes for its first session beside the weights
PAGE = 4096  # bytes; /proc/self/statm counts pages

# Parts of the names of tensors that only one graph of the prior has, or both. Only the conditioning graph maps
# conditions and timesteps. Both graphs compute keys and values: one those of the conditions, the other its own.
CONDITIONING_ONLY = ("kv_mapper", "clip_", ".mapper")
CONDITIONING_TOO = ("to_k", "to_v")

# The memory that a stage takes while it is loaded, as a factor of its weights. Some weights are in memory twice: cast,
# and also rearranged. The first factor is for the policy "resident", the second for the others.
LOADING: Mapping[Stage, tuple[float, float]] = {Stage.DECODER: (1.45, 1.35)}
LOADING_ELSE = (1.17, 1.05)  # of the other stages

# Activations in bytes for each pixel of one image and each channel of the widest map; guidance counts an image twice.
ACTIVATIONS: Mapping[Stage, float] = {Stage.PRIOR: 0.082, Stage.DECODER: 0.92, Stage.VQGAN: 12.9}
AGAIN = 1.5  # the vqgan's activations from the second image on: ONNX Runtime plans its memory after the first
OUTPUT = 30  # bytes for each pixel of every image that is generated together: float32 twice, and 8 bits

# The stages beside the cascade, likewise in bytes.
BACKBONE = 4.6  # of the effnet encoder and of a ControlNet, for each value of `_backbone_values`
ENCODER = 14.2  # of the vqgan's encoder, for each channel of the widest map
PREVIEW = 700  # of the previewer, for each latent and channel
VISION = 16  # of the image encoder, for each token of a picture and each channel between two Linears


@dataclass(frozen=True)
class Extras:
    """The inputs of an image besides text, as far as they take memory.

    `image_prompts` is the number of pictures. `controls` are the ControlNets. `masks` means inpainting. `previews` are
    made between the steps of the prior."""

    image_prompts: int = 0
    varies: bool = False
    masks: bool = False
    controls: tuple[Stage, ...] = ()
    previews: bool = False


PLAIN = Extras()


@dataclass(frozen=True)
class Peak:
    """The most memory that generating images takes at once, in bytes, and the stage at which it does."""

    nbytes: int
    stage: Stage


@dataclass(frozen=True)
class _GraphRun:
    """A graph that is loaded and run; `beside` are the bytes that another graph in use takes at the same time."""

    stage: Stage
    graph: str = MAIN_GRAPH
    beside: int = 0
    pictures: int = 0


def loaded_bytes(manifest: Manifest, stage: Stage, graph: str = MAIN_GRAPH) -> int:
    """Bytes of the weights of one graph of a stage, in the precision it computes in."""
    entry = manifest.stages[stage]
    shapes = expected_tensors(from_json(stage, entry.config))
    count = sum(prod(shape) for name, shape in shapes.items() if not is_counter(name) and _is_in(stage, graph, name))
    return count * BYTES[entry.precision]


def predict_peak(
    manifest: Manifest,
    policy: MemoryPolicy,
    settings: Settings,
    images: int,
    extras: Extras = PLAIN,
    *,
    device: str = "cpu",
    process: int = PROCESS,
) -> Peak:
    """The peak for `images` images generated together. It exceeds the budget when the largest stage does not fit.

    `process` are the bytes of the process without any stage; see `process_bytes`. With the device "cuda" the result is
    the peak of GPU memory: weights are copied there once, so loading takes no more."""
    on_gpu = device == "cuda"
    base = CUDA_CONTEXT if on_gpu else process
    runs = [run for run in _runs(manifest, extras) if run.stage in manifest.stages]
    alone = {run: loaded_bytes(manifest, run.stage, run.graph) for run in runs}
    loading = {run: 0 if on_gpu else _loading(run.stage, policy) * alone[run] for run in runs}
    extra = {run: _extra(manifest, run, loading[run], settings, images) for run in runs}
    if on_gpu:
        kept = _kept(manifest, settings, images)
        extra |= {run: extra[run] + kept for run in runs if run.graph in (CONDITIONING, STEP)}
    if policy == RESIDENT:  # every session keeps the memory of its activations
        largest = max(runs, key=lambda run: extra[run])
        others = sum(_extra(manifest, run, 0, settings, images) for run in runs if run is not largest)
        return Peak(base + sum(alone.values()) + extra[largest] + others, largest.stage)
    largest = max(runs, key=lambda run: alone[run] + extra[run] + run.beside)
    peak = alone[largest] + extra[largest] + largest.beside
    return Peak(base + max(peak, min(policy.budget or 0, sum(alone.values()))), largest.stage)


def process_bytes() -> int:
    """The memory that this process takes now and that an engine's first session adds; PROCESS where the system does
    not report it. Call it before a stage is loaded."""
    try:
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return PROCESS
    return resident * PAGE + SESSION


def _runs(manifest: Manifest, extras: Extras) -> Iterator[_GraphRun]:
    """The graphs that a generation runs, in their order."""
    yield _GraphRun(Stage.TEXT_ENCODER)
    if extras.image_prompts:
        yield _GraphRun(Stage.IMAGE_ENCODER, pictures=extras.image_prompts)
    if extras.varies or Stage.CONTROLNET_SUPER_RESOLUTION in extras.controls:
        yield _GraphRun(Stage.EFFNET_ENCODER)
    if extras.masks:
        yield _GraphRun(Stage.VQGAN, ENCODER_GRAPH)
    yield from map(_GraphRun, extras.controls)
    graphs = _prior_graphs(manifest)
    yield from (_GraphRun(Stage.PRIOR, graph) for graph in graphs)
    if graphs and extras.previews:  # while the prior is in use
        yield _GraphRun(Stage.PREVIEWER, beside=loaded_bytes(manifest, Stage.PRIOR, graphs[-1]))
    yield _GraphRun(Stage.DECODER)
    yield _GraphRun(Stage.VQGAN)


def _prior_graphs(manifest: Manifest) -> tuple[str, ...]:
    """The graphs that a generation runs of the prior; none without a prior."""
    entry = manifest.stages.get(Stage.PRIOR)
    if entry is None:
        return ()
    return (CONDITIONING, STEP) if {CONDITIONING, STEP} <= entry.graphs.keys() else (MAIN_GRAPH,)


def _is_in(stage: Stage, graph: str, name: str) -> bool:
    """True when a graph of a stage has the tensor called `name`."""
    if stage is Stage.VQGAN:
        encodes = name.startswith(VQGAN_ENCODER)
        return encodes == (graph == ENCODER_GRAPH)
    apart = any(part in name for part in CONDITIONING_ONLY)
    if graph == CONDITIONING:
        return apart or any(part in name for part in CONDITIONING_TOO)
    return not (apart and graph == STEP)


def _loading(stage: Stage, policy: MemoryPolicy) -> float:
    """The memory that loading takes beyond a stage's weights, as a share of them."""
    resident, sparing = LOADING.get(stage, LOADING_ELSE)
    return (resident if policy == RESIDENT else sparing) - 1


def _kept(manifest: Manifest, settings: Settings, images: int) -> int:
    """Bytes of the keys and values that the prior's conditioning graph leaves on the GPU; 0 without that graph."""
    if STEP not in _prior_graphs(manifest):
        return 0
    config = from_json(Stage.PRIOR, manifest.stages[Stage.PRIOR].config)
    assert isinstance(config, UNetConfig)
    ports = manifest.stages[Stage.PRIOR].graphs[STEP].inputs
    halved = any(port.name.endswith(".keys") and port.dtype != "float32" for port in ports)
    rows = images * (2 if settings.prior.guides else 1)
    tokens = TEXT_TOKENS + 2 * config.clip_seq  # of the pooled text and of one image prompt
    channels = sum(int(port.dims[2]) for port in attention_ports(config))
    return rows * tokens * channels * BYTES[Precision.FP16 if halved else Precision.FP32]


def _extra(manifest: Manifest, run: _GraphRun, loading: float, settings: Settings, images: int) -> int:
    """Bytes beyond the weights: those for `loading`, or those for running the stage if these are more."""
    entry = manifest.stages[run.stage]
    width = BYTES[entry.precision] / BYTES[Precision.FP32]
    running = _running(from_json(run.stage, entry.config), run, settings, images) * width
    if run == _GraphRun(Stage.VQGAN):
        running += OUTPUT * images * prod(latent_sizes(settings.height, settings.width, settings.size_policy).image)
    return int(max(running, loading))


def _running(config: NetworkConfig, run: _GraphRun, settings: Settings, images: int) -> float:
    """Bytes of the activations in fp32."""
    sizes = latent_sizes(settings.height, settings.width, settings.size_policy)
    pixels = prod(sizes.image)
    match config:
        case UNetConfig():
            sampling, latents = (
                (settings.prior, sizes.prior) if run.stage is Stage.PRIOR else (settings.decoder, sizes.decoder)
            )
            rows = min(images * (2 if sampling.guides else 1), max(1, ROW_AREA[run.stage] // prod(latents)))
            return ACTIVATIONS[run.stage] * config.block_out_channels[0] * rows * pixels
        case VQGANConfig():  # one image at a time
            decoding = ACTIVATIONS[Stage.VQGAN] * (AGAIN if images > 1 else 1)
            factor = ENCODER if run.graph == ENCODER_GRAPH else decoding
            return factor * config.widths[0] * pixels
        case PreviewerConfig():
            return PREVIEW * config.c_hidden * prod(sizes.prior) * images
        case ImageEncoderConfig():
            tokens = (config.image_size // config.patch_size) ** 2 + 1
            return VISION * config.intermediate_size * tokens * run.pictures
        case EffnetEncoderConfig() | ControlNetConfig():
            return BACKBONE * _backbone_values(config) * prod(sizes.prior) * EFFNET_AREA
    return 0


def _backbone_values(config: EffnetEncoderConfig | ControlNetConfig) -> float:
    """Values of all convolutions' outputs in the backbone, for each pixel of its input.

    The maps differ in size, so ONNX Runtime's arena reuses few of them in its first run."""
    area = 1 / 4  # the stem halves both sides
    values = config.backbone_widths[0] * area
    for block in inverted_residuals(config.backbone_widths, config.backbone_blocks):
        before, area = area, area / block.stride**2
        values += block.out * area
        if not block.fused:
            values += block.inner * (before + area)  # a 1x1, then the depthwise convolution
        elif block.expansion > 1:
            values += block.inner * area
    return values + config.backbone_widths[-1] * area

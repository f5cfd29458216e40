"""What stages are compared on: seeded inputs as a stage meets them when it draws an image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.engines.base import Tensors
from ..runtime.sampling.samplers import alpha_bar
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.bundle import StageEntry
from ..schemas.control import is_control
from ..schemas.profiles import EFFNET_STRIDE
from ..schemas.sizes import latent_sizes
from ..schemas.stages import Stage

F32 = NDArray[np.float32]
Size = tuple[int, int]  # (width, height) of an image

NEGATIVE = "blurry"
PROMPTS = ("", "a shiba inu wearing a beret, oil on canvas", "one, two, three " * 40)
PROMPT = 1  # the one of PROMPTS that images are drawn of
RATIOS = (0.95, 0.5, 0.05)  # timestep ratios: nearly noise, half way, nearly done

# Which samples of a batch are without conditions, as guidance has it: half of them, or none.
GUIDED, PLAIN = True, False


@dataclass(frozen=True)
class Case:
    """One forward pass of a stage. `t` is the timestep ratio of its first sample; None for stages without."""

    stage: Stage
    label: str
    inputs: Tensors
    t: float | None = None


@dataclass(frozen=True)
class Point:
    """Images of a size, and where that lies on an engine's profile; "" for a size that somebody named."""

    size: Size
    place: str = ""

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]} {self.place}"


@dataclass(frozen=True)
class Situation:
    """Sizes of a stage's symbolic dims, and whether the second half of the batch is without conditions."""

    sizes: Mapping[str, int]
    guided: bool = PLAIN


def _prior(batch: int, height: int, width: int, images: int, guided: bool = PLAIN) -> Situation:
    return Situation({"batch": batch, "height": height, "width": width, "tokens": 77, "images": images}, guided)


def _decoder(batch: int, height: int, width: int, effnet: tuple[int, int], guided: bool = PLAIN) -> Situation:
    sizes = {"batch": batch, "height": height, "width": width, "effnet_height": effnet[0], "effnet_width": effnet[1]}
    return Situation(sizes, guided)


def _images(*sizes: tuple[int, int, int]) -> tuple[Situation, ...]:
    return tuple(Situation({"batch": b, "height": h, "width": w}) for b, h, w in sizes)


PHOTOS = _images((1, 128, 128), (2, 101, 67))
MAPS = _images((1, 6, 6), (2, 5, 7))

# Per stage: one small and even, one under guidance and odd in every way that the ports allow, so that each level of the
# decoder has to resize what comes up to it, one more. A stage with timesteps has one of RATIOS in each.
SITUATIONS: Mapping[Stage, tuple[Situation, ...]] = {
    Stage.TEXT_ENCODER: (Situation({"batch": len(PROMPTS)}),),
    Stage.PRIOR: (_prior(1, 6, 6, 1), _prior(2, 5, 7, 1, GUIDED), _prior(2, 9, 4, 2)),
    Stage.DECODER: (
        _decoder(1, 32, 32, (6, 6)),
        _decoder(2, 30, 46, (5, 7), GUIDED),
        _decoder(2, 18, 26, (1, 3)),
    ),
    Stage.VQGAN: _images((1, 32, 32), (2, 9, 13)),
    Stage.IMAGE_ENCODER: (Situation({"batch": 1}), Situation({"batch": 2})),
    Stage.EFFNET_ENCODER: PHOTOS,
    Stage.PREVIEWER: MAPS,
    Stage.CONTROLNET_CANNY: PHOTOS,
    Stage.CONTROLNET_INPAINTING: PHOTOS,
    Stage.CONTROLNET_SUPER_RESOLUTION: MAPS,
    Stage.CONTROLNET_IDENTITY: MAPS,
}


def situations_at(stage: Stage, size: Size) -> tuple[Situation, ...]:
    """The stage as it is met with images of `size`: one that samples once in each of RATIOS, none of the encoders of
    text and image prompts."""
    sizes = latent_sizes(size[1], size[0])
    (prior_height, prior_width), (height, width) = sizes.prior, sizes.decoder
    match stage:
        case Stage.PRIOR:
            return tuple(_prior(1 + guided, prior_height, prior_width, 1, guided) for guided in (PLAIN, GUIDED, PLAIN))
        case Stage.DECODER:
            return tuple(_decoder(1 + g, height, width, sizes.prior, g) for g in (PLAIN, GUIDED, PLAIN))
        case Stage.VQGAN:
            return _images((1, height, width))
        case Stage.PREVIEWER | Stage.CONTROLNET_SUPER_RESOLUTION:
            return _images((1, prior_height, prior_width))
        case Stage.EFFNET_ENCODER:
            return _images((1, prior_height * EFFNET_STRIDE, prior_width * EFFNET_STRIDE))
        case Stage.CONTROLNET_CANNY | Stage.CONTROLNET_INPAINTING:
            return _images((1, size[1], size[0]))
    return ()


ODD = 1  # the one of a stage's situations where most can go wrong; the last where there are fewer
# Zeros where an image is drawn without that condition: always in the half of the batch that is not guided.
IMAGE_PORTS = ("clip_img", "effnet")

Encode = Callable[[Tensors], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Embedded:
    """What the text encoder makes of PROMPTS and NEGATIVE."""

    clip_text: F32  # (prompts + 1, 77, channels)
    pooled: F32  # (prompts + 1, 1, channels)


def embed(encode: Encode, tokenizer: ClipTokenizer) -> Embedded:
    """PROMPTS and NEGATIVE by a text encoder."""
    outputs = encode(tokens_of((*PROMPTS, NEGATIVE), tokenizer))
    return Embedded(outputs["prompt_embeds"], outputs["pooled"])


def tokens_of(texts: Sequence[str], tokenizer: ClipTokenizer) -> dict[str, NDArray[Any]]:
    """The text encoder's inputs for `texts`."""
    tokens = tokenizer(texts)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def cases_of(
    stage: Stage,
    entry: StageEntry,
    tokenizer: ClipTokenizer,
    embedded: Embedded | None = None,
    points: Sequence[Point] = (),
) -> tuple[Case, ...]:
    """The stage's cases: a batch at each of RATIOS, one of them under guidance; prompts by their true embeddings where
    they are `embedded`, else by normal noise. As many more for images at each of `points`."""
    if stage is Stage.TEXT_ENCODER:
        return (Case(stage, f"{len(PROMPTS)} prompts", tokens_of(PROMPTS, tokenizer)),)
    rng = np.random.default_rng(0)
    cases = [
        _case(stage, entry, situation, ratio, embedded, rng)
        for situation, ratio in zip(SITUATIONS[stage], cycle(RATIOS))
    ]
    for point in points:
        for situation, ratio in zip(situations_at(stage, point.size), cycle(RATIOS)):
            case = _case(stage, entry, situation, ratio, embedded, rng)
            cases.append(replace(case, label=f"{case.label}, {point}") if point.place else case)
    return tuple(cases)


def cases_at(
    stage: Stage, entry: StageEntry, tokenizer: ClipTokenizer, ratios: Sequence[float], embedded: Embedded | None = None
) -> tuple[Case, ...]:
    """A stage with timesteps at each of `ratios` in turn in all of its situations; any other's usual cases."""
    cases = cases_of(stage, entry, tokenizer, embedded)
    if cases[0].t is None:
        return cases
    rng = np.random.default_rng(1)
    return tuple(
        _case(stage, entry, situation, ratio, embedded, rng) for ratio in ratios for situation in SITUATIONS[stage]
    )


def odd_case(cases: Sequence[Case]) -> Case:
    """The case where most can go wrong."""
    return cases[min(ODD, len(cases) - 1)]


def _case(
    stage: Stage,
    entry: StageEntry,
    situation: Situation,
    t: float,
    embedded: Embedded | None,
    rng: np.random.Generator,
) -> Case:
    ports = {port.name: port for port in entry.inputs if not is_control(port.name)}
    sizes = situation.sizes
    shapes = {
        name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in port.dims) for name, port in ports.items()
    }
    inputs: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        inputs[name] = rng.standard_normal(shape, dtype=np.float32)
    batch, timed = sizes["batch"], "timestep_ratio" in inputs
    if timed:
        inputs["timestep_ratio"] = np.full(batch, t, np.float32)
        inputs["sample"] = _noised(inputs["sample"], t, rng)
    if embedded is not None:
        _say_prompts(inputs, embedded, guided=situation.guided)
    if situation.guided:
        half = batch // 2
        inputs["sample"][half:] = inputs["sample"][:half]
        for name in IMAGE_PORTS:
            if name in inputs:
                inputs[name][half:] = 0
    label = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
    label = f"t {t}, {label}{', guided' if situation.guided else ''}" if timed else label
    return Case(stage, label, inputs, t if timed else None)


def _noised(x0: F32, t: float, rng: np.random.Generator) -> F32:
    """√ᾱ·x0 + √(1-ᾱ)·ε: latents at ratio `t`."""
    bar = alpha_bar(np.float32(t))
    noise = rng.standard_normal(x0.shape, dtype=np.float32)
    noised: F32 = np.sqrt(bar) * x0 + np.sqrt(np.float32(1) - bar) * noise
    return noised


def _say_prompts(inputs: dict[str, NDArray[Any]], embedded: Embedded, *, guided: bool) -> None:
    """Put prompts in: another for each sample, or under guidance one and its negative."""
    batch = len(inputs["sample"]) if "sample" in inputs else 0
    half, last = batch // 2, len(embedded.pooled) - 1
    rows = [PROMPT] * half + [last] * (batch - half) if guided else [(PROMPT + i) % last for i in range(batch)]
    for name, values in (("clip_text", embedded.clip_text), ("clip_text_pooled", embedded.pooled)):
        if name in inputs:
            inputs[name] = np.ascontiguousarray(values[rows])

"""Makes the inputs that stages are compared on: seeded random numbers shaped and scaled as sampling has them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.engines.protocol import Tensors
from ..runtime.sampling.samplers import alpha_bar
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.control import is_control
from ..schemas.manifest import StageEntry
from ..schemas.profiles import EFFNET_STRIDE
from ..schemas.sizes import latent_sizes
from ..schemas.stages import Stage

F32 = NDArray[np.float32]
Size = tuple[int, int]  # (width, height) of an image

NEGATIVE = "blurry"
PROMPTS = ("", "a shiba inu wearing a beret, oil on canvas", "one, two, three " * 40)
PROMPT = 1  # index in PROMPTS of the prompt that the trajectory generates an image for
RATIOS = (0.95, 0.5, 0.05)  # timestep ratios: almost pure noise, half way, almost no noise

# With guidance, the second half of a batch has no conditions.
GUIDED, PLAIN = True, False


@dataclass(frozen=True)
class StageInput:
    """The inputs of one forward pass of a stage, by port. `t` is the timestep ratio; None for stages without one."""

    stage: Stage
    label: str
    inputs: Tensors
    t: float | None = None


@dataclass(frozen=True)
class SampleSize:
    """An image size to make inputs for. `place` is its position in a plan's profile; "" for a size by name."""

    size: Size
    place: str = ""

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]} {self.place}"


@dataclass(frozen=True)
class Situation:
    """Sizes of a stage's symbolic dims by name, and whether the second half of the batch has no conditions."""

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

# For each stage: small even sizes, then odd sizes with guidance, then one more. With odd sizes each level of the
# decoder has to resize its input. A stage with timesteps gets one of RATIOS in each.
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
    """The dims of a stage for images of `size`: three situations for prior and decoder, one for each of RATIOS.

    Empty for stages whose inputs do not depend on the size of the image."""
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


HARDEST = 1  # index of the situation with odd sizes and guidance; stages with fewer situations use their last
# Ports that are zero without an image prompt, and always zero in the second half of a guided batch.
IMAGE_PORTS = ("clip_img", "effnet")

Encode = Callable[[Tensors], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class EmbeddedPrompts:
    """The text encoder's outputs for PROMPTS and NEGATIVE, in this order."""

    clip_text: F32  # (prompts + 1, 77, channels)
    pooled: F32  # (prompts + 1, 1, channels)


def embed(encode: Encode, tokenizer: ClipTokenizer) -> EmbeddedPrompts:
    """Run the text encoder `encode` on PROMPTS and NEGATIVE."""
    outputs = encode(tokens_of((*PROMPTS, NEGATIVE), tokenizer))
    return EmbeddedPrompts(outputs["prompt_embeds"], outputs["pooled"])


def tokens_of(texts: Sequence[str], tokenizer: ClipTokenizer) -> dict[str, NDArray[Any]]:
    """The text encoder's inputs for `texts`: `input_ids` and `attention_mask`, each (texts, 77)."""
    tokens = tokenizer(texts)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def make_inputs(
    stage: Stage,
    entry: StageEntry,
    tokenizer: ClipTokenizer,
    embedded: EmbeddedPrompts | None = None,
    sizes: Sequence[SampleSize] = (),
) -> tuple[StageInput, ...]:
    """The stage's inputs: a batch at each of RATIOS, one of them with guidance, and as many more for each of `sizes`.

    Prompts are true embeddings where `embedded` is given, else normal noise."""
    if stage is Stage.TEXT_ENCODER:
        return (StageInput(stage, f"{len(PROMPTS)} prompts", tokens_of(PROMPTS, tokenizer)),)
    maker = _InputMaker(stage, entry, embedded, np.random.default_rng(0))
    made = [maker.make(situation, ratio) for situation, ratio in zip(SITUATIONS[stage], cycle(RATIOS))]
    for sample in sizes:
        for situation, ratio in zip(situations_at(stage, sample.size), cycle(RATIOS)):
            one = maker.make(situation, ratio)
            made.append(replace(one, label=f"{one.label}, {sample}") if sample.place else one)
    return tuple(made)


def make_inputs_at(
    stage: Stage,
    entry: StageEntry,
    tokenizer: ClipTokenizer,
    ratios: Sequence[float],
    embedded: EmbeddedPrompts | None = None,
) -> tuple[StageInput, ...]:
    """The stage's inputs in all its situations at each timestep ratio of `ratios`.

    A stage without timesteps has the inputs of `make_inputs`."""
    usual = make_inputs(stage, entry, tokenizer, embedded)
    if usual[0].t is None:
        return usual
    maker = _InputMaker(stage, entry, embedded, np.random.default_rng(1))
    return tuple(maker.make(situation, ratio) for ratio in ratios for situation in SITUATIONS[stage])


def hardest_input(inputs: Sequence[StageInput]) -> StageInput:
    """The input with odd sizes and guidance, which shows most faults."""
    return inputs[min(HARDEST, len(inputs) - 1)]


@dataclass(frozen=True)
class _InputMaker:
    """Makes inputs for one stage of a bundle from one stream of random numbers."""

    stage: Stage
    entry: StageEntry
    embedded: EmbeddedPrompts | None
    rng: np.random.Generator

    def make(self, situation: Situation, t: float) -> StageInput:
        sizes = situation.sizes
        inputs: dict[str, NDArray[Any]] = {}
        for port in self.entry.inputs:
            if not is_control(port.name):
                shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in port.dims)
                inputs[port.name] = self.rng.standard_normal(shape, dtype=np.float32)
        batch, timed = sizes["batch"], "timestep_ratio" in inputs
        if timed:
            inputs["timestep_ratio"] = np.full(batch, t, np.float32)
            inputs["sample"] = _noised(inputs["sample"], t, self.rng)
        if self.embedded is not None:
            _set_prompts(inputs, self.embedded, guided=situation.guided)
        if situation.guided:
            half = batch // 2
            inputs["sample"][half:] = inputs["sample"][:half]
            for name in IMAGE_PORTS:
                if name in inputs:
                    inputs[name][half:] = 0
        label = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
        label = f"t {t}, {label}{', guided' if situation.guided else ''}" if timed else label
        return StageInput(self.stage, label, inputs, t if timed else None)


def _noised(x0: F32, t: float, rng: np.random.Generator) -> F32:
    """√ᾱ·x0 + √(1-ᾱ)·ε: the latents `x0` noised to timestep ratio `t`."""
    bar = alpha_bar(np.float32(t))
    noise = rng.standard_normal(x0.shape, dtype=np.float32)
    noised: F32 = np.sqrt(bar) * x0 + np.sqrt(np.float32(1) - bar) * noise
    return noised


def _set_prompts(inputs: dict[str, NDArray[Any]], embedded: EmbeddedPrompts, *, guided: bool) -> None:
    """Set the text conditions: another prompt for each sample, or with guidance one prompt and its negative."""
    batch = len(inputs["sample"]) if "sample" in inputs else 0
    half, last = batch // 2, len(embedded.pooled) - 1
    rows = [PROMPT] * half + [last] * (batch - half) if guided else [(PROMPT + i) % last for i in range(batch)]
    for name, values in (("clip_text", embedded.clip_text), ("clip_text_pooled", embedded.pooled)):
        if name in inputs:
            inputs[name] = np.ascontiguousarray(values[rows])

"""The cascade: prompt -> embeddings -> prior latents -> decoder latents -> image.

The three pipelines of diffusers are three calls here (`encode_prompt`, `prior`, `decode`), and `generate` is
all of them. With the same seed, sizes and settings the latents follow diffusers' draw for draw.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..schemas.bundle import MAIN_GRAPH, Manifest
from ..schemas.errors import EngineError, UsageError
from ..schemas.sizes import SizePolicy, latent_sizes
from ..schemas.stages import Stage
from .bundle import open_bundle
from .engines.base import Engine, StageRunner, Tensors
from .engines.table import make_engine
from .hoisting import CONDITIONING, STEP, HoistedStage, is_hoisted, prepare
from .images import to_pictures
from .noise import TorchGenerator, randn
from .sampling import Step, guided, sample, timesteps
from .tokenizer import ClipTokenizer

F32 = NDArray[np.float32]

Run = Callable[[Tensors], dict[str, NDArray[Any]]]

Seed = int | Sequence[int] | TorchGenerator | Sequence[TorchGenerator]


@dataclass(frozen=True)
class PromptEmbeds:
    """What the text encoder makes of B prompts and their negatives, all float32."""

    clip_text: F32  # (B, 77, channels)
    pooled: F32  # (B, 1, channels)
    negative_clip_text: F32  # (B, 77, channels)
    negative_pooled: F32  # (B, 1, channels)
    truncated: tuple[str, ...] = ()  # for each prompt, then each negative prompt, the text that did not fit

    def __len__(self) -> int:
        return len(self.clip_text)

    def repeated(self, count: int) -> "PromptEmbeds":
        """Every prompt `count` times in a row."""
        return PromptEmbeds(
            np.repeat(self.clip_text, count, axis=0),
            np.repeat(self.pooled, count, axis=0),
            np.repeat(self.negative_clip_text, count, axis=0),
            np.repeat(self.negative_pooled, count, axis=0),
            self.truncated,
        )


@dataclass(frozen=True)
class Settings:
    """Everything besides the prompts that decides what an image looks like."""

    width: int
    height: int
    prior_steps: int = 20
    prior_guidance: float = 4.0
    decoder_steps: int = 10
    decoder_guidance: float = 0.0
    size_policy: SizePolicy = SizePolicy.EXACT


@dataclass(frozen=True)
class Result:
    """B generated images with the latents they came from and, for each, the settings that made it."""

    images: list[Image.Image]
    prior_latents: F32  # (B, 16, h, w)
    decoder_latents: F32  # (B, 4, h, w)
    settings: list[dict[str, Any]]
    truncated: tuple[str, ...] = ()  # as in PromptEmbeds


class Cascade:
    """The four stages on one engine. A context manager; `close` gives back the memory of loaded stages."""

    def __init__(
        self, engine: Engine, manifest: Manifest, tokenizer: ClipTokenizer, *, keep_loaded: bool = True
    ) -> None:
        """With `keep_loaded` a stage once used stays in memory; without, there is one stage in memory at a time."""
        self.engine = engine
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.keep_loaded = keep_loaded
        self._loaded: dict[tuple[Stage, str], StageRunner] = {}

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        *,
        engine: str = "onnxruntime",
        threads: int | None = None,
        keep_loaded: bool = True,
    ) -> Self:
        """The cascade of an exported bundle on `device`, "cpu" or "cuda".

        `engine` is a name of `engines.table`; "auto" takes the fastest there is, which may compute in bf16, and then
        images differ slightly. `threads` None leaves their number to the engine.
        Raises UsageError when there is no bundle or no such engine, EngineError when nothing can run it."""
        opened = open_bundle(Path(bundle))
        runs = make_engine(engine, opened, device, threads)
        return cls(runs, opened.manifest, ClipTokenizer.open(opened.tokenizer), keep_loaded=keep_loaded)

    def encode_prompt(self, prompt: str | Sequence[str], negative: str | Sequence[str] = "") -> PromptEmbeds:
        """Embed prompts and negative prompts; one negative prompt serves all.

        Raises UsageError when there are neither one nor as many negatives as prompts."""
        prompts, negatives = _texts(prompt), _texts(negative)
        if len(negatives) == 1:
            negatives *= len(prompts)
        if not prompts or len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        tokens = self.tokenizer([*prompts, *negatives])
        with self._stage(Stage.TEXT_ENCODER) as encode:
            outputs = encode({"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask})
        (text, negative_text), (pooled, negative_pooled) = (
            np.split(outputs[name], 2) for name in ("prompt_embeds", "pooled")
        )
        return PromptEmbeds(text, pooled, negative_text, negative_pooled, tokens.truncated)

    def prior(
        self,
        embeds: PromptEmbeds,
        *,
        height: int,
        width: int,
        steps: int = 20,
        guidance: float = 4.0,
        seed: Seed = 0,
        image_embeds: F32 | None = None,
        latents: F32 | None = None,
    ) -> Iterator[Step]:
        """Sample stage C, a Step at a time; the last one's latents (B, 16, h, w) go to `decode`.

        `guidance` above 1 is classifier-free. `image_embeds` (B, n, 768) are image prompts; `latents` replace the
        first draw of noise."""
        channels = self._channels(Stage.PRIOR, "sample")
        shape = (len(embeds), channels, *latent_sizes(height, width).prior)
        if image_embeds is None:
            image_embeds = np.zeros((len(embeds), 1, self._channels(Stage.PRIOR, "clip_img", axis=2)), np.float32)
        conditions = {"clip_text": embeds.clip_text, "clip_text_pooled": embeds.pooled, "clip_img": image_embeds}
        negatives = {
            "clip_text": embeds.negative_clip_text,
            "clip_text_pooled": embeds.negative_pooled,
            "clip_img": np.zeros_like(image_embeds),
        }
        return self._sample(Stage.PRIOR, shape, conditions, negatives, steps, guidance, seed, latents)

    def decode(
        self,
        prior_latents: F32,
        embeds: PromptEmbeds,
        *,
        height: int,
        width: int,
        steps: int = 10,
        guidance: float = 0.0,
        seed: Seed = 0,
        size_policy: SizePolicy = SizePolicy.EXACT,
        latents: F32 | None = None,
    ) -> Iterator[Step]:
        """Sample stage B conditioned on stage C's latents (B, 16, h, w); the last Step's latents go to `pixels`."""
        size = latent_sizes(height, width, size_policy).decoder
        shape = (len(prior_latents), self._channels(Stage.DECODER, "sample"), *size)
        conditions = {"clip_text_pooled": embeds.pooled, "effnet": prior_latents}
        negatives = {"clip_text_pooled": embeds.negative_pooled, "effnet": np.zeros_like(prior_latents)}
        return self._sample(Stage.DECODER, shape, conditions, negatives, steps, guidance, seed, latents)

    def pixels(self, latents: F32) -> F32:
        """Decode stage B's latents (B, 4, h, w) to images (B, 3, 4h, 4w) in 0..1, one at a time to bound memory."""
        with self._stage(Stage.VQGAN) as decode:
            return np.concatenate([decode({"latents": one[None]})["images"] for one in latents])

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        num_images: int = 1,
        seed: int | Sequence[int] | None = None,
        settings: Settings | None = None,
        on_step: Callable[[Stage, Step], object] = lambda stage, step: None,
        **overrides: Any,
    ) -> Result:
        """Images for one prompt or several, `num_images` of each.

        One `seed` draws the whole batch from one generator, as diffusers does with one; a sequence gives each image
        its own; None chooses one. `on_step` is told of every step and may raise to cancel. `overrides` are fields
        of Settings; the size defaults to the bundle's. Raises UsageError for a size, count or seed that cannot be."""
        chosen = self._settings(settings, overrides)
        if num_images < 1:
            raise UsageError(f"{num_images} images: expected at least 1")
        prompts = _texts(prompt)
        seed = secrets.randbelow(1 << 32) if seed is None else seed
        generators = _generators(seed, len(prompts) * num_images)
        encoded = self.encode_prompt(prompts, negative)
        embeds = encoded.repeated(num_images)
        prior_latents = _run(Stage.PRIOR, self._prior_steps(embeds, chosen, generators), on_step)
        decoder_steps = self._decoder_steps(prior_latents, embeds, chosen, generators)
        decoder_latents = _run(Stage.DECODER, decoder_steps, on_step)
        images = to_pictures(self.pixels(decoder_latents))
        described = [
            {
                "prompt": prompts[index // num_images],
                "negative": _at(negative, index // num_images),
                **_seed_of(seed, index, len(images)),
                **asdict(chosen),
                "vqgan_scale": self.manifest.vqgan_scale,
                "engine": self.engine.name,
                "created_by": self.manifest.created_by,
            }
            for index in range(len(images))
        ]
        return Result(images, prior_latents, decoder_latents, described, encoded.truncated)

    def _prior_steps(self, embeds: PromptEmbeds, chosen: Settings, seed: Seed) -> Iterator[Step]:
        return self.prior(
            embeds,
            height=chosen.height,
            width=chosen.width,
            steps=chosen.prior_steps,
            guidance=chosen.prior_guidance,
            seed=seed,
        )

    def _decoder_steps(self, latents: F32, embeds: PromptEmbeds, chosen: Settings, seed: Seed) -> Iterator[Step]:
        return self.decode(
            latents,
            embeds,
            height=chosen.height,
            width=chosen.width,
            steps=chosen.decoder_steps,
            guidance=chosen.decoder_guidance,
            seed=seed,
            size_policy=chosen.size_policy,
        )

    def close(self) -> None:
        """Give back the memory of every loaded stage; the cascade can still be used and loads them again."""
        for runner in self._loaded.values():
            runner.close()
        self._loaded.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _sample(
        self,
        stage: Stage,
        shape: tuple[int, ...],
        conditions: Tensors,
        negatives: Tensors,
        steps: int,
        guidance: float,
        seed: Seed,
        latents: F32 | None,
    ) -> Iterator[Step]:
        generators = _generators(seed, shape[0])
        ratios = timesteps(steps)
        if latents is None:
            latents = randn(shape, generators)
        elif latents.shape != shape:
            raise UsageError(f"{stage} latents: expected shape {list(shape)}, found {list(latents.shape)}")
        with_guidance = guidance > 1
        if with_guidance:  # batch [conditional, unconditional]
            conditions = {name: np.concatenate([value, negatives[name]]) for name, value in conditions.items()}
        doubled = np.concatenate([latents, latents]) if with_guidance else latents
        with self._denoiser(stage, doubled, conditions, ratios[:-1]) as run:

            def predict(x_t: F32, t: np.float32) -> F32:
                x_t = np.concatenate([x_t, x_t]) if with_guidance else x_t
                ratio = np.full(len(x_t), t, np.float32)
                prediction = run({"sample": x_t, "timestep_ratio": ratio})["noise_pred"]
                return guided(prediction, guidance) if with_guidance else prediction

            yield from sample(predict, latents, ratios, lambda: randn(shape, generators))

    @contextmanager
    def _denoiser(self, stage: Stage, sample: F32, conditions: Tensors, ratios: F32) -> Iterator[Run]:
        """The stage with its conditions, a function of sample and timestep_ratio. Where the engine has it in two parts,
        the first runs now, once for all of `ratios`."""
        if not is_hoisted(self.engine, stage):
            with self._stage(stage) as whole:
                yield lambda inputs: whole({**inputs, **conditions})
            return
        with self._stage(stage, CONDITIONING) as first:
            prepared = prepare(first, stage, sample, conditions, ratios)
        with self._stage(stage, STEP) as step:
            yield HoistedStage(step, prepared, ratios)

    @contextmanager
    def _stage(self, stage: Stage, graph: str = MAIN_GRAPH) -> Iterator[StageRunner]:
        if (stage, graph) not in self._loaded:
            if not self.keep_loaded:
                self.close()
            self._loaded[stage, graph] = self.engine.load(stage, graph)
        yield self._loaded[stage, graph]

    def _channels(self, stage: Stage, port: str, axis: int = 1) -> int:
        entry = self.manifest.stages.get(stage)
        dims = next((p.dims for p in entry.inputs if p.name == port), ()) if entry else ()
        if axis >= len(dims) or not isinstance(size := dims[axis], int):
            raise EngineError(f"the bundle has no {stage} with an input {port}; export the model again")
        return size

    def _settings(self, settings: Settings | None, overrides: dict[str, Any]) -> Settings:
        width, height = self.manifest.default_size
        try:
            chosen = replace(settings or Settings(width, height), **overrides)
        except TypeError as error:
            raise UsageError(f"unknown setting: {error}") from error
        latent_sizes(chosen.height, chosen.width, chosen.size_policy)  # a bad size fails before anything is loaded
        return chosen


def _texts(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def _at(text: str | Sequence[str], index: int) -> str:
    texts = _texts(text)
    return texts[0] if len(texts) == 1 else texts[index]


def _run(stage: Stage, steps: Iterator[Step], on_step: Callable[[Stage, Step], object]) -> F32:
    """Go through all steps; the last one's latents."""
    for step in steps:
        on_step(stage, step)
    return step.latents


def _seed_of(seed: int | Sequence[int], index: int, count: int) -> dict[str, int]:
    """How to draw image `index` again: its own seed, or its place in a batch of one generator."""
    if isinstance(seed, int):
        return {"seed": seed, "index": index, "batch": count}
    return {"seed": seed[index], "index": 0, "batch": 1}


def _generators(seed: Seed, count: int) -> TorchGenerator | list[TorchGenerator]:
    """One generator for the batch, or one for each of its `count` images."""
    if isinstance(seed, int):
        return TorchGenerator(seed)
    if isinstance(seed, TorchGenerator):
        return seed
    if len(seed) != count:
        raise UsageError(f"{len(seed)} seeds for {count} images; give one, or one for each")
    return [TorchGenerator(one) if isinstance(one, int) else one for one in seed]

"""The cascade: prompt -> embeddings -> prior latents -> decoder latents -> image.

The three pipelines of diffusers are three calls here (`encode_prompt`, `prior`, `decode`), and `generate` is
all of them. With the same seed, sizes and settings the latents follow diffusers' draw for draw.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..schemas.bundle import MAIN_GRAPH, Manifest
from ..schemas.errors import EngineError, UsageError
from ..schemas.settings import Settings
from ..schemas.sizes import SizePolicy, latent_sizes
from ..schemas.stages import Stage
from ..storage.bundle import open_bundle
from .engines.base import Engine, Run, Tensors
from .engines.mixed import with_stages_of
from .engines.table import make_engine
from .engines.tensorrt.engine import Refit
from .generation import Result, generate
from .images.pictures import clip_pixels, effnet_input, vqgan_input
from .images.png import to_pictures
from .memory.prediction import loaded_bytes
from .memory.residency import RESIDENT, MemoryPolicy, Residency
from .sampling.controlnets import ControlPicture, control_image, control_residuals, require_control, together
from .sampling.ddpm import F32, Step, sample
from .sampling.denoiser import denoiser
from .sampling.finite_values import require_finite, require_sound
from .sampling.samplers import Sampling, SamplingOptions
from .sampling.seeds import Noise, Seeds
from .sampling.start import Start, keep_outside
from .text.embeds import PromptEmbeds, as_texts
from .text.prompts import encode_texts
from .text.text_cache import CachedTextEncoder
from .text.tokenizer import ClipTokenizer

__all__ = ["Cascade", "PromptEmbeds", "Result", "Settings", "Start", "Step"]

ROW_AREA = {Stage.PRIOR: 8 * 24 * 24, Stage.DECODER: 8 * 256 * 256}  # latent pixels that go through at once
ENCODER = "encoder"  # the vqgan's other graph
# diffusers' own.
PRIOR_SAMPLING, DECODER_SAMPLING = Sampling(steps=20, guidance=4.0), Sampling(steps=10, guidance=0.0)


class Cascade:
    """The stages on one engine. A context manager; `close` gives back the memory of loaded stages."""

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        tokenizer: ClipTokenizer,
        *,
        memory: MemoryPolicy = RESIDENT,
        rows: int | None = None,
        checked: bool = True,
    ) -> None:
        """`memory` says which stages stay loaded. `rows` bounds the batch that goes through a sampled stage at once
        (guidance doubles it), and so the memory of activations: by default 8 rows of a 1024x1024 image, and more of
        smaller ones. Images do not depend on it. Unless `checked` is False, a stage that gives NaN, infinity, or one
        value throughout latents or an image is an UnsoundError."""
        self.engine = engine
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.rows = rows
        self.residency = Residency(engine, memory, partial(loaded_bytes, manifest))
        self.checked = checked
        self._encode_text = CachedTextEncoder(partial(self._use, Stage.TEXT_ENCODER))

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        *,
        engine: str = "onnxruntime",
        threads: int | None = None,
        memory: str = "resident",
        rows: int | None = None,
        stages: Mapping[Stage, str | Path] | None = None,
        allow_cpu: bool = False,
        vram: int | None = None,
        refit: Refit | None = None,
    ) -> Self:
        """The cascade of an exported bundle on `device`, "cpu" or "cuda".

        `engine` is a name of `engines.table`; "auto" takes the fastest there is, which may compute in bf16, and then
        images differ slightly. `threads` None leaves their number to the engine. `memory` is "resident", "staged" or
        a size such as "8GB". `allow_cpu` lets ONNX Runtime compute on the CPU what it cannot on the GPU; `vram` bounds
        the bytes of GPU memory that TensorRT's stages take together; `refit` gives plans of other weights those
        of the bundle. `stages` come from other bundles: a full prior with a lite decoder, say.
        Raises UsageError when there is no bundle or no such engine, or stages do not fit together, EngineError when
        nothing can run it."""
        policy = MemoryPolicy.parse(memory)
        opened = open_bundle(Path(bundle))
        make = partial(
            make_engine, engine, device=device, threads=threads, allow_cpu=allow_cpu, memory_budget=vram, refit=refit
        )
        runs: Engine = make(opened)
        manifest = opened.manifest
        if stages:
            others = {stage: open_bundle(Path(path)) for stage, path in stages.items()}
            engines = {stage: make(other) for stage, other in others.items()}
            runs, manifest = with_stages_of(runs, opened, engines, others)
        return cls(runs, manifest, ClipTokenizer.open(opened.tokenizer, manifest.text_rows), memory=policy, rows=rows)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative: str | Sequence[str] = "",
        *,
        weighted: bool = False,
        long_prompts: bool = False,
    ) -> PromptEmbeds:
        """Embed prompts and negative prompts; one negative prompt serves all. Prompts met before cost nothing.

        `weighted` reads (parentheses:1.2) as emphasis, `long_prompts` encodes what goes beyond 77 tokens in further
        chunks, see `prompts`. Raises UsageError when there are neither one nor as many negatives as prompts."""
        prompts, negatives = as_texts(prompt), as_texts(negative)
        if len(negatives) == 1:
            negatives *= len(prompts)
        if not prompts or len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        texts = encode_texts(
            [*prompts, *negatives], self.tokenizer, self._encode_text, weighted=weighted, long=long_prompts
        )
        (text, negative_text), (pooled, negative_pooled) = (
            np.split(array, 2) for array in (texts.clip_text, texts.pooled)
        )
        return PromptEmbeds(text, pooled, negative_text, negative_pooled, texts.truncated)

    def encode_images(self, pictures: Sequence[Image.Image]) -> F32:
        """Image prompts: RGB pictures to embeddings (1, n, 768), for `prior` to follow all of them.

        Raises UsageError when the bundle has no image encoder."""
        side = self.size_of(Stage.IMAGE_ENCODER, "pixel_values", axis=2)
        with self._use(Stage.IMAGE_ENCODER) as encode:
            return encode({"pixel_values": clip_pixels(pictures, side)})["image_embeds"][None]

    def encode_picture(self, picture: Image.Image, *, height: int, width: int) -> F32:
        """What `prior` would have to draw for an image of this size to look like `picture`: (1, 16, h, w).

        Raises UsageError when the bundle has no effnet encoder."""
        return self._effnet(effnet_input(picture, latent_sizes(height, width).prior))

    def encode_details(self, picture: Image.Image, *, height: int, width: int) -> F32:
        """What `decode` would have to draw: the vqgan's latents (1, 4, h, w) of a picture of `height` x `width`.

        Raises UsageError when the bundle's vqgan has no encoder."""
        with self._use(Stage.VQGAN, ENCODER) as encode:
            latents = encode({"images": vqgan_input(picture, height, width)})["latents"]
        assert self.manifest.vqgan_scale is not None  # there is one wherever there is a vqgan
        return np.asarray(latents / self.manifest.vqgan_scale, np.float32)

    def residuals(
        self, controls: Sequence[ControlPicture], *, height: int, width: int, mask: Image.Image | None = None
    ) -> dict[str, F32]:
        """What ControlNets, each looking at a picture, add to the prior for an image of this size: (1, c, h, w) by
        port, summed where there are several. `mask` is for inpainting.

        Raises UsageError for an unknown name, and when the bundle lacks a stage or its prior takes no residuals."""
        size = latent_sizes(height, width).prior
        found = []
        for control in controls:
            stage = require_control(self.manifest, control.name)[0]
            image = control_image(control.name, control.picture, size, mask=mask, encode=self._effnet)
            with self._use(stage) as run:
                residuals = control_residuals(self.manifest, control.name, image, run, strength=control.strength)
            found.append(residuals)
        return together(found, size)

    def prior(
        self,
        embeds: PromptEmbeds,
        *,
        height: int,
        width: int,
        seed: Seeds | Noise = 0,
        image_embeds: F32 | None = None,
        latents: F32 | None = None,
        start: Start | None = None,
        control: Tensors | None = None,
        **how: Unpack[SamplingOptions],
    ) -> Iterator[Step]:
        """Sample stage C, a Step at a time; the last one's latents (B, 16, h, w) go to `decode`.

        `how` are fields of Sampling: 20 steps with guidance 4 unless told. `image_embeds` (1 or B, n, 768) are image
        prompts; `latents` (B, 16, h, w) replace the first draw of noise; `start` is a picture to begin with;
        `control` are a ControlNet's residuals by port, (1 or B, c, h, w) each."""
        shape = (len(embeds), self.size_of(Stage.PRIOR, "sample"), *latent_sizes(height, width).prior)
        if image_embeds is None:
            image_embeds = np.zeros((1, 1, self.size_of(Stage.PRIOR, "clip_img", axis=2)), np.float32)
        image_embeds = _rows(image_embeds, len(embeds))
        residuals = {port: _rows(value, len(embeds)) for port, value in (control or {}).items()}
        conditions = {"clip_text": embeds.clip_text, "clip_text_pooled": embeds.pooled, "clip_img": image_embeds}
        negatives = {
            "clip_text": embeds.negative_clip_text,
            "clip_text_pooled": embeds.negative_pooled,
            "clip_img": np.zeros_like(image_embeds),
        }
        sampling = replace(PRIOR_SAMPLING, **how)
        return self._sample(
            Stage.PRIOR, shape, conditions | residuals, negatives | residuals, sampling, seed, latents, start
        )

    def decode(
        self,
        prior_latents: F32,
        embeds: PromptEmbeds,
        *,
        height: int,
        width: int,
        seed: Seeds | Noise = 0,
        size_policy: SizePolicy = SizePolicy.EXACT,
        latents: F32 | None = None,
        start: Start | None = None,
        **how: Unpack[SamplingOptions],
    ) -> Iterator[Step]:
        """Sample stage B conditioned on stage C's latents (B, 16, h, w); the last Step's latents go to `pixels`.

        10 steps without guidance unless told; the rest as in `prior`, with latents of (B, 4, h, w)."""
        if len(prior_latents) != len(embeds):
            raise UsageError(f"{len(prior_latents)} prior latents for {len(embeds)} prompts: expected one for each")
        size = latent_sizes(height, width, size_policy).decoder
        shape = (len(prior_latents), self.size_of(Stage.DECODER, "sample"), *size)
        conditions = {"clip_text_pooled": embeds.pooled, "effnet": prior_latents}
        negatives = {"clip_text_pooled": embeds.negative_pooled, "effnet": np.zeros_like(prior_latents)}
        sampling = replace(DECODER_SAMPLING, **how)
        return self._sample(Stage.DECODER, shape, conditions, negatives, sampling, seed, latents, start)

    def pixels(self, latents: F32) -> F32:
        """Decode stage B's latents (B, 4, h, w) to images (B, 3, 4h, 4w) in 0..1, one at a time to bound memory."""
        found = []
        with self.residency.use(Stage.VQGAN) as decode:
            for number, one in enumerate(latents):
                images = decode({"latents": one[None]})["images"]
                self._require_sound(Stage.VQGAN, images, f"image {number + 1} of {len(latents)}")
                found.append(images)
        return np.concatenate(found)

    generate = generate

    def preview(self, stage: Stage, latents: F32) -> list[Image.Image]:
        """Small pictures of stage C's latents by the previewer, or pictures of stage B's by the vqgan.

        Raises UsageError when the bundle has no previewer."""
        if stage is Stage.DECODER:
            return to_pictures(self.pixels(latents))
        with self._use(Stage.PREVIEWER) as show:
            return to_pictures(show({"latents": latents})["images"])

    def size_of(self, stage: Stage, port: str, axis: int = 1) -> int:
        """What the bundle's network says of a port. Raises EngineError when it has none such."""
        entry = self.manifest.stages.get(stage)
        dims = next((p.dims for p in entry.inputs if p.name == port), ()) if entry else ()
        if axis >= len(dims) or not isinstance(size := dims[axis], int):
            raise EngineError(f"the bundle has no {stage} with an input {port}; export the model again")
        return size

    def close(self) -> None:
        """Give back the memory of every loaded stage; the cascade can still be used and loads them again."""
        self.residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _effnet(self, pixels: F32) -> F32:
        with self._use(Stage.EFFNET_ENCODER) as encode:
            return encode({"pixels": pixels})["effnet"]

    @contextmanager
    def _use(self, stage: Stage, graph: str = MAIN_GRAPH) -> Iterator[Run]:
        """The stage, in memory for as long as the context lasts; what it gives is finite, or an UnsoundError."""
        with self.residency.use(stage, graph) as runner:

            def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
                outputs = runner(inputs)
                for name, value in outputs.items():
                    self._require_sound(stage, value, name, varied=False)
                return outputs

            yield run

    def _require_sound(
        self, stage: Stage, rows: NDArray[Any], where: str, *, images: int = 0, varied: bool = True
    ) -> None:
        if self.checked:
            require_sound(stage, self.manifest.stages.get(stage), rows, where, images=images, varied=varied)

    def _sample(
        self,
        stage: Stage,
        shape: tuple[int, ...],
        conditions: Tensors,
        negatives: Tensors,
        sampling: Sampling,
        seed: Seeds | Noise,
        latents: F32 | None,
        start: Start | None,
    ) -> Iterator[Step]:
        noise = seed if isinstance(seed, Noise) else Noise(seed, shape[0])
        start = start and start.for_shape(shape)
        schedule = sampling.schedule(start.strength if start else 1.0)
        first = noise.draw(shape) if latents is None else latents.astype(np.float32, copy=False)
        if first.shape != shape:
            raise UsageError(f"{stage} latents: expected shape {list(shape)}, found {list(first.shape)}")
        begun = {"start": start.latents} if start else {}
        require_finite(f"the {stage}'s", {"latents": first, **begun, **conditions})
        if sampling.guides:  # batch [conditional, unconditional]
            conditions = {name: np.concatenate([value, negatives[name]]) for name, value in conditions.items()}
        guidance = sampling.guidance if sampling.guides else None
        parts = denoiser(
            self.engine,
            self.residency,
            stage,
            first,
            conditions,
            schedule,
            guidance=guidance,
            rows=self.rows or max(1, ROW_AREA[stage] // (shape[2] * shape[3])),
            check=partial(self._require_sound, stage, images=shape[0]),
        )
        with parts as predict:
            x_t = first if start is None else schedule.begin(start.latents, first)
            show = partial(self.preview, stage)
            steps = sample(predict, x_t, schedule, lambda: noise.draw(shape), show)
            yield from steps if start is None or start.mask is None else keep_outside(steps, start, first, schedule)


def _rows(array: F32, count: int) -> Any:
    """One row for all, or one for each."""
    if len(array) not in (1, count):
        raise UsageError(f"conditions for {len(array)} images where {count} are drawn: expected one, or one for each")
    return np.repeat(array, count, axis=0) if len(array) == 1 else array

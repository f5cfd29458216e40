"""The cascade: prompt -> embeddings -> prior latents -> decoder latents -> images.

The three pipelines of diffusers are three calls here (`encode_prompt`, `prior`, `decode`), and `generate` makes all
three. With the same seed, sizes and settings the latents equal those of diffusers' pipelines.
"""

from __future__ import annotations  # help() shows the types as they are written here

import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, get_args

from ..schemas.callbacks import Say, ignored
from ..schemas.errors import UsageError
from ..schemas.messages import known_keywords, require_known
from ..schemas.settings import SETTINGS, Settings, SettingsOptions, parse_settings
from ..schemas.sizes import latent_sizes
from ..schemas.stages import Stage
from ..storage.bundle import open_bundle
from .cascade_stages import CascadeStages
from .engines.choose_device import choose_device
from .engines.engine_table import make_engine
from .engines.mixed_bundles import MixedEngine, manifest_with_stages_of
from .engines.protocol import F32, Engine
from .engines.tensorrt.tensorrt_engine import Refit
from .generate_inputs import OpenedPictures, check_settings, open_pictures, require_room
from .images.masks import latent_mask
from .images.metadata import image_settings
from .images.pictures import Picture
from .memory.choose_policy import chosen_policy
from .memory.residency import MemoryPolicy
from .result import Output, Result
from .sampling.controlnets import ControlPicture
from .sampling.loop import OnStep, Start, Step
from .sampling.noise import Noise, Seeds
from .text.prompts import PromptEmbeds, as_texts
from .text.tokenizer import ClipTokenizer
from .timings import since_start

__all__ = ["Cascade", "ControlPicture", "OnStep", "PromptEmbeds", "Result", "Settings", "Start", "Step"]


class Cascade(CascadeStages):
    """Stable Cascade from an exported bundle, on one engine.

        with Cascade.open("bundle") as cascade:
            image = cascade.generate("an image of a shiba inu", seed=0).images[0]

    The stages can be called one by one, and every step of the sampling can be watched:

            embeds = cascade.encode_prompt("an image of a shiba inu")
            for step in cascade.prior(embeds, height=1024, width=1024, steps=20, guidance=4.0, seed=0):
                print(step.index + 1, "of", step.steps)
            for step in cascade.decode(step.latents, embeds, height=1024, width=1024, steps=10):
                pass
            pixels = cascade.pixels(step.latents)  # (1, 3, 1024, 1024) float32 in 0..1

    Heights and widths are pixels of the image, multiples of 8. Latents and embeddings are float32 arrays whose first
    axis is the batch. A picture is a path or a PIL image. All errors are CascadeError: UsageError for arguments,
    EngineError for a stage that cannot be loaded or run, UnsoundError for a stage whose output is NaN, infinite, or one
    value throughout.
    """

    device: str = "cpu"  # that `open` chose

    @classmethod
    @known_keywords
    def open(
        cls,
        bundle: str | Path,
        device: str = "auto",
        *,
        engine: str = "auto",
        threads: int | None = None,
        memory: str = "auto",
        rows: int | None = None,
        stages: Mapping[Stage, str | Path] | None = None,
        allow_cpu: bool = False,
        vram: int | None = None,
        refit: Refit | None = None,
        cuda_graph: bool = True,
        tf32: bool = False,
        say: Say = ignored,
    ) -> Self:
        """Open an exported bundle on `device`, "cpu", "cuda" or "auto": the GPU if one works here, else the CPU.

        `engine` is a name from `engine_table`. "auto" takes the fastest engine that is installed; it may compute in
        bf16, and then images differ slightly: "onnxruntime" computes in the bundle's precision. `threads=None` leaves
        the number to OMP_NUM_THREADS, and without it to the engine.

        `memory` is "resident", "staged" or a size such as "8GB". "auto" keeps all stages loaded if they fit into half
        of the free memory, or 80% of the GPU's, and else one at a time. `vram` bounds the bytes of GPU memory that
        TensorRT's stages take together. `allow_cpu` lets ONNX Runtime compute on the CPU what it cannot compute on the
        GPU. `refit` gives TensorRT plans the weights of this bundle. `stages` takes single stages from other bundles,
        such as a lite decoder for a full prior.

        With `cuda_graph` ONNX Runtime captures the steps of prior and decoder as CUDA graphs, and runs without them,
        with a line to `say`, if that is impossible. `tf32` lets ONNX Runtime multiply fp32 in ten bits on the GPU,
        which is faster. `say` is called with lines for the user.

        Raises UsageError when there is no bundle or no such engine, or when stages do not fit together; EngineError
        when the engine cannot run on this machine."""
        policy = MemoryPolicy.parse(memory)
        opened = open_bundle(Path(bundle))
        device, line = choose_device(device, engine, opened)
        if line:
            say(line)
        make = partial(
            make_engine,
            engine,
            device=device,
            threads=threads,
            allow_cpu=allow_cpu,
            memory_budget=vram,
            refit=refit,
            cuda_graph=cuda_graph,
            tf32=tf32,
            say=say,
        )
        runs: Engine = make(opened)
        manifest = opened.manifest
        if stages:
            others = {stage: open_bundle(Path(path)) for stage, path in stages.items()}
            manifest = manifest_with_stages_of(opened, others)
            runs = MixedEngine(runs, {stage: make(other) for stage, other in others.items()})
        tokenizer = ClipTokenizer.open(opened.tokenizer, manifest.text_rows)
        cascade = cls(runs, manifest, tokenizer, memory=chosen_policy(policy, manifest, device), rows=rows)
        cascade.device = device
        cascade.timings.opened = since_start()
        return cascade

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative: str | Sequence[str] = "",
        embeds: PromptEmbeds | None = None,
        num_images: int = 1,
        seed: Seeds | None = None,
        settings: Settings | None = None,
        image_prompts: Picture | Sequence[Picture] = (),
        image_embeds: F32 | None = None,
        init_image: Picture | None = None,
        mask: Picture | None = None,
        controls: Sequence[ControlPicture] = (),
        latents: F32 | None = None,
        output: Output = "images",
        after: Result | None = None,
        on_step: OnStep = ignored,
        **overrides: Unpack[SettingsOptions],
    ) -> Result:
        """Generate `num_images` images for each prompt, or for each row of `embeds`.

            cascade.generate("a lighthouse", seed=0, width=1024, height=768, prior_steps=30).images[0].save("a.png")

        A number as `seed` is the seed of the whole batch, as in diffusers. In a sequence each image has its own seed. A
        PlacedSeed is an image's place in a batch; None chooses a number at random. `overrides` are fields of
        `settings`; the size defaults to the bundle's.

        `image_prompts` guide the image together; `image_embeds` (1, n, 768) float32 replace n of them. The image starts
        from `init_image` and differs more from it with a higher `strength`. `mask` is white where the image is
        generated anew; `init_image` is kept elsewhere. `controls` are pictures for ControlNets; the inpainting
        ControlNet takes the mask too. `latents` (B, 16, h, w) float32 replace the prior's first noise.

        `output` ends early: "latents" makes no images, "prior" runs no decoder. `after` goes on from there: it is the
        result of such a call, perhaps in another process, whose other arguments were the same. `on_step` is called
        after every step; it may replace the latents of the step, and raise an exception to cancel.

        Raises UsageError for an argument out of range, a picture that cannot be read, an unknown setting, or a stage
        that the bundle lacks; UnsoundError when a stage's output is no image or no latents."""
        chosen = self._settings(settings, overrides)
        check_settings(chosen, varies=init_image is not None)
        if num_images < 1:
            raise UsageError(f"num_images={num_images}: expected at least 1")
        if output not in get_args(Output):
            raise UsageError(f"output {output!r}: expected images, latents or prior")
        if after is not None:
            embeds, num_images = after.embeds, 1
        elif (prompt is None) == (embeds is None):
            raise UsageError("prompt and embeds: give one of them")
        prompts = [] if prompt is None else as_texts(prompt)
        require_room(num_images * len(prompts if embeds is None else embeds), chosen)
        if image_prompts and image_embeds is not None:
            raise UsageError("image_prompts and image_embeds: give one of them")
        pictures = open_pictures(chosen, init_image=init_image, mask=mask, controls=controls)
        if embeds is None:
            embeds = self.encode_prompt(prompts, negative, weighted=chosen.weighted, long_prompts=chosen.long_prompts)
        start, decoder_start = self._starts(pictures, chosen, prior=after is None, decoder=output != "prior")
        if after is None:
            embeds = embeds.repeated(num_images)
            noise = Noise(secrets.randbelow(1 << 32) if seed is None else seed, len(embeds))
            prior = self.prior(
                embeds,
                height=chosen.height,
                width=chosen.width,
                seed=noise,
                image_embeds=self.encode_images(image_prompts) if image_prompts else image_embeds,
                latents=latents,
                start=start,
                control=self.residuals(pictures.controls, height=chosen.height, width=chosen.width, mask=pictures.mask),
                sampling=chosen.prior,
            )
            prior_latents = _run(Stage.PRIOR, prior, on_step)
        else:
            noise, prior_latents = after.noise_after_prior(), after.prior_latents
        described = image_settings(
            self.engine, self.manifest, chosen, prompts=prompts, negatives=as_texts(negative), seeds=noise.places
        )
        if output == "prior":
            return Result(prior_latents, None, None, described, embeds, _noise=noise)
        decoder = self.decode(
            prior_latents,
            embeds,
            height=chosen.height,
            width=chosen.width,
            seed=noise,
            size_policy=chosen.size_policy,
            start=decoder_start,
            sampling=chosen.decoder,
        )
        decoder_latents = _run(Stage.DECODER, decoder, on_step)
        pixels = self.pixels(decoder_latents) if output == "images" else None
        self.timings.image()
        return Result(prior_latents, decoder_latents, pixels, described, embeds, _kept=pictures.kept)

    def close(self) -> None:
        """Free the memory of every loaded stage; a later call loads the stages again."""
        self.residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _settings(self, settings: Settings | None, overrides: Mapping[str, Any]) -> Settings:
        require_known("generate", overrides, SETTINGS | signature(Cascade.generate).parameters.keys())
        given = {} if settings is None else vars(settings)
        return parse_settings({**given, **overrides}, self.manifest.default_size)

    def _starts(
        self, pictures: OpenedPictures, chosen: Settings, *, prior: bool, decoder: bool
    ) -> tuple[Start | None, Start | None]:
        """The starts of `prior` and `decoder` for an initial picture; None for a stage that is not run.

        The decoder follows the prior's latents anyway. It has a start only to keep what is outside a mask, and then its
        sampling begins with noise alone."""
        if pictures.init is None:
            return None, None
        sizes = latent_sizes(chosen.height, chosen.width, chosen.size_policy)
        mask = None if pictures.kept is None else pictures.kept[1]
        start = decoder_start = None
        if prior:
            latents = self.encode_picture(pictures.init, height=chosen.height, width=chosen.width)
            start = Start(latents, chosen.strength, None if mask is None else latent_mask(mask, sizes.prior))
        if decoder and mask is not None:
            details = self.encode_details(pictures.init, height=sizes.image[0], width=sizes.image[1])
            decoder_start = Start(details, 1.0, latent_mask(mask, sizes.decoder))
        return start, decoder_start


def _run(stage: Stage, steps: Iterator[Step], on_step: OnStep) -> F32:
    """Make all steps; returns the latents of the last one."""
    for step in steps:
        on_step(stage, step)
    return step.latents

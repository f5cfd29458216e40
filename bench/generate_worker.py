"""The process that measures one whole generation, by cascadekit or by diffusers; prints one line of JSON."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from numpy.typing import NDArray

from ..runtime.cascade import Cascade
from ..runtime.engines.protocol import Engine, Run, StageRunner, Tensors
from ..schemas.manifest import MAIN_GRAPH
from ..schemas.settings import Settings
from ..schemas.stages import Stage
from .process import WorkerJob

PROMPT, NEGATIVE = "image {} of a shiba inu, donning a spacesuit and helmet", "blurry {}"

Generate = Callable[[int], object]  # one image of the prompt of that number
Prepare = Callable[["GenerateJob", "Clock"], Generate]


@dataclass(frozen=True)
class GenerateJob(WorkerJob):
    """One image, generated `runs` times."""

    program: str
    model: str  # the model folder, for diffusers
    bundle: str
    memory: str
    width: int
    height: int
    prior_steps: int
    decoder_steps: int

    @property
    def settings(self) -> Settings:
        return Settings(self.width, self.height, prior_steps=self.prior_steps, decoder_steps=self.decoder_steps)


class Clock:
    """Seconds by activity: loading, each stage's network, and all."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}

    def start(self, name: str) -> None:
        self._started[name] = perf_counter()

    def stop(self, name: str) -> None:
        self.spent[name] += perf_counter() - self._started.pop(name)


class TimedEngine:
    """Another engine, with a clock on loading and on every run."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.name = engine.name
        self.precision = engine.precision
        self._engine = engine
        self._clock = clock

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return self._engine.graphs(stage)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> StageRunner:
        self._clock.start("load")
        try:
            return TimedStage(self._engine.load(stage, graph), stage, self._clock)
        finally:
            self._clock.stop("load")


class TimedStage(StageRunner):
    """One stage of a TimedEngine."""

    def __init__(self, runner: StageRunner, stage: Stage, clock: Clock) -> None:
        self._runner = runner
        self._stage = stage
        self._clock = clock

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = self._timed(self._runner, inputs)
        return outputs

    def bind(self, constants: Tensors) -> Run:
        bound = self._runner.bind(constants)
        return lambda inputs: self._timed(bound, inputs)

    def keep(self, inputs: Tensors, read: Collection[str]) -> Mapping[str, Any]:
        kept: Mapping[str, Any] = self._timed(partial(self._runner.keep, read=read), inputs)
        return kept

    def close(self) -> None:
        self._runner.close()

    def _timed(self, run: Callable[[Tensors], Any], inputs: Tensors) -> Any:
        self._clock.start(self._stage)
        try:
            return run(inputs)
        finally:
            self._clock.stop(self._stage)


def main() -> None:
    job = GenerateJob(**json.loads(sys.argv[1]))
    package, prepare = PROGRAMS[job.program]
    clock = Clock()
    generate = prepare(job, clock)
    generate(0)  # loads, compiles, packs, grows its memory
    first, clock.spent = dict(clock.spent), defaultdict(float)
    for number in range(1, job.runs + 1):
        clock.start("all")
        generate(number)
        clock.stop("all")
    print(json.dumps({"first": first, "spent": clock.spent, "version": version(package)}))


def _cascadekit(engine: str) -> Prepare:
    def prepared(job: GenerateJob, clock: Clock) -> Generate:
        cascade = Cascade.open(job.bundle, engine=engine, threads=job.threads, memory=job.memory)
        timed = Cascade(
            TimedEngine(cascade.engine, clock), cascade.manifest, cascade.tokenizer, memory=cascade.residency.policy
        )

        def generate(number: int) -> object:
            prompt, negative = PROMPT.format(number), NEGATIVE.format(number)
            return timed.generate(prompt, negative=negative, seed=0, settings=job.settings).images

        return generate

    return prepared


def _diffusers(dtype: str) -> Prepare:
    """Both pipelines of diffusers, with hooks on the networks; all components stay in memory."""

    def prepared(job: GenerateJob, clock: Clock) -> Generate:
        diffusers, transformers, torch = (import_module(name) for name in ("diffusers", "transformers", "torch"))
        vq = import_module("diffusers.pipelines.deprecated.wuerstchen").PaellaVQModel
        torch.set_num_threads(job.threads)
        clock.start("load")
        folder, kind = Path(job.model), {"torch_dtype": getattr(torch, dtype)}
        text = transformers.CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder", dtype=kind["torch_dtype"]
        )
        networks = {
            Stage.TEXT_ENCODER: text,
            Stage.PRIOR: diffusers.StableCascadeUNet.from_pretrained(folder / "prior", **kind),
            Stage.DECODER: diffusers.StableCascadeUNet.from_pretrained(folder / "decoder", **kind),
            Stage.VQGAN: vq.from_pretrained(folder / "vqgan", **kind),
        }
        common = {
            "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder": networks[Stage.TEXT_ENCODER],
            "scheduler": diffusers.DDPMWuerstchenScheduler.from_pretrained(folder / "scheduler"),
        }
        prior = diffusers.StableCascadePriorPipeline(prior=networks[Stage.PRIOR], **common)
        decoder = diffusers.StableCascadeDecoderPipeline(
            decoder=networks[Stage.DECODER], vqgan=networks[Stage.VQGAN], **common
        )
        clock.stop("load")
        for stage, network in networks.items():
            module = network.up_blocks if stage is Stage.VQGAN else network  # decode() of the vqgan is no forward
            module.register_forward_pre_hook(lambda *_, stage=stage: clock.start(stage))
            module.register_forward_hook(lambda *_, stage=stage: clock.stop(stage))
        for pipeline in (prior, decoder):
            pipeline.set_progress_bar_config(disable=True)

        def generate(number: int) -> object:
            generator = torch.Generator().manual_seed(0)
            with torch.inference_mode():
                found = prior(
                    PROMPT.format(number),
                    negative_prompt=NEGATIVE.format(number),
                    height=job.height,
                    width=job.width,
                    num_inference_steps=job.prior_steps,
                    generator=generator,
                )
                return decoder(
                    found.image_embeddings,
                    prompt_embeds=found.prompt_embeds,
                    prompt_embeds_pooled=found.prompt_embeds_pooled,
                    negative_prompt_embeds=found.negative_prompt_embeds,
                    negative_prompt_embeds_pooled=found.negative_prompt_embeds_pooled,
                    num_inference_steps=job.decoder_steps,
                    generator=generator,
                )

        return generate

    return prepared


# Each program, and the package whose version is reported.
PROGRAMS: Mapping[str, tuple[str, Prepare]] = {
    "onnxruntime": ("onnxruntime", _cascadekit("onnxruntime")),
    "openvino": ("openvino", _cascadekit("openvino")),
    "openvino-bf16": ("openvino", _cascadekit("openvino-bf16")),
    "diffusers": ("diffusers", _diffusers("float32")),
    "diffusers-bf16": ("diffusers", _diffusers("bfloat16")),
}

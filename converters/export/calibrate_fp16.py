"""Measures how large the values of a prior, decoder or VQGAN grow: short runs of its fp32 graphs with probes."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...runtime.engines.onnxruntime import open_session
from ...runtime.engines.protocol import F32
from ...runtime.engines.provider_probe import why_not
from ...runtime.memory.give_back import large_blocks_given_back
from ...runtime.sampling.loop import sample
from ...runtime.sampling.samplers import Wuerstchen, guided, timesteps
from ...runtime.sampling.torch_generator import TorchGenerator
from ...schemas.callbacks import Say, ignored
from ...schemas.errors import EngineError
from ...schemas.manifest import ENCODER_GRAPH, MAIN_GRAPH
from ...schemas.messages import one_line
from ...schemas.ports import ports_of
from ...schemas.stages import Stage, UNetConfig, VQGANConfig
from ...storage.safetensors_reader import TensorRange
from ..onnx import GraphOptions, write_graph

STEPS = 8
GUIDANCE = {Stage.PRIOR: 4.0, Stage.DECODER: 1.5}
SIDES = {Stage.PRIOR: 24, Stage.DECODER: 64}  # of the latents; the decoder's ranges hardly depend on the size
SIZES = {"batch": 2, "tokens": 77, "images": 1, "effnet_height": 6, "effnet_width": 6}  # of conditions
PASS = re.compile(r"@\d+")  # the suffix of values of a further pass over the same blocks

# Latents of the VQGAN that are the same everywhere, beside normal noise: large areas reach the largest sums.
FLAT = (-4.0, 4.0)
VQGAN_SIDE = 32

REASON_LENGTH = 300  # characters of an error of onnxruntime in a message

Inputs = Mapping[str, F32]
Predict = Callable[[Inputs], Inputs]


def measure_ranges(
    config: UNetConfig | VQGANConfig,
    tensors: Mapping[str, TensorRange],
    embeddings: Inputs | None = None,
    *,
    say: Say = ignored,
) -> dict[str, float]:
    """The largest magnitude that each probed value reaches while one image is sampled with guidance, by value. The
    VQGAN decodes normal noise and flat areas, and encodes pictures of noise and of one colour.

    It runs on a GPU where ONNX Runtime can use one, else on the CPU; `say` is told when a GPU fails. Weights stay in
    their files, or go to the GPU as they are stored: beside them, the run takes memory for the values of one pass.
    `tensors` are in files of one folder. The graphs are written into that folder and removed after the run.
    `embeddings` are clip_text (2, tokens, c) and clip_text_pooled (2, 1, c) of a prompt and its negative, float32.
    Normal noise takes their place when they are None. Raises EngineError without ONNX Runtime."""
    folder = next(iter(tensors.values())).path.parent
    if why_not("cuda") == "":
        try:
            return _measured(config, tensors, embeddings, folder, device="cuda")
        except EngineError as error:
            say(f"{config.stage}: measured on the CPU, because the GPU failed: {error}")
    return _measured(config, tensors, embeddings, folder, device="cpu")


def _measured(
    config: UNetConfig | VQGANConfig,
    tensors: Mapping[str, TensorRange],
    embeddings: Inputs | None,
    folder: Path,
    *,
    device: str,
) -> dict[str, float]:
    def run(name: str, passes: Callable[[Predict], object]) -> dict[str, float]:
        """The ranges that the graph `name` reaches in `passes`, which call it."""
        path = folder / f"calibration-{name}.onnx"
        try:
            model = write_graph(config, tensors, GraphOptions(probes=True), name)
            onnx.save(model, path)
            with large_blocks_given_back():  # a cast weight is freed after its product
                probed = Probed(open_session(path, device), [output.name for output in model.graph.output])
                passes(probed)
        finally:
            path.unlink(missing_ok=True)
        return dict(probed.ranges)

    if isinstance(config, UNetConfig):
        return run(MAIN_GRAPH, lambda predict: _sample(config, predict, _conditions(config, embeddings)))
    ranges = run(MAIN_GRAPH, lambda predict: _decode(config, predict))
    return ranges | run(ENCODER_GRAPH, lambda predict: _encode(config, predict))


class Probed:
    """A session of a graph with probes: it returns the other outputs, and keeps the largest magnitudes in `ranges`."""

    def __init__(self, session: Any, names: list[str]) -> None:
        self.ranges: dict[str, float] = defaultdict(float)
        self._session, self._names = session, names

    def __call__(self, inputs: Inputs) -> Inputs:
        try:
            found = self._session.run(self._names, dict(inputs))
        except Exception as error:  # onnxruntime has an exception class for each status code
            raise EngineError(one_line(error, REASON_LENGTH)) from error
        outputs = dict(zip(self._names, found, strict=True))
        for name, value in outputs.items():
            if name.endswith("/max"):
                probed = PASS.sub("", name.removesuffix("/max").removesuffix("/rows").removesuffix("/last"))
                self.ranges[probed] = max(self.ranges[probed], float(value))
        return outputs


def _sample(config: UNetConfig, predict: Predict, conditions: Inputs) -> None:
    generator = TorchGenerator(0)
    shape = (1, config.in_channels, SIDES[config.stage], SIDES[config.stage])

    def guided_noise(latents: F32, t: np.float32) -> F32:
        fed = {"sample": np.repeat(latents, 2, axis=0), "timestep_ratio": np.full(2, t, np.float32), **conditions}
        return guided(predict(fed)["noise_pred"], GUIDANCE[config.stage])

    schedule = Wuerstchen(timesteps(STEPS))
    for _ in sample(guided_noise, generator.randn(shape), schedule, lambda: generator.randn(shape)):
        pass


def _decode(config: VQGANConfig, predict: Predict) -> None:
    shape = (1, config.latent_channels, VQGAN_SIDE, VQGAN_SIDE)
    for latents in (TorchGenerator(0).randn(shape), *(np.full(shape, value, np.float32) for value in FLAT)):
        predict({"latents": latents})


def _encode(config: VQGANConfig, predict: Predict) -> None:
    side = VQGAN_SIDE * config.compression
    noise = TorchGenerator(0).randn((1, config.in_channels, side, side))
    colours = (np.full(noise.shape, value, np.float32) for value in (0, 0.5, 1))
    for images in (np.clip(0.5 + 0.25 * noise, 0, 1), (noise > 0).astype(np.float32), *colours):
        predict({"images": images})


def _conditions(config: UNetConfig, embeddings: Inputs | None) -> dict[str, F32]:
    generator = TorchGenerator(1)
    ports = [port for port in ports_of(config).inputs if port.name not in ("sample", "timestep_ratio")]
    shapes = {port.name: tuple(SIZES[dim] if isinstance(dim, str) else dim for dim in port.dims) for port in ports}
    made = {name: generator.randn(shape) for name, shape in shapes.items()}
    for name in ("clip_img", "effnet"):  # zeros as without an image, and as effnet has for the unconditional half
        if name in made:
            made[name][1 if name == "effnet" else 0 :] = 0
    return {**made, **{name: value for name, value in (embeddings or {}).items() if name in made}}

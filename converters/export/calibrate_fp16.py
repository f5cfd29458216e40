"""Measures how large the values of a prior, decoder or VQGAN grow: a short run of its fp32 graph with probes."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from ...runtime.engines.onnxruntime import open_session
from ...runtime.engines.protocol import F32
from ...runtime.sampling.loop import sample
from ...runtime.sampling.samplers import Wuerstchen, guided, timesteps
from ...runtime.sampling.torch_generator import TorchGenerator
from ...schemas.stages import Stage, UNetConfig, VQGANConfig
from ...storage.safetensors_reader import TensorRange
from ..onnx import GraphOptions, write_graph

STEPS = 8
GUIDANCE = {Stage.PRIOR: 4.0, Stage.DECODER: 1.5}
SIDES = {Stage.PRIOR: 24, Stage.DECODER: 64}  # of the latents; the decoder's ranges hardly depend on the size
TOKENS = 77
PASS = re.compile(r"@\d+")  # the suffix of values of a further pass over the same blocks

# Latents of the VQGAN that are the same everywhere, beside normal noise: large areas reach the largest sums.
FLAT = (-4.0, 4.0)
VQGAN_SIDE = 32

Inputs = Mapping[str, F32]


def measure_ranges(
    config: UNetConfig | VQGANConfig, tensors: Mapping[str, TensorRange], embeddings: Inputs | None = None
) -> dict[str, float]:
    """The largest magnitude that each probed value reaches while one image is sampled with guidance, by value. The
    VQGAN decodes normal noise and flat areas.

    Weights stay in their files: beside them, the run takes memory for the values of one pass. `tensors` are in files of
    one folder. The graph is written into that folder and removed after the run.
    `embeddings` are clip_text (2, tokens, c) and clip_text_pooled (2, 1, c) of a prompt and its negative, float32.
    Normal noise takes their place when they are None. Raises EngineError without ONNX Runtime."""
    path = next(iter(tensors.values())).path.with_name("calibration.onnx")
    try:
        onnx.save(_constants_first(write_graph(config, tensors, GraphOptions(probes=True))), path)
        session = open_session(path)
        if isinstance(config, VQGANConfig):
            return _decode(config, session)
        return _run(config, session, _conditions(config, embeddings))
    finally:
        path.unlink(missing_ok=True)


def _constants_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with the nodes that read weights alone at its beginning; returns `model`, changed.

    Of the inputs of a node, ONNX Runtime computes that of the latest node first. So a weight is cast to fp32 when its
    product is due. Elsewhere, all casts would come first, and be in memory together."""
    nodes = model.graph.node
    constants = {tensor.name for tensor in model.graph.initializer}
    first: list[onnx.NodeProto] = []
    others: list[onnx.NodeProto] = []
    for node in nodes:
        alone = all(name in constants for name in node.input)
        (first if alone else others).append(node)
        constants.update(node.output if alone else ())
    ordered = [*first, *others]
    del nodes[:]
    nodes.extend(ordered)
    return model


def _run(config: UNetConfig, session: Any, conditions: Inputs) -> dict[str, float]:
    names = [output.name for output in session.get_outputs()]
    ranges: dict[str, float] = defaultdict(float)
    generator = TorchGenerator(0)
    shape = (1, config.in_channels, SIDES[config.stage], SIDES[config.stage])

    def predict(latents: F32, t: np.float32) -> F32:
        fed = {"sample": np.repeat(latents, 2, axis=0), "timestep_ratio": np.full(2, t, np.float32), **conditions}
        outputs = dict(zip(names, session.run(names, fed), strict=True))
        _note(ranges, outputs)
        return guided(outputs["noise_pred"], GUIDANCE[config.stage])

    schedule = Wuerstchen(timesteps(STEPS))
    for _ in sample(predict, generator.randn(shape), schedule, lambda: generator.randn(shape)):
        pass
    return dict(ranges)


def _decode(config: VQGANConfig, session: Any) -> dict[str, float]:
    names = [output.name for output in session.get_outputs()]
    ranges: dict[str, float] = defaultdict(float)
    shape = (1, config.latent_channels, VQGAN_SIDE, VQGAN_SIDE)
    for latents in (TorchGenerator(0).randn(shape), *(np.full(shape, value, np.float32) for value in FLAT)):
        _note(ranges, dict(zip(names, session.run(names, {"latents": latents}), strict=True)))
    return dict(ranges)


def _note(ranges: dict[str, float], outputs: Mapping[str, Any]) -> None:
    """Raise `ranges` to what the probes among `outputs` have seen."""
    for name, value in outputs.items():
        if name.endswith("/max"):
            probed = PASS.sub("", name.removesuffix("/max").removesuffix("/rows").removesuffix("/last"))
            ranges[probed] = max(ranges[probed], float(value))


def _conditions(config: UNetConfig, embeddings: Inputs | None) -> dict[str, F32]:
    generator = TorchGenerator(1)
    made = {name: generator.randn(shape) for name, shape in _shapes(config)}
    for name in ("clip_img", "effnet"):  # zeros as without an image, and as effnet has for the unconditional half
        if name in made:
            made[name][1 if name == "effnet" else 0 :] = 0
    return {**made, **{name: value for name, value in (embeddings or {}).items() if name in made}}


def _shapes(config: UNetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "clip_text_pooled", (2, 1, config.clip_text_pooled_in_channels)
    if config.clip_text_in_channels is not None:
        yield "clip_text", (2, TOKENS, config.clip_text_in_channels)
    if config.clip_image_in_channels is not None:
        yield "clip_img", (2, 1, config.clip_image_in_channels)
    if config.effnet_in_channels is not None:
        yield "effnet", (2, config.effnet_in_channels, 6, 6)

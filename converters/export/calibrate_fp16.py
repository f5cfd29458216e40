"""Measures how large the values of a prior or decoder grow: a short run of its fp32 graph with probes."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...runtime.engines.onnxruntime import open_session
from ...runtime.engines.protocol import F32
from ...runtime.sampling.loop import sample
from ...runtime.sampling.samplers import Wuerstchen, guided, timesteps
from ...runtime.sampling.torch_generator import TorchGenerator
from ...schemas.stages import Stage, UNetConfig
from ..onnx import GraphOptions, Weight, write_graph

STEPS = 8
GUIDANCE = {Stage.PRIOR: 4.0, Stage.DECODER: 1.5}
SIDES = {Stage.PRIOR: 24, Stage.DECODER: 64}  # of the latents; the decoder's ranges hardly depend on the size
TOKENS = 77
PASS = re.compile(r"@\d+")  # a further pass over the same blocks

Inputs = Mapping[str, F32]


def measure_ranges(
    config: UNetConfig,
    weights: Mapping[str, Weight],
    folder: Path,
    embeddings: Inputs | None = None,
    *,
    steps: int = STEPS,
    progress: Callable[[int, int], object] = lambda step, steps: None,
) -> dict[str, float]:
    """The largest magnitude that every probed value reaches while one image with guidance is sampled, by value.

    `weights` lie relative to `folder`, where the graph is written for the time of the run. `embeddings` are
    clip_text (2, tokens, c) and clip_text_pooled (2, 1, c) of a prompt and its negative; without them normal noise
    stands in. Raises EngineError without ONNX Runtime."""
    path = folder / "calibration.onnx"
    try:
        onnx.save(write_graph(config, weights, GraphOptions(probes=True)), path)
        return _run(config, open_session(path), _conditions(config, embeddings), steps, progress)
    finally:
        path.unlink(missing_ok=True)


def _run(
    config: UNetConfig, session: Any, conditions: Inputs, steps: int, progress: Callable[[int, int], object]
) -> dict[str, float]:
    names = [output.name for output in session.get_outputs()]
    ranges: dict[str, float] = defaultdict(float)
    generator = TorchGenerator(0)
    shape = (1, config.in_channels, SIDES[config.stage], SIDES[config.stage])

    def predict(latents: F32, t: np.float32) -> F32:
        fed = {"sample": np.repeat(latents, 2, axis=0), "timestep_ratio": np.full(2, t, np.float32), **conditions}
        outputs = dict(zip(names, session.run(names, fed), strict=True))
        for name, value in outputs.items():
            if name.endswith("/max"):
                probed = PASS.sub("", name.removesuffix("/max").removesuffix("/rows"))
                ranges[probed] = max(ranges[probed], float(value))
        return guided(outputs["noise_pred"], GUIDANCE[config.stage])

    schedule = Wuerstchen(timesteps(steps))
    for step in sample(predict, generator.randn(shape), schedule, lambda: generator.randn(shape)):
        progress(step.index + 1, steps)
    return dict(ranges)


def _conditions(config: UNetConfig, embeddings: Inputs | None) -> dict[str, F32]:
    generator = TorchGenerator(1)
    made = {name: generator.randn(shape) for name, shape in _shapes(config)}
    for name in ("clip_img", "effnet"):  # zeros for the half without conditions, and images are rare
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

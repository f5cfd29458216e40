"""A VQGAN whose values go beyond fp16: measured, given an exponent, and the same images as in fp32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from cascadekit.converters.export.calibrate_fp16 import measure_ranges
from cascadekit.converters.export.calibration_file import ranges_of
from cascadekit.converters.onnx import GraphOptions, write_graph
from cascadekit.parity.reference import load_reference
from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.fp16 import VQGAN_STREAM, fit_vqgan
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import VQGANConfig
from cascadekit.storage.safetensors_reader import read_header
from helpers.graphs import LayerNormalization, random_tensors
from helpers.ort_operators import OPERATORS

CONFIG = VQGANConfig(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=8)
LARGE = 3e5  # the image's size between its first and its last Linear


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    """Weights of the image's size `LARGE` that the last Linear makes small again."""
    made = random_tensors(CONFIG, 0)
    for name in ("up_blocks.0.0.weight", "up_blocks.0.0.bias"):
        made[name] = made[name] * LARGE
    made["out_block.0.weight"] = made["out_block.0.weight"] / LARGE
    return made


@pytest.fixture(scope="module")
def weights(tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("vqgan") / "weights.safetensors"
    save_file(tensors, path)
    return read_header(path).tensors


def images(weights: Any, options: GraphOptions, latents: np.ndarray) -> Any:
    path = next(iter(weights.values())).path.with_name("vqgan.onnx")
    onnx.save(write_graph(CONFIG, weights, options), path)
    evaluator = ReferenceEvaluator(str(path), new_ops=[LayerNormalization, *OPERATORS])
    with np.errstate(all="ignore"):
        return evaluator.run(None, {"latents": latents})[0]


@pytest.mark.parametrize("target", Target)
def test_an_exponent_keeps_the_image_in_fp16(tensors: dict[str, Any], weights: Any, target: Target) -> None:
    latents = np.random.default_rng(1).standard_normal((1, 4, 6, 5), dtype=np.float32)
    with torch.no_grad():
        expected = load_reference(CONFIG, tensors)(latents=torch.from_numpy(latents))["images"].numpy()
    fit = fit_vqgan(measure_ranges(CONFIG, weights))
    assert fit.exponents[VQGAN_STREAM] >= 5
    assert min(fit.margins.values()) >= 2
    half = GraphOptions(Precision.FP16, target)
    safe = images(weights, GraphOptions(Precision.FP16, target, exponents=fit.exponents), latents)
    # The weights of the last Linear are below fp16's normal numbers, and lose digits.
    assert np.linalg.norm(safe - expected) <= 3e-2 * np.linalg.norm(expected)
    plain = images(weights, half, latents)
    assert not np.linalg.norm(plain - expected) <= 0.1 * np.linalg.norm(expected)  # NaN, or another image
    wide = images(weights, GraphOptions(target=target, exponents=fit.exponents), latents)
    assert np.linalg.norm(wide - expected) <= 1e-5 * np.linalg.norm(expected)  # the same function


def test_what_was_measured_can_be_given_again(weights: Any, tmp_path: Path) -> None:
    saved = tmp_path / "measured.json"
    measured = ranges_of(saved, CONFIG, lambda: measure_ranges(CONFIG, weights))
    assert ranges_of(saved, CONFIG, lambda: pytest.fail("measured again")) == measured
    assert {"up_blocks.1", "up_blocks.2", "up_blocks.1.channelwise.1"} <= measured.keys()
    other = VQGANConfig(bottleneck_blocks=9, embed_dim=32)
    with pytest.raises(ExportError, match="measured on another network"):
        ranges_of(saved, other, lambda: {})


def test_hidden_values_have_no_exponent() -> None:
    assert not fit_vqgan({"up_blocks.1": 10.0, "up_blocks.1.channelwise.1": 10.0}).exponents
    assert fit_vqgan({"up_blocks.1": 10.0}, fixed=3).exponents == {VQGAN_STREAM: 3}
    with pytest.raises(ExportError, match="--precision vqgan=fp32"):
        fit_vqgan({"up_blocks.1": 10.0, "up_blocks.1.channelwise.1": 60000.0})
    with pytest.raises(ExportError, match="infinite"):
        fit_vqgan({"up_blocks.1": float("nan")})

"""A VQGAN whose values go beyond fp16: measured, given an exponent, and the same images as in fp32."""

import sys
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
from cascadekit.parity.reference import load_reference, load_vqgan_encoder
from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.fp16 import VQGAN_ENCODER_STREAM, VQGAN_STREAM, fit_vqgan
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import VQGANConfig
from cascadekit.storage.safetensors_reader import read_header
from helpers.fake_ort_cuda import CUDA, FakeOrtCuda
from helpers.graphs import LayerNormalization, random_tensors
from helpers.ort_operators import OPERATORS

CONFIG = VQGANConfig(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=8)
LARGE = 3e5  # the image's size between its first and its last Linear, in both halves


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    """Weights of the image's size `LARGE` that the last Linear makes small again."""
    made = random_tensors(CONFIG, 0)
    for name in ("up_blocks.0.0.weight", "up_blocks.0.0.bias"):
        made[name] = made[name] * LARGE
    for name in ("in_block.1.weight", "in_block.1.bias"):
        made[name] = made[name] * LARGE
    for name in ("out_block.0.weight", "down_blocks.3.0.weight"):
        made[name] = made[name] / LARGE
    return made


@pytest.fixture(scope="module")
def weights(tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("vqgan") / "weights.safetensors"
    save_file(tensors, path)
    return read_header(path).tensors


def computed(weights: Any, options: GraphOptions, name: str = "model", **inputs: np.ndarray) -> Any:
    path = next(iter(weights.values())).path.with_name("vqgan.onnx")
    onnx.save(write_graph(CONFIG, weights, options, name), path)
    evaluator = ReferenceEvaluator(str(path), new_ops=[LayerNormalization, *OPERATORS])
    with np.errstate(all="ignore"):
        return evaluator.run(None, inputs)[0]


@pytest.fixture(scope="module")
def measured(weights: Any) -> dict[str, float]:
    return measure_ranges(CONFIG, weights)


@pytest.mark.parametrize("target", Target)
def test_an_exponent_keeps_the_image_in_fp16(
    tensors: dict[str, Any], weights: Any, measured: dict[str, float], target: Target
) -> None:
    latents = np.random.default_rng(1).standard_normal((1, 4, 6, 5), dtype=np.float32)
    with torch.no_grad():
        expected = load_reference(CONFIG, tensors)(latents=torch.from_numpy(latents))["images"].numpy()
    fit = fit_vqgan(measured)
    assert fit.exponents[VQGAN_STREAM] >= 5
    assert min(fit.margins.values()) >= 2
    half = GraphOptions(Precision.FP16, target)
    safe = computed(weights, GraphOptions(Precision.FP16, target, exponents=fit.exponents), latents=latents)
    # The weights of the last Linear are below fp16's normal numbers, and lose digits.
    assert np.linalg.norm(safe - expected) <= 3e-2 * np.linalg.norm(expected)
    plain = computed(weights, half, latents=latents)
    assert not np.linalg.norm(plain - expected) <= 0.1 * np.linalg.norm(expected)  # NaN, or another image
    wide = computed(weights, GraphOptions(target=target, exponents=fit.exponents), latents=latents)
    assert np.linalg.norm(wide - expected) <= 1e-5 * np.linalg.norm(expected)  # the same function


@pytest.mark.parametrize("target", Target)
def test_the_encoder_has_an_exponent_of_its_own(
    tensors: dict[str, Any], weights: Any, measured: dict[str, float], target: Target
) -> None:
    images = np.random.default_rng(2).random((1, 3, 24, 20), dtype=np.float32)
    with torch.no_grad():
        expected = load_vqgan_encoder(CONFIG, tensors)(images=torch.from_numpy(images))["latents"].numpy()
    exponents = fit_vqgan(measured).exponents
    assert exponents[VQGAN_ENCODER_STREAM] >= 3

    def apart(options: GraphOptions) -> float:
        found = computed(weights, options, "encoder", images=images)
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    assert apart(GraphOptions(Precision.FP16, target, exponents=exponents)) <= 3e-2
    assert not apart(GraphOptions(Precision.FP16, target)) <= 0.1
    only_decoder = {VQGAN_STREAM: exponents[VQGAN_STREAM]}
    assert not apart(GraphOptions(Precision.FP16, target, exponents=only_decoder)) <= 0.1
    assert apart(GraphOptions(target=target, exponents=exponents)) <= 1e-5


def test_it_is_measured_on_the_gpu_where_there_is_one(
    weights: Any, measured: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = FakeOrtCuda()
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    assert measure_ranges(CONFIG, weights, say=said.append) == measured
    assert [wishes["providers"][0][0] for wishes in ort.asked[1:]] == [CUDA, CUDA]  # after a probe: both halves
    assert ort.asked[1]["providers"][0][1]["use_tf32"] == "0"
    assert {"ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"} <= {*ort.asked[1]["disabled_optimizers"]}
    assert said == []

    start = ort.InferenceSession

    def fail(path: Any, options: Any, **wishes: Any) -> Any:
        session: Any = start(path, options, **wishes)
        if isinstance(path, Path) and wishes["providers"][0][0] == CUDA:
            session.run = lambda *given: [][1]
        return session

    monkeypatch.setattr(ort, "InferenceSession", fail)
    assert measure_ranges(CONFIG, weights, say=said.append) == measured
    assert said == ["vqgan: measured on the CPU, because the GPU failed: list index out of range"]
    assert not list(next(iter(weights.values())).path.parent.glob("calibration*"))


def test_what_was_measured_can_be_given_again(measured: dict[str, float], tmp_path: Path) -> None:
    saved = tmp_path / "measured.json"
    assert ranges_of(saved, CONFIG, lambda: measured) == measured
    assert ranges_of(saved, CONFIG, lambda: pytest.fail("measured again")) == measured
    assert {"up_blocks.1", "up_blocks.2", "up_blocks.1.channelwise.1", "down_blocks.2", "in_block.1"} <= measured.keys()
    other = VQGANConfig(bottleneck_blocks=9, embed_dim=32)
    with pytest.raises(ExportError, match="measured on another network"):
        ranges_of(saved, other, lambda: {})


def test_hidden_values_have_no_exponent() -> None:
    assert not fit_vqgan({"up_blocks.1": 10.0, "up_blocks.1.channelwise.1": 10.0}).exponents
    assert fit_vqgan({"up_blocks.1": 10.0}, fixed=3).exponents == {VQGAN_STREAM: 3, VQGAN_ENCODER_STREAM: 3}
    assert not fit_vqgan({"down_blocks.3.0": 10000.0}).exponents  # the encoder's last product
    with pytest.raises(ExportError, match="in its down_blocks the image reaches 10, hidden values 6e"):
        fit_vqgan({"down_blocks.2": 10.0, "down_blocks.3.0": 60000.0})
    with pytest.raises(ExportError, match=r'set precisions=\{"vqgan": "fp32"\}'):
        fit_vqgan({"up_blocks.1": 10.0, "up_blocks.1.channelwise.1": 60000.0})
    with pytest.raises(ExportError, match="infinite"):
        fit_vqgan({"up_blocks.1": float("nan")})

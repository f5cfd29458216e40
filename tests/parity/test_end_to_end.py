"""Metrics against numpy and torch formulas; verify on a healthy bundle and on bundles with planted faults."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cascadekit import export, verify
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.compare import compare
from cascadekit.parity.compare_engine import compare_engine
from cascadekit.parity.image_metrics import psnr
from cascadekit.parity.reference.loading import reference_engine
from cascadekit.parity.reference_run import ReferenceOutputs
from cascadekit.runtime.engines.int8_saturation import int8_saturates
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.engines.openvino import multiplies_bf16
from cascadekit.schemas.errors import ParityError
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers.standins import accept_changes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_metrics_equal_torch(scale: float) -> None:
    reference = (RNG.standard_normal((2, 3, 5)) * scale).astype(np.float32)
    found = reference + (RNG.standard_normal((2, 3, 5)) * scale * 1e-3).astype(np.float32)
    x, r = torch.from_numpy(found).double().flatten(), torch.from_numpy(reference).double().flatten()
    comparison = compare("x", found, reference, 1e-2)
    assert comparison
    assert comparison.max_abs == pytest.approx(float((x - r).abs().max()))
    assert comparison.mean_abs == pytest.approx(float((x - r).abs().mean()))
    assert comparison.relative_l2 == pytest.approx(float(torch.dist(x, r) / r.norm()))
    assert comparison.cosine == pytest.approx(float(torch.cosine_similarity(x, r, dim=0, eps=0)))
    assert not compare("x", found, reference, comparison.relative_l2 * 0.99)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_fail_at_any_tolerance(bad: float) -> None:
    reference = np.ones(4, np.float32)
    found = np.array([1, bad, 1, 1], np.float32)
    comparison = compare("x", found, reference, 1e9)
    assert comparison.nonfinite == 1
    assert comparison.failures == ("1 values are NaN or infinite",)
    assert not compare("x", reference, found, 1e9)


def test_constant_output_fails() -> None:
    reference = RNG.standard_normal(8).astype(np.float32)
    assert compare("x", np.zeros(8, np.float32), reference, 2.0).failures == ("the output is constant",)
    assert compare("x", np.ones(8, np.float32), np.ones(8, np.float32), 0.0)


def test_extremes() -> None:
    empty = compare("x", np.zeros(0, np.float32), np.zeros(0, np.float32), 0.0)
    assert empty
    assert empty.max_abs == empty.relative_l2 == 0
    zeros = compare("x", np.zeros(3, np.float32), np.zeros(3, np.float32), 0.0)
    assert (bool(zeros), zeros.cosine) == (True, 1.0)
    assert compare("x", np.ones(3, np.float32), np.zeros(3, np.float32), 1.0).relative_l2 == math.inf
    with pytest.raises(ParityError, match=r"expected shape \[3\] as the reference, found \[4\]"):
        compare("x", np.ones(4, np.float32), np.ones(3, np.float32), 1.0)


def test_psnr() -> None:
    reference = RNG.random((1, 3, 8, 8), dtype=np.float32)
    assert psnr(reference, reference) == math.inf
    mse = float(torch.nn.functional.mse_loss(torch.from_numpy(reference + 0.1), torch.from_numpy(reference)))
    assert psnr(reference + np.float32(0.1), reference) == pytest.approx(10 * math.log10(1 / mse), rel=1e-6)


@pytest.fixture
def expected(tiny_outputs: ReferenceOutputs) -> ReferenceOutputs:
    return tiny_outputs


def test_a_healthy_bundle_passes(tiny: Path, expected: ReferenceOutputs) -> None:
    opened = open_bundle(tiny / "bundle")
    report = compare_engine(OnnxRuntimeEngine(opened), expected, opened)
    assert report, [(c.name, c.failures) for c in report.comparisons if not c]
    assert max(c.relative_l2 for c in report.comparisons) < 1e-5
    names = " ".join(c.name for c in report.comparisons)
    assert all(f"{stage}:" in names for stage in ("text_encoder", "prior", "decoder", "vqgan", "trajectory"))
    assert {"prior step 4", "decoder step 3", "image"} <= {
        c.name.removeprefix("trajectory: ") for c in report.comparisons
    }
    content = json.loads(json.dumps(report.to_json()))
    assert content["passed"] is True
    assert len(content["comparisons"]) == len(report.comparisons)


@pytest.mark.parametrize(
    ("stage", "tensor"),
    [
        (Stage.TEXT_ENCODER, "text_model.encoder.layers.1.mlp.fc1.bias"),
        (Stage.PRIOR, "down_blocks.1.0.channelwise.2.beta"),
        (Stage.PRIOR, "up_blocks.0.2.attention.to_k.weight"),
        (Stage.DECODER, "up_blocks.2.1.mapper_sca.bias"),
        (Stage.DECODER, "pixels_mapper.2.bias"),
        (Stage.VQGAN, "up_blocks.4.gammas"),
    ],
)
def test_one_wrong_tensor_is_noticed(
    tiny: Path, expected: ReferenceOutputs, tmp_path: Path, stage: Stage, tensor: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny / "bundle", bundle)
    path = bundle / stage / "weights.safetensors"
    data = load_file(path)
    spoilt = bytearray(path.read_bytes())
    position = spoilt.find(data[tensor].tobytes())
    wrong = data[tensor].copy()
    wrong.flat[0] += 1.0
    spoilt[position : position + wrong.nbytes] = wrong.tobytes()
    path.write_bytes(spoilt)
    accept_changes(bundle)
    opened = open_bundle(bundle)
    report = compare_engine(OnnxRuntimeEngine(opened), expected, opened, [stage])
    assert not report
    assert report.image_psnr is None


def test_half_precision_weights_are_compared_with_what_they_say(tiny: Path, tmp_path: Path) -> None:
    """Weights stored in 16 bits are computed in fp32 by both: the comparison stays as tight as in fp32."""
    from cascadekit import convert, export

    shutil.copytree(tiny / "original", tmp_path / "original")
    for path in (tmp_path / "original").glob("*.safetensors"):
        tensors = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in load_file(path).items()}
        save_file(tensors, path)
    convert([tmp_path / "original"], tmp_path / "model", "diffusers")
    export(tmp_path / "model", tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle")
    stages = tuple(opened.manifest.stages)
    report = compare_engine(
        OnnxRuntimeEngine(opened), reference_engine(open_model([tmp_path / "model"]), stages), opened, stages
    )
    assert report
    assert max(c.relative_l2 for c in report.comparisons) < 1e-5


@pytest.mark.parametrize("kind", [Quantization.INT8_DYNAMIC, Quantization.INT4])
def test_quantised_bundles_are_held_to_what_they_can_reach(tiny: Path, tmp_path: Path, kind: Quantization) -> None:
    if kind is Quantization.INT8_DYNAMIC and int8_saturates():
        pytest.skip("no VNNI: ONNX Runtime's 8-bit products saturate on this CPU")
    export(tiny / "model", tmp_path / "bundle", quantize=kind)
    report = verify(tmp_path / "bundle", tiny / "model")
    assert report, report.to_json()
    worst = max(c.relative_l2 for c in report.comparisons if c.name.startswith("prior"))
    assert worst > 1e-3  # more than a float bundle may lose
    path = tmp_path / "bundle" / "cascade.json"
    content = json.loads(path.read_text())
    for stage in content["stages"].values():
        stage["quantization"] = "none"
    path.write_text(json.dumps(content))
    assert not verify(tmp_path / "bundle", tiny / "model", stages=[Stage.PRIOR])


def test_engines_in_bf16_are_held_to_bf16(tiny: Path) -> None:
    report = verify(tiny / "bundle", tiny / "model", engine="openvino-bf16")
    assert report, report.to_json()
    if multiplies_bf16():  # elsewhere OpenVINO computes in fp32
        assert max(c.relative_l2 for c in report.comparisons) > 1e-3

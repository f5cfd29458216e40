"""Bundles in other precisions: what is stored, what is computed, what is measured, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from cascadekit import Cascade, Settings, export
from cascadekit.cli import main
from cascadekit.converters.export.bundle_weights import projections_together
from cascadekit.converters.export.export_options import ExportOptions
from cascadekit.parity.image_metrics import psnr
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.schemas.errors import ConversionError, EngineError, ExportError, UsageError
from cascadekit.schemas.hoisted import conditioning_ports, step_ports
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import PRESETS, PROJ_BLOCKS_ENDS, Stage, UNetConfig, Variant, prior_config
from cascadekit.storage.bundle import open_bundle
from helpers.graphs import random_tensors

QUICK = Settings(128, 64, prior_steps=3, decoder_steps=2, decoder_guidance=1.5)
FP16 = ExportOptions(precision=Precision.FP16)


@pytest.fixture(scope="module")
def plain_image(tiny: Path) -> np.ndarray:
    """The image of the tiny bundle in fp32."""
    return draw(tiny / "bundle")


def draw(bundle: Path) -> np.ndarray:
    with Cascade.open(bundle) as cascade:
        latents = cascade.generate("x", negative="y", seed=0, settings=QUICK).decoder_latents
        return cascade.pixels(latents)


def test_half_precision_is_stored_and_computed_as_such(tiny: Path, plain_image: np.ndarray, tmp_path: Path) -> None:
    manifest = export(tiny / "model", tmp_path / "half", options=FP16)
    for stage, entry in manifest.stages.items():
        assert (entry.precision, entry.target, entry.weights) == (Precision.FP16, Target.PORTABLE, "copy")
        stored = load_file(tmp_path / "half" / stage / "weights.safetensors")
        assert {t.dtype for n, t in stored.items() if "num_batches" not in n} == {torch.float16}
        model = onnx.load(tmp_path / "half" / entry.graphs["model"].path, load_external_data=False)
        external = {t.data_type for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
        assert external == {TensorProto.FLOAT16}
        assert {port.dtype for port in (*entry.inputs, *entry.outputs)} <= {"float32", "int64"}
    assert 45 < psnr(draw(tmp_path / "half"), plain_image) < 100


def test_stages_may_differ_and_have_their_split_graphs(tiny: Path, plain_image: np.ndarray, tmp_path: Path) -> None:
    manifest = export(tiny / "model", tmp_path / "mixed", precisions={Stage.PRIOR: Precision.FP16}, target=Target.ORT)
    assert {stage: entry.precision for stage, entry in manifest.stages.items()} == {
        Stage.TEXT_ENCODER: Precision.FP32,
        Stage.PRIOR: Precision.FP16,
        Stage.DECODER: Precision.FP32,
        Stage.VQGAN: Precision.FP32,
    }
    for stage in (Stage.PRIOR, Stage.DECODER):
        config = PRESETS[stage, Variant.TINY]
        assert isinstance(config, UNetConfig)
        graphs = manifest.stages[stage].graphs
        assert list(graphs) == ["model", "conditioning", "step"]
        for name, ports in (("conditioning", conditioning_ports(config)), ("step", step_ports(config))):
            assert [port.name for port in graphs[name].inputs] == [port.name for port in ports.inputs]
            assert [port.dims for port in graphs[name].outputs] == [port.dims for port in ports.outputs]
    assert psnr(draw(tmp_path / "mixed"), plain_image) > 45


def test_links_keep_the_weights_and_cast_them(tiny: Path, tmp_path: Path) -> None:
    manifest = export(tiny / "model", tmp_path / "linked", weights="link", options=FP16, stages=[Stage.PRIOR])
    assert manifest.stages[Stage.PRIOR].weights in ("link", "reflink")
    model = onnx.load(tmp_path / "linked" / "prior" / "model.onnx", load_external_data=False)
    assert {t.data_type for t in model.graph.initializer if t.data_location} == {TensorProto.FLOAT}
    with pytest.raises(ExportError, match=r"stored as F32, not as BF16; use weights=\"copy\""):
        export(tiny / "model", tmp_path / "refused", weights="link", storage=Precision.BF16)
    assert not (tmp_path / "refused").exists()


def test_storage_apart_from_what_is_computed(tiny: Path, tmp_path: Path) -> None:
    manifest = export(tiny / "model", tmp_path / "stored", storage=Precision.BF16, stages=[Stage.PRIOR])
    assert manifest.stages[Stage.PRIOR].precision is Precision.FP32
    stored = load_file(tmp_path / "stored" / "prior" / "weights.safetensors")
    theirs = load_file(tiny / "model" / "prior" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], t.bfloat16()) for name, t in theirs.items())


def test_projections_lie_together_in_copies(tiny: Path) -> None:
    for stage, parts in ((Stage.PRIOR, ("to_q", "to_k", "to_v")), (Stage.TEXT_ENCODER, ("q_proj", "k_proj", "v_proj"))):
        model = onnx.load(tiny / "bundle" / stage / "model.onnx", load_external_data=False)
        products = [node.name for node in model.graph.node if node.op_type == "Gemm"]
        together = "+".join(parts[1:] if stage is Stage.PRIOR else parts)
        assert sum(name.endswith(together) for name in products) == {Stage.PRIOR: 4, Stage.TEXT_ENCODER: 2}[stage]
    names = ["a.to_v.bias", "b", "a.to_q.weight", "a.to_k.weight", "a.to_v.weight", "c.to_k.weight", "a.to_q.bias"]
    assert projections_together(names) == [
        "a.to_q.bias",
        "a.to_v.bias",
        "b",
        "a.to_q.weight",
        "a.to_k.weight",
        "a.to_v.weight",
        "c.to_k.weight",
    ]


@pytest.fixture
def overflowing(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with a prior whose last stream goes beyond 65504."""
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    path = folder / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("up_blocks.1") and (".channelwise.4." in name or ".to_out.0." in name):
            tensors[name] *= 1e5
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_calibration_finds_the_exponents(overflowing: Path, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = export(
        overflowing,
        tmp_path / "safe",
        precisions={Stage.PRIOR: Precision.FP16},
        calibration=tmp_path / "measured.json",
        say=said.append,
    )
    entry = manifest.stages[Stage.PRIOR]
    assert set(entry.exponents) == {"up_blocks.1"}
    assert 1 < entry.exponents["up_blocks.1"] < 8
    assert min(entry.fp16_margins.values()) >= 2
    assert any("up_blocks.1 2^-" in text for text in said)
    assert sorted(p.name for p in (tmp_path / "safe" / "prior").iterdir()) == [
        "conditioning.onnx",
        "model.onnx",
        "step.onnx",
        "weights.safetensors",
    ]
    said.clear()
    again = export(
        overflowing,
        tmp_path / "again",
        FP16,
        stages=[Stage.PRIOR],
        calibration=tmp_path / "measured.json",
        say=said.append,
    )
    assert again.stages[Stage.PRIOR].exponents == entry.exponents
    assert not any("measuring" in text for text in said)
    export(overflowing, tmp_path / "plain")
    assert psnr(draw(tmp_path / "safe"), draw(tmp_path / "plain")) > 45


def test_bf16_is_refused_where_nothing_computes_it(tiny: Path, tmp_path: Path) -> None:
    export(tiny / "model", tmp_path / "bf16", stages=[Stage.VQGAN], precision=Precision.BF16)
    with Cascade.open(tmp_path / "bf16") as cascade, pytest.raises(EngineError, match=r"device=.cuda.*vqgan=fp32"):
        cascade.pixels(np.zeros((1, 4, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("wishes", "stages", "words"),
    [
        (ExportOptions(fp16_safe="auto"), (), 'add precision="fp16"'),
        (ExportOptions(precision=Precision.FP16, fp16_safe=3), (Stage.TEXT_ENCODER,), "for a prior, decoder or"),
        (ExportOptions(calibration="x.json"), (), "for a prior, decoder or vqgan in fp16"),
        (ExportOptions(precision=Precision.FP16, fp16_safe="off", calibration="x.json"), (), "without fp16_safe"),
        (ExportOptions(controlnet=True), (Stage.VQGAN,), "for the prior"),
        (ExportOptions(vqgan_scale=0.43), (Stage.PRIOR,), "vqgan_scale=0.43 is for the vqgan, which is not exported"),
        (ExportOptions(quantize="int8"), (Stage.VQGAN,), 'quantize="int8" is for prior, decoder'),
        (
            ExportOptions(precisions={Stage.PRIOR: Precision.BF16}),
            (Stage.VQGAN,),
            "given for the prior, which is not exported",
        ),
    ],
)
def test_wishes_that_make_no_sense_are_refused(
    tiny: Path, tmp_path: Path, wishes: ExportOptions, stages: tuple[Stage, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        export(tiny / "model", tmp_path / "out", stages=stages, options=wishes)
    assert not (tmp_path / "out").exists()


def test_a_vqgan_alone_is_measured_too(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    measured = export(tiny / "model", tmp_path / "1", stages=["vqgan"], precision="fp16", calibration=file)
    assert file.is_file()
    given = export(tiny / "model", tmp_path / "2", stages=["vqgan"], precision="fp16", fp16_safe=3)
    assert measured.stages[Stage.VQGAN].exponents == {}
    assert set(given.stages[Stage.VQGAN].exponents.values()) == {3}


def run(*arguments: object, code: int = 0) -> str:
    result: Any = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    text: str = result.output
    return text


def test_the_command_line(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = run(
        *("export", tiny / "model", "-o", out, "--stage", "decoder", "--stage", "vqgan"),
        *("--precision", "fp16", "--precision", "vqgan=fp32", "--fp16-safe", "2"),
    )
    assert "decoder in fp16: streams made smaller: down_blocks.0 2^-2" in text
    stages = open_bundle(out).manifest.stages
    assert [stages[s].precision for s in (Stage.DECODER, Stage.VQGAN)] == [Precision.FP16, Precision.FP32]
    assert run("verify", out, "--against", tiny / "model")
    assert run("validate", out)
    assert "expected fp32, fp16, bf16" in run("export", tiny / "model", "-o", out, "--precision", "prior=x", code=2)
    assert "a number from 0 to 12" in run("export", tiny / "model", "-o", out, "--fp16-safe", "99", code=2)


def test_a_prior_for_controlnets(tmp_path: Path) -> None:
    """As many residual blocks as the full prior has, narrow ones. Residuals that are not fed change nothing."""
    config = prior_config((64, 64), (1, 1), (8, 24), text=8, pooled=12)
    save_file(random_tensors(config, 0), tmp_path / "prior.safetensors")
    runners = []
    for name, wishes in (("plain", ExportOptions()), ("controlled", ExportOptions(controlnet=True))):
        entry = export(tmp_path / "prior.safetensors", tmp_path / name, options=wishes).stages[Stage.PRIOR]
        runners.append(OnnxRuntimeEngine(open_bundle(tmp_path / name)).load(Stage.PRIOR))
    assert entry.control == PROJ_BLOCKS_ENDS
    fed = [port.name for port in entry.inputs if port.name.startswith("control.")]
    assert fed == [f"control.{number}" for number in (0, 4, 8, 12, 51, 55, 59, 63)]
    assert [port.name for port in entry.graphs["step"].inputs[-8:]] == fed
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 3, "width": 4, "tokens": 5, "images": 1}
    inputs = {
        port.name: rng.random([sizes[d] if isinstance(d, str) else d for d in port.dims], np.float32)
        for port in entry.inputs
        if port.name not in fed
    }
    plain, controlled = (runner(inputs)["noise_pred"] for runner in runners)
    np.testing.assert_allclose(controlled, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    one = {"control.59": rng.random((2, 64, 2, 2), np.float32)}
    assert not np.allclose(runners[1]({**inputs, **one})["noise_pred"], plain, rtol=0, atol=1e-3 * np.abs(plain).max())


def test_weights_beyond_fp16_say_what_to_export(overflowing: Path, tmp_path: Path) -> None:
    path = overflowing / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["clf.1.weight"][0, 0] = 1e5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"clf\.1\.weight.*export it with precision=.bf16") as caught:
        export(overflowing, tmp_path / "out", options=FP16)
    assert "allow_overflow" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as a calibration"),
        ('{"format": "other", "version": 1, "stages": {}}', "found 'other', version 1"),
        ('{"format": "cascadekit-calibration", "version": 1, "stages": {"prior": {"a": "b"}}}', "names to magnitudes"),
        ('{"format": "cascadekit-calibration", "version": 1, "stages": {"prior": {"a": 1}}}', "another network"),
    ],
)
def test_files_that_are_no_calibration_of_the_model(tiny: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(ExportError, match=rf"measured\.json: .*{words}"):
        export(tiny / "model", tmp_path / "out", FP16, stages=[Stage.PRIOR], calibration=tmp_path / "measured.json")
    assert (tmp_path / "measured.json").read_text() == text
    assert not (tmp_path / "out").exists()

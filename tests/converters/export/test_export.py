"""Bundles: what is in them, by copy and by link, from either layout, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import Cascade, Settings, convert, export
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.converters.export import bundle_weights as placing
from cascadekit.parity.reference.loading import reference_engine
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.errors import CascadeError, ExportError, LayoutError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

QUICK = Settings(64, 64, prior_steps=2, decoder_steps=2)


def draw(bundle: Path) -> np.ndarray:
    with Cascade.open(bundle) as cascade:
        return cascade.generate("x", seed=0, settings=QUICK).decoder_latents


@pytest.fixture(scope="module")
def plain(tiny: Path) -> np.ndarray:
    """The image of the tiny bundle."""
    return draw(tiny / "bundle")


def test_manifest_names_every_file_with_its_hash(tiny: Path) -> None:
    root = tiny / "bundle"
    manifest = open_bundle(root).manifest
    assert list(manifest.stages) == ["text_encoder", "prior", "decoder", "vqgan"]
    listed = {file.path: file for entry in manifest.stages.values() for file in entry.files}
    on_disk = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    assert set(on_disk) == {*listed, "cascade.json", "tokenizer/tokenizer.json"}
    for name, file in listed.items():
        content = on_disk[name].read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for stage, entry in manifest.stages.items():
        model = onnx.load(root / entry.files[0].path, load_external_data=False)
        assert [i.name for i in model.graph.input] == [port.name for port in entry.inputs]
        assert [o.name for o in model.graph.output] == [port.name for port in entry.outputs]
        assert len(model.SerializeToString()) < 600_000, stage
    assert manifest.default_size == (256, 256)


def test_links_share_the_models_files(tiny: Path, plain: np.ndarray, tmp_path: Path) -> None:
    export(tiny / "model", tmp_path / "linked", weights="link")
    source = tiny / "model" / "prior" / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "linked" / "prior" / source.name).samefile(source)
    assert np.array_equal(draw(tmp_path / "linked"), plain)


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_original_files_export_without_conversion(tiny: Path, plain: np.ndarray, tmp_path: Path, weights: str) -> None:
    """q, k and v are row ranges of the original in_proj; only the vqgan's scale differs between the layouts."""
    manifest = export(tiny / "original", tmp_path / "bundle", weights=weights)
    assert manifest.vqgan_scale == 0.43
    assert np.array_equal(draw(tmp_path / "bundle"), plain)


def test_scale_of_the_vqgan_can_be_set(tiny: Path, tmp_path: Path) -> None:
    manifest = export(tiny / "original", tmp_path / "bundle", stages=[Stage.VQGAN], vqgan_scale=0.3764)
    assert manifest.vqgan_scale == 0.3764
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32) * 100
    with Cascade.open(tmp_path / "bundle") as ours, Cascade.open(tiny / "bundle") as theirs:
        assert np.array_equal(ours.pixels(latents), theirs.pixels(latents))


def test_sixteen_bit_weights_stay_sixteen_bit(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model" / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    export(tmp_path / "prior", tmp_path / "bundle", weights="copy")
    stored = load_file(tmp_path / "bundle" / "prior" / "weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    onnx.checker.check_model(tmp_path / "bundle/prior/model.onnx", full_check=True)


def test_refused_exports_leave_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="the model has no vqgan; it has prior"):
        export(tiny / "model" / "prior", out, stages=[Stage.VQGAN])
    shutil.copytree(tiny / "model" / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({n: t.double() for n, t in tensors.items()}, path)
    with pytest.raises(ExportError, match="weights of dtype F64; graphs take F32, BF16, F16"):
        export(tmp_path / "prior", out)
    save_file({n: t for n, t in tensors.items() if n != "clf.1.bias"}, path)
    with pytest.raises(LayoutError, match=r"missing \(1\): clf\.1\.bias"):
        export(tmp_path / "prior", out)

    def cross_device(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(placing.os, "link", cross_device)
    with pytest.raises(ExportError, match=r"cannot be hard-linked.*use weights=.copy"):
        export(tiny / "model", out, weights="link")
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["prior"]


def test_manifest_is_plain_json(tiny: Path) -> None:
    content = json.loads((tiny / "bundle" / "cascade.json").read_text())
    assert content["format"] == "cascadekit-bundle"
    assert [source["layout"] for source in content["stages"]["prior"]["sources"]] == ["diffusers"]
    assert str(tiny) not in json.dumps(content)


def test_sharded_and_comfyui_sources(tiny: Path, plain: np.ndarray, tmp_path: Path) -> None:
    """A folder of shards, and all-in-one files whose text projection lies transposed, export alike."""
    convert([tiny / "original"], tmp_path / "sharded", "diffusers", shard_size=500_000)
    convert([tiny / "original"], tmp_path / "comfyui", "comfyui")
    for path in (tmp_path / "comfyui").iterdir():
        tensors = load_file(path)
        projection = tensors.pop("text_encoder.clip_g.transformer.text_projection.weight")
        save_file({**tensors, "text_encoder.clip_g.text_projection": projection.T.contiguous()}, path)
    for number, (model, weights) in enumerate((("sharded", "copy"), ("sharded", "link"), ("comfyui", "copy"))):
        export(tmp_path / model, tmp_path / f"bundle{number}", weights=weights)
        assert np.array_equal(draw(tmp_path / f"bundle{number}"), plain), (model, weights)
    with pytest.raises(ExportError, match=r"text_projection\.weight is stored transposed; use weights=\"copy\""):
        export(tmp_path / "comfyui", tmp_path / "linked", weights="link")
    reference = reference_engine(open_model([tmp_path / "comfyui"]), [Stage.TEXT_ENCODER]).load(Stage.TEXT_ENCODER)
    tokens = ClipTokenizer.open()(["a cat"])
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    plain = reference_engine(open_model([tiny / "model"]), [Stage.TEXT_ENCODER]).load(Stage.TEXT_ENCODER)
    assert np.array_equal(reference(inputs)["pooled"], plain(inputs)["pooled"])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 0.0, -0.3764, 1e9, 1e-9])
def test_scales_that_no_image_survives_are_refused(tiny: Path, tmp_path: Path, scale: float) -> None:
    with pytest.raises(UsageError, match=r"vqgan_scale=.*: expected a number from 0.001 to 1000, such as 0.3764"):
        export(tiny / "model", tmp_path / "bundle", vqgan_scale=scale)
    shutil.copytree(tiny / "model/vqgan", tmp_path / "vqgan")
    config = json.loads((tmp_path / "vqgan/config.json").read_text())
    (tmp_path / "vqgan/config.json").write_text(json.dumps({**config, "scale_factor": scale}))
    with pytest.raises(CascadeError, match="scale_factor"):
        export(tmp_path / "vqgan", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()

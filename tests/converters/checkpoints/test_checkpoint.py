"""Conversions of the tiny cascade in several dtypes; safetensors, diffusers and transformers read the results."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cascadekit import convert, inspect
from cascadekit.converters.checkpoints import convert as checkpoint
from cascadekit.schemas.errors import CascadeError, ConversionError, LayoutError, UsageError
from cascadekit.schemas.passport_keys import without_passport
from cascadekit.schemas.stages import Stage, Variant
from cascadekit.storage.safetensors_reader import read_header

STAGES = ("stage_a", "stage_b", "stage_c")


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def originals(request: pytest.FixtureRequest, original: Path, tmp_path: Path) -> Path:
    """The tiny original files in one dtype, in the library's sorted order, headers as long as Stability's."""
    folder = tmp_path / "original"
    shutil.copytree(original, folder)
    for stage in STAGES:
        tensors = stored(folder / f"{stage}.safetensors")
        cast = {n: t if t.dtype == torch.int64 else t.to(request.param) for n, t in tensors.items()}
        metadata = {"modelspec.title": "stand-in", "modelspec.thumbnail": "x" * 13500}
        save_file(cast, folder / f"{stage}.safetensors", metadata)
    return folder


def test_there_and_back_is_bit_exact(originals: Path, tmp_path: Path) -> None:
    convert([originals], tmp_path / "model", "diffusers")
    convert([tmp_path / "model"], tmp_path / "back", "original")
    for stage in STAGES:
        before, after = originals / f"{stage}.safetensors", tmp_path / "back" / f"{stage}.safetensors"
        assert_equal(stored(after), stored(before))
        assert without_passport(read_header(after).metadata) == {"format": "pt", **read_header(before).metadata}


def test_data_keeps_its_order_when_nothing_was_sorted(original: Path, tmp_path: Path) -> None:
    """The tiny files lie in the order of their layout, as Stability's do: there and back changes no data byte."""
    convert([original], tmp_path / "model", "diffusers")
    convert([tmp_path / "model"], tmp_path / "back", "original")
    for stage in STAGES:
        blocks = []
        for folder in (original, tmp_path / "back"):
            content = (folder / f"{stage}.safetensors").read_bytes()
            blocks.append(content[8 + struct.unpack("<Q", content[:8])[0] :])
        assert blocks[0] == blocks[1]


def test_unets_equal_diffusers_own_conversion(originals: Path, tmp_path: Path) -> None:
    convert([originals], tmp_path / "model", "diffusers")
    for stage, folder in (("stage_c", "prior"), ("stage_b", "decoder")):
        theirs = convert_stable_cascade_unet_single_file_to_diffusers(stored(originals / f"{stage}.safetensors"))
        ours = stored(tmp_path / "model" / folder / "diffusion_pytorch_model.safetensors")
        assert_equal(ours, theirs)


def test_diffusers_and_transformers_load_every_component(originals: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    convert([originals], model, "diffusers")
    loaders: dict[str, Any] = {
        "prior": StableCascadeUNet,
        "decoder": StableCascadeUNet,
        "vqgan": PaellaVQModel,
        "text_encoder": CLIPTextModelWithProjection,
    }
    for folder, cls in loaders.items():
        loaded, info = cls.from_pretrained(model / folder, output_loading_info=True)
        assert not info["missing_keys"], folder
        assert not info["unexpected_keys"], folder
        assert not info["mismatched_keys"], folder
        assert sum(p.numel() for p in loaded.parameters()) > 1000
    scheduler = DDPMWuerstchenScheduler.from_pretrained(model / "scheduler")
    assert (scheduler.config.s, scheduler.config.scaler) == (0.008, 1.0)
    assert CLIPTokenizer.from_pretrained(model / "tokenizer")("a cat").input_ids == [49406, 320, 2368, 49407]


def test_config_of_the_vqgan_says_the_scale_of_its_layout(original: Path, tmp_path: Path) -> None:
    done = convert([original], tmp_path / "model", "diffusers")
    assert json.loads((tmp_path / "model/vqgan/config.json").read_text())["scale_factor"] == 0.3764
    assert any("0.43" in note for note in done.notes)
    scales = [inspect(p).components[Stage.VQGAN].config.scale_factor for p in (original, tmp_path / "model")]  # type: ignore[union-attr]
    assert scales == [0.43, 0.3764]


def test_prior_pipeline_opens_the_folder(tiny: Path) -> None:
    from diffusers import StableCascadePriorPipeline

    pipeline = StableCascadePriorPipeline.from_pretrained(tiny / "model")
    assert pipeline.prior.config.conditioning_dim == 64


def test_decoder_pipeline_opens_the_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Current diffusers moved the module that the index must name; put back, the folder loads."""
    import diffusers.pipelines
    from diffusers import StableCascadeDecoderPipeline
    from diffusers.pipelines.deprecated import wuerstchen

    monkeypatch.setattr(diffusers.pipelines, "wuerstchen", wuerstchen, raising=False)
    pipeline = StableCascadeDecoderPipeline.from_pretrained(tiny / "model")
    assert pipeline.vqgan.config.embed_dim == 32


def test_one_stage_to_one_file(tiny: Path, tmp_path: Path, original: Path) -> None:
    convert([tiny / "model" / "prior"], tmp_path / "c.safetensors", "original")
    assert_equal(stored(tmp_path / "c.safetensors"), stored(original / "stage_c.safetensors"))
    with pytest.raises(UsageError, match="one file cannot hold all of"):
        convert([tiny / "model"], tmp_path / "all.safetensors", "original")


UNFIT: dict[str, dict[str, Any]] = {
    "combined=True: the split layout has no such folders; leave it out, or take to=.diffusers.": {
        "to": "split",
        "combined": True,
        "quantize": "fp8",
    },
    "shard_size=...: the original layout has no shards; .* to=.diffusers. or to=.modular.": {
        "to": "original",
        "shard_size": "1GB",
    },
    "canonical=True: the gguf layout has no such order": {"to": "gguf", "canonical": True},
    "quantize=.INT8.: only prior and decoder are quantised, found vqgan; leave it out": {
        "to": "split",
        "quantize": "int8",
    },
}


@pytest.mark.parametrize("message", UNFIT)
def test_options_without_an_effect_are_refused(original: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(original / "stage_a.safetensors", tmp_path / "out", **UNFIT[message])
    assert not (tmp_path / "out").exists()


def test_encoders_given_apart(original: Path, tmp_path: Path) -> None:
    files = [original / f"{stage}.safetensors" for stage in STAGES]
    assert Stage.TEXT_ENCODER not in inspect(files[0]).components
    convert(files, tmp_path / "model", "diffusers", text_encoder=original / "text_encoder")
    assert inspect(tmp_path / "model").components[Stage.TEXT_ENCODER].variant is Variant.TINY


def test_a_bare_encoder_file_of_unknown_heads(original: Path, tmp_path: Path) -> None:
    config = CLIPTextConfig(hidden_size=8, intermediate_size=32, num_hidden_layers=1, projection_dim=12)
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "text")
    with pytest.raises(
        LayoutError, match=r"its tensors do not show its number of heads.*give the folder.*config\.json"
    ):
        convert([original], tmp_path / "out", "diffusers", text_encoder=tmp_path / "text" / "model.safetensors")
    convert([original], tmp_path / "out", "diffusers", text_encoder=tmp_path / "text")
    assert inspect(tmp_path / "out").components[Stage.TEXT_ENCODER].variant is Variant.CUSTOM


def test_image_encoder_and_its_old_position_ids(original: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=768,
        image_size=28,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "vision")
    weights = tmp_path / "vision" / "model.safetensors"
    save_file(
        {**stored(weights), "vision_model.embeddings.position_ids": torch.arange(5)[None]}, weights, {"format": "pt"}
    )
    convert([original], tmp_path / "model", "diffusers", image_encoder=tmp_path / "vision")
    _, info = CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "model" / "image_encoder", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert (tmp_path / "model/feature_extractor/preprocessor_config.json").is_file()


def without(path: Path, *names: str) -> None:
    save_file({n: t for n, t in stored(path).items() if n not in names}, path)


@pytest.fixture
def stage_c(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original / "stage_c.safetensors", tmp_path))


def refused(error: type[CascadeError], match: str, *sources: Path, output: Path) -> None:
    with pytest.raises(error, match=match):
        convert(sources, output, "diffusers")
    assert not output.exists()
    assert not list(output.parent.glob(".*partial*"))


def test_missing_keys_are_named_together(stage_c: Path, tmp_path: Path) -> None:
    without(stage_c, "clf.1.bias", "down_blocks.0.1.mapper_crp.bias")
    match = r"prior \(.*missing \(2\): .*down_blocks\.0\.1\.mapper_crp\.bias"
    refused(LayoutError, rf"(?s){match}", stage_c, output=tmp_path / "out")


def test_unexpected_and_misshapen_keys(stage_c: Path, tmp_path: Path) -> None:
    tensors = stored(stage_c)
    save_file({**tensors, "clf.1.bias": torch.zeros(3), "clf.9.norm.weight": torch.zeros(3)}, stage_c)
    match = r"(?s)unexpected \(1\): clf\.9\.norm\.weight.*wrong shape \(1\): clf\.1\.bias expected \[16\], found \[3\]"
    refused(LayoutError, match, stage_c, output=tmp_path / "out")


def test_stage_b_where_stage_c_belongs(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "mixed")
    shutil.copy(original / "stage_b.safetensors", tmp_path / "mixed" / "stage_c.safetensors")
    refused(UsageError, "both hold the decoder", tmp_path / "mixed", output=tmp_path / "out")
    (tmp_path / "folder/prior").mkdir(parents=True)
    shutil.copy(original / "stage_b.safetensors", tmp_path / "folder/prior/diffusion_pytorch_model.safetensors")
    refused(LayoutError, "expected the prior here, found the decoder", tmp_path / "folder", output=tmp_path / "out")
    (tmp_path / "mixed" / "stage_b.safetensors").unlink()
    assert "named like stage_c but holds the decoder" in inspect(tmp_path / "mixed").notes[0]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("conditioner.embedders.0.transformer.text_model.x", "SDXL"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
        ("lora_unet_x.lora_down.weight", "LoRA"),
        ("some.thing", "nothing known; its first tensor is some.thing"),
    ],
)
def test_foreign_files(tmp_path: Path, name: str, what: str) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    refused(LayoutError, f"not a Stable Cascade component.*{what}", tmp_path / "x.safetensors", output=tmp_path / "out")


def test_integers_where_weights_belong(stage_c: Path, tmp_path: Path) -> None:
    tensors = stored(stage_c)
    save_file({**tensors, "clf.1.bias": torch.zeros(16, dtype=torch.int8)}, stage_c)
    refused(LayoutError, r"not a floating point type \(1\): clf\.1\.bias is I8", stage_c, output=tmp_path / "out")


def test_q_k_v_of_unequal_dtype_cannot_be_joined(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model" / "prior", tmp_path / "prior")
    weights = tmp_path / "prior" / "diffusion_pytorch_model.safetensors"
    name = "down_blocks.0.2.attention.to_k.weight"
    save_file({n: t.half() if n == name else t for n, t in stored(weights).items()}, weights)
    with pytest.raises(ConversionError, match=r"in_proj_weight but differ in dtype \(F16, F32\)"):
        convert([tmp_path / "prior"], tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_outputs_that_exist_or_cannot_be_written(original: Path, tmp_path: Path) -> None:
    convert([original], tmp_path / "out", "diffusers")
    (tmp_path / "out" / "keep").touch()
    with pytest.raises(UsageError, match="exists already"):
        convert([original], tmp_path / "out", "diffusers")
    convert([original], tmp_path / "out", "diffusers", force=True)
    assert (tmp_path / "out" / "keep").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is no folder; choose another output"):
        convert([original], tmp_path / "file" / "out", "diffusers")


def test_a_failure_half_way_leaves_the_old_output(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert([original], tmp_path / "out", "diffusers")
    before = sorted(tmp_path.rglob("*"))

    def full(*args: Any) -> None:
        raise ConversionError("out: cannot be written: No space left on device")

    monkeypatch.setattr(checkpoint, "_write_other_files", full)
    with pytest.raises(ConversionError, match="No space"):
        convert([original], tmp_path / "out", "original", force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    refused(UsageError, "no such file or folder", tmp_path / "nowhere", output=tmp_path / "out")
    refused(UsageError, "no model here; expected folders .* files$", tmp_path, output=tmp_path / "out")
    for name in ("b/stage_c.safetensors", "a/model_index.json", "c/readme.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    meant = f"; did you mean {tmp_path / 'a'}, {tmp_path / 'b'}\\?$"
    refused(UsageError, meant, tmp_path, output=tmp_path / "out")
    for name, match in (
        ("model.bin", "not a safetensors file"),
        ("model.safetensors.index.json", "not readable as JSON"),
        ("x", "no weights"),
    ):
        folder = tmp_path / f"with-{name}" / "prior"
        folder.mkdir(parents=True)
        (folder / name).touch()
        refused(CascadeError, match, folder.parent, output=tmp_path / "out")


def test_licences_go_along(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "source")
    (tmp_path / "source" / "LICENSE").write_text("non-commercial")
    (tmp_path / "source" / "README.md").write_text("a model card")
    convert([tmp_path / "source"], tmp_path / "out", "diffusers")
    assert (tmp_path / "out" / "LICENSE").read_text() == "non-commercial"
    assert (tmp_path / "out" / "README.md").read_text() == "a model card"


def test_a_completed_file_is_not_written_again(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a killed run completed are found again by the same work, and thrown away by other work."""
    scratch = tmp_path / ".out.partial"
    write = checkpoint.write_safetensors
    written: list[str] = []

    def killed(path: Path, *arguments: Any, **options: Any) -> Any:
        if len(written) == 2:
            os._exit(9)
        written.append(path.name)
        return write(path, *arguments, **options)

    if not (pid := os.fork()):
        monkeypatch.setattr(checkpoint, "write_safetensors", killed)
        convert([original], tmp_path / "out", "diffusers")
    os.waitpid(pid, 0)
    assert not (tmp_path / "out").exists()
    left = sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*.safetensors"))
    assert len(left) == 2

    def counting(path: Path, *arguments: Any, **options: Any) -> Any:
        written.append(path.name)
        return write(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "write_safetensors", counting)
    convert([original], tmp_path / "out", "diffusers")
    assert len(written) == 2  # of four files, two were there
    assert not scratch.exists()
    convert([tmp_path / "out"], tmp_path / "back", "original")
    for stage in STAGES:
        assert_equal(stored(tmp_path / "back" / f"{stage}.safetensors"), stored(original / f"{stage}.safetensors"))

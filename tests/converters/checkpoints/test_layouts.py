"""Every layout into every other: names and shapes against the catalog at real size, values on the tiny cascade."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadekit import convert, inspect
from cascadekit.converters.checkpoints.component import Component
from cascadekit.converters.checkpoints.convert import Conversion
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.converters.checkpoints.plan_output import OutputOptions, plan_output
from cascadekit.parity.reference import load_reference
from cascadekit.parity.reference.loading import read_tensor
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.errors import CheckpointError, LayoutError, UsageError
from cascadekit.schemas.layouts import Layout
from cascadekit.schemas.stages import PreviewerConfig, Stage, Variant
from cascadekit.schemas.tensors import expected_tensors
from helpers.standins import write_stand_in

ORIGINALS = {
    Stage.PRIOR: "original_stage_c",
    Stage.DECODER: "original_stage_b",
    Stage.VQGAN: "original_stage_a",
    Stage.EFFNET_ENCODER: "original_effnet_encoder",
    Stage.PREVIEWER: "original_previewer",
    Stage.TEXT_ENCODER: "diffusers_text_encoder",
    Stage.IMAGE_ENCODER: "diffusers_image_encoder",
    Stage.CONTROLNET_CANNY: "original_controlnet_canny",
    Stage.CONTROLNET_INPAINTING: "original_controlnet_inpainting",
    Stage.CONTROLNET_SUPER_RESOLUTION: "original_controlnet_super_resolution",
    Stage.CONTROLNET_IDENTITY: "original_controlnet_identity",
}
DIFFUSERS = {Stage.PRIOR: "diffusers_prior", Stage.DECODER: "diffusers_decoder", Stage.VQGAN: "diffusers_vqgan"}

Shapes = dict[str, tuple[int, ...]]


def listed(folder: Path, name: str) -> Shapes:
    tensors = json.loads((folder / f"{name}.json").read_text())["tensors"]
    return {key: tuple(spec["shape"]) for key, spec in tensors.items()}


def planned(components: dict[Stage, Component], **options: Any) -> dict[str, Shapes]:
    plan = plan_output(components, OutputOptions(**options))
    return {str(file.path): {name: tensor.shape for name, tensor in file.tensors.items()} for file in plan.files}


@pytest.fixture(scope="module")
def release(catalog_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Stage, Component]:
    """Every component of the full release, from files of real size that are holes."""
    folder = tmp_path_factory.mktemp("release")
    for stage, name in ORIGINALS.items():
        write_stand_in(catalog_folder / f"{name}.json", folder / f"{stage.replace('/', '-')}.safetensors", holes=True)
    return open_model([folder]).components


def test_the_release_is_recognised_whole(release: dict[Stage, Component]) -> None:
    assert release.keys() == ORIGINALS.keys()
    assert {component.variant for component in release.values()} == {Variant.FULL}
    assert not any(component.problems for component in release.values())


def test_original_names(release: dict[Stage, Component], catalog_folder: Path) -> None:
    files = planned(release, layout=Layout.ORIGINAL)
    assert files.keys() >= {"stage_c.safetensors", "controlnet/canny.safetensors", "text_encoder/model.safetensors"}
    assert len(files) == len(ORIGINALS)
    for stage, (path, shapes) in zip(release, files.items(), strict=True):
        assert shapes == listed(catalog_folder, ORIGINALS[stage]), path


def test_diffusers_names(release: dict[Stage, Component], catalog_folder: Path) -> None:
    files = planned(release, layout=Layout.DIFFUSERS)
    for stage, shapes in zip(release, files.values(), strict=True):
        assert shapes == listed(catalog_folder, DIFFUSERS.get(stage, ORIGINALS[stage])), stage
    assert "controlnet/canny/diffusion_pytorch_model.safetensors" in files
    assert "image_encoder/model.safetensors" in files


def test_comfyui_names(release: dict[Stage, Component], catalog_folder: Path) -> None:
    files = planned(release, layout=Layout.COMFYUI)
    assert files["stable_cascade_stage_c.safetensors"] == listed(catalog_folder, "comfyui_stage_c")
    assert files["stable_cascade_stage_b.safetensors"] == listed(catalog_folder, "comfyui_stage_b")
    assert {path for path in files if path.startswith("controlnet/")} == {
        f"controlnet/{kind}.safetensors" for kind in ("canny", "inpainting", "super_resolution", "identity")
    }


def test_split_names(release: dict[Stage, Component], catalog_folder: Path) -> None:
    files = planned(release, layout=Layout.SPLIT)
    block = "down_blocks.0.2.attention.attn"
    for path, width in (("stage_c.safetensors", 2048), ("stage_b.safetensors", 1280)):
        name = block if width == 2048 else block.replace("0.2", "2.2")
        for part in ("to_q", "to_k", "to_v", "out_proj"):
            assert files[path][f"{name}.{part}.weight"] == (width, width)
        assert not [key for key in files[path] if "in_proj" in key]
    joined = {key for key in listed(catalog_folder, "original_stage_b") if ".attn." not in key}
    assert {key for key in files["stage_b.safetensors"] if ".attn." not in key} == joined


@pytest.mark.parametrize("name", ["comfyui_stage_c", "comfyui_stage_b"])
def test_comfyui_files_taken_apart(catalog_folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "all.safetensors"
    write_stand_in(catalog_folder / f"{name}.json", path, "BF16", holes=True)
    components = inspect(path).components
    assert {component.layout for component in components.values()} == {Layout.COMFYUI}
    assert not any(component.problems for component in components.values())
    for stage, shapes in zip(components, planned(components, layout=Layout.ORIGINAL).values(), strict=True):
        assert shapes == listed(catalog_folder, ORIGINALS[stage])
    again = planned(components, layout=Layout.COMFYUI)
    assert list(again.values()) == [listed(catalog_folder, name)]


# Values, on the tiny cascade with a small previewer and the two encoders


@pytest.fixture(scope="module")
def whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Original files of all that a ComfyUI file holds but the effnet encoder: arange values, a batch norm counter."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(original, folder, dirs_exist_ok=True)
    previewer = expected_tensors(PreviewerConfig(c_hidden=8))
    save_file(
        {
            name: torch.tensor(1000) if not shape else torch.arange(float(torch.Size(shape).numel())).reshape(shape)
            for name, shape in previewer.items()
        },
        folder / "previewer.safetensors",
    )
    return folder


def tensors_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_same(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys(), file
        for name, tensor in tensors.items():
            assert found[file][name].dtype == tensor.dtype
            assert torch.equal(found[file][name], tensor), (file, name)


OPTIONS: dict[str, dict[str, Any]] = {
    "diffusers": {"to": "diffusers"},
    "sharded": {"to": "diffusers", "shard_size": 400_000},
    "variant": {"to": "diffusers", "as_variant": "bf16", "shard_size": "1MB"},
    "combined": {"to": "diffusers", "combined": True},
    "canonical": {"to": "diffusers", "canonical": True},
    "split": {"to": "split"},
    "comfyui": {"to": "comfyui"},
    "original": {"to": "original", "canonical": True},
}


# Each layout is read once; the marker `slow` has the other pairs.
SECONDS = ("diffusers", "split", "comfyui")
PAIRS = [
    pytest.param(first, second, marks=() if number % len(SECONDS) == place else pytest.mark.slow)
    for number, first in enumerate(OPTIONS)
    for place, second in enumerate(SECONDS)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_round_trips_keep_every_value(whole: Path, tmp_path: Path, first: str, second: str) -> None:
    """original -> first -> second -> original"""
    convert([whole], tmp_path / "a", **OPTIONS[first])
    convert([tmp_path / "a"], tmp_path / "b", **OPTIONS[second])
    convert([tmp_path / "b"], tmp_path / "c", "original")
    assert_same(tensors_in(tmp_path / "c"), tensors_in(whole))


def joined_by_hand(split: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    return torch.cat([split[f"{prefix}.to_{part}.weight"] for part in "qkv"])


def test_split_and_comfyui_values(whole: Path, tmp_path: Path) -> None:
    stage_c = load_file(whole / "stage_c.safetensors")
    attention = "up_blocks.1.2.attention.attn"
    convert([whole], tmp_path / "split", "split")
    split = load_file(tmp_path / "split" / "stage_c.safetensors")
    assert torch.equal(joined_by_hand(split, attention), stage_c[f"{attention}.in_proj_weight"])
    done = convert([whole], tmp_path / "comfyui", "comfyui")
    comfyui = load_file(tmp_path / "comfyui" / "stable_cascade_stage_c.safetensors")
    for name, tensor in stage_c.items():
        assert torch.equal(comfyui[f"model.diffusion_model.{name}"], tensor)
    text = load_file(whole / "text_encoder" / "model.safetensors")
    for name, tensor in text.items():
        assert torch.equal(comfyui[f"text_encoder.clip_g.transformer.{name}"], tensor)
    assert comfyui["vae.previewer.blocks.11.num_batches_tracked"].dtype == torch.int64
    assert any("without effnet_encoder, image_encoder" in note for note in done.notes)


def respelled(
    source: Path, target: Path, change: Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
) -> None:
    tensors = load_file(source)
    save_file({n: t.contiguous() for name, tensor in tensors.items() for n, t in change(name, tensor)}, target)


def test_other_spellings_of_comfyui_files(whole: Path, tmp_path: Path) -> None:
    """Attention split, text projection transposed, constants and buffers that newer saves add."""
    convert([whole], tmp_path / "comfyui", "comfyui")
    prefix = "text_encoder.clip_g."

    def change(name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        if name.endswith("in_proj_weight") or name.endswith("in_proj_bias"):
            kind = name.rpartition("_")[2]
            base = name.removesuffix(f"in_proj_{kind}")
            return [(f"{base}to_{part}.{kind}", rows) for part, rows in zip("qkv", tensor.chunk(3), strict=True)]
        if name == f"{prefix}transformer.text_projection.weight":
            return [(f"{prefix}text_projection", tensor.T), (f"{prefix}logit_scale", torch.tensor(4.6))]
        return [(name, tensor)]

    for letter in "cb":
        path = tmp_path / "comfyui" / f"stable_cascade_stage_{letter}.safetensors"
        respelled(path, path, change)
    done = convert([tmp_path / "comfyui"], tmp_path / "back", "original")
    assert_same(tensors_in(tmp_path / "back"), tensors_in(whole))
    assert any("left out text_encoder.clip_g.logit_scale" in note for note in done.notes)


def test_effnet_constants_of_newer_comfyui(catalog_folder: Path, tmp_path: Path) -> None:
    write_stand_in(catalog_folder / "original_effnet_encoder.json", tmp_path / "effnet.safetensors")
    tensors = load_file(tmp_path / "effnet.safetensors")
    wrapped = {f"vae.encoder.{name}": tensor for name, tensor in tensors.items()}
    save_file(
        {**wrapped, "vae.encoder.mean": torch.ones(3), "vae.encoder.std": torch.ones(3)}, tmp_path / "vae.safetensors"
    )
    done = convert([tmp_path / "vae.safetensors"], tmp_path / "out.safetensors", "original")
    assert any("vae.encoder.mean, vae.encoder.std" in note for note in done.notes)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found["mapper.1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("prefix", ["generator.", "state_dict.", "model.diffusion_model."])
def test_prefixes_of_training_states(whole: Path, tmp_path: Path, prefix: str) -> None:
    source = whole / "stage_c.safetensors"
    respelled(source, tmp_path / "x.safetensors", lambda name, tensor: [(prefix + name, tensor)])
    convert([tmp_path / "x.safetensors"], tmp_path / "out.safetensors", "original")
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(source).keys()


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_weights_beside_trained_ones(whole: Path, tmp_path: Path, ema: bool) -> None:
    respelled(
        whole / "stage_c.safetensors",
        tmp_path / "x.safetensors",
        lambda name, tensor: [(f"generator_ema.{name}", tensor + 1), (f"generator.{name}", tensor)],
    )
    done = convert([tmp_path / "x.safetensors"], tmp_path / "out.safetensors", "original", ema=ema)
    expected = load_file(whole / "stage_c.safetensors")["clf.1.bias"] + int(ema)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["clf.1.bias"], expected)
    assert any("ema=True" in note for note in done.notes)


@pytest.mark.parametrize("suffix", ["_text_model", "_text_encoder"])
def test_side_files_of_fine_tunes(whole: Path, tmp_path: Path, suffix: str) -> None:
    """kohya and OneTrainer save the text encoder beside the stage; naming the stage takes both."""
    shutil.copy(whole / "stage_c.safetensors", tmp_path / "tuned.safetensors")
    shutil.copy(whole / "text_encoder" / "model.safetensors", tmp_path / f"tuned{suffix}.safetensors")
    convert([tmp_path / "tuned.safetensors"], tmp_path / "out", "original")
    found = tensors_in(tmp_path / "out")
    assert found.keys() == {"stage_c.safetensors", "text_encoder/model.safetensors"}


@pytest.mark.parametrize("stage", [Stage.EFFNET_ENCODER, Stage.CONTROLNET_CANNY])
def test_components_of_real_size(catalog_folder: Path, tmp_path: Path, stage: Stage) -> None:
    """Components for which diffusers has no class go into a folder and back with every value."""
    source = tmp_path / "x.safetensors"
    write_stand_in(catalog_folder / f"{ORIGINALS[stage]}.json", source, "BF16")
    convert([source], tmp_path / "model", "diffusers")
    assert inspect(tmp_path / "model").components.keys() == {stage}
    convert([tmp_path / "model"], tmp_path / "back.safetensors", "original")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Folders


def test_pipelines_open_combined_sharded_and_variant_folders(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.pipelines
    from diffusers import StableCascadeCombinedPipeline, StableCascadePriorPipeline, StableCascadeUNet
    from diffusers.pipelines.deprecated import wuerstchen

    monkeypatch.setattr(diffusers.pipelines, "wuerstchen", wuerstchen, raising=False)
    wanted = load_file(whole / "stage_c.safetensors")["down_blocks.1.2.attention.attn.in_proj_weight"]

    def rows(unet: Any) -> torch.Tensor:
        attention = unet.down_blocks[1][2].attention
        return torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])

    convert([whole], tmp_path / "combined", "diffusers", combined=True)
    combined = StableCascadeCombinedPipeline.from_pretrained(tmp_path / "combined")
    assert torch.equal(rows(combined.prior_prior), wanted)
    convert([whole], tmp_path / "variant", "diffusers", as_variant="bf16", shard_size=1_000_000)
    assert len(list((tmp_path / "variant/prior").glob("*.bf16-*-of-*.safetensors"))) == 3
    unet = StableCascadeUNet.from_pretrained(tmp_path / "variant" / "prior", variant="bf16")
    assert torch.equal(rows(unet), wanted)
    convert([whole], tmp_path / "sharded", "diffusers", shard_size=1_000_000)
    assert torch.equal(rows(StableCascadePriorPipeline.from_pretrained(tmp_path / "sharded").prior), wanted)


@pytest.mark.parametrize(("file", "folder"), [("stage_c", "prior"), ("stage_b", "decoder")])
def test_single_files_open_in_diffusers_and_draw_the_same(whole: Path, tmp_path: Path, file: str, folder: str) -> None:
    """A file taken through every layout, opened by diffusers' single-file loader, against the first file's network."""
    from diffusers import StableCascadeUNet

    convert([whole], tmp_path / "comfyui", "comfyui")
    convert([tmp_path / "comfyui"], tmp_path / "split", "split")
    convert([tmp_path / "split"], tmp_path / "model", "diffusers")
    convert([tmp_path / "model"], tmp_path / "original", "original")
    single = StableCascadeUNet.from_single_file(
        str(tmp_path / "original" / f"{file}.safetensors"), config=str(tmp_path / "model" / folder)
    )
    first = load_reference(
        inspect(whole / f"{file}.safetensors").components[Stage(folder)].config, _values(whole, folder)
    )
    inputs = {
        "sample": torch.randn(2, single.config.in_channels, 18, 26),
        "timestep_ratio": torch.tensor([0.9, 0.1]),
        "clip_text_pooled": torch.randn(2, 1, 12),
    }
    inputs |= (
        {"clip_text": torch.randn(2, 5, 8), "clip_img": torch.randn(2, 1, 768)}
        if folder == "prior"
        else {"effnet": torch.randn(2, 16, 3, 4)}
    )
    with torch.no_grad():
        for network in (single, first):
            for weight in network.parameters():
                weight.data = weight.data.clone()  # aligned: where weights lie in a file changes how they are summed
        assert torch.equal(single(**inputs).sample, first(**inputs)["noise_pred"])


def _values(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    component = inspect(folder).components[Stage(stage)]
    return {name: read_tensor(tensor) for name, tensor in component.tensors.items()}


def test_variants_and_lite_folders(whole: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    convert([whole], model, "diffusers")
    convert([whole], tmp_path / "half", "diffusers", dtype="BF16", as_variant="bf16")
    shutil.copytree(tmp_path / "half", model, dirs_exist_ok=True)
    assert set(inspect(model).components[Stage.PRIOR].dtypes) == {"F32"}
    half = open_model([model], variant="bf16").components
    assert {dtype for c in half.values() for dtype in c.dtypes} == {"BF16"}
    with pytest.raises(CheckpointError, match="no weights of variant fp16"):
        open_model([model], variant="fp16")
    shutil.copytree(model / "prior", model / "prior_lite")
    assert open_model([model]).components[Stage.PRIOR].path.parent.name == "prior"
    assert open_model([model], lite=True).components[Stage.PRIOR].path.parent.name == "prior_lite"


def test_configs_of_the_first_days(whole: Path, tmp_path: Path) -> None:
    convert([whole / "stage_c.safetensors"], tmp_path / "model", "diffusers")
    legacy = {"_class_name": "StableCascadeUnet", "c_in": 16, "c_hidden": [64, 64], "nhead": [1, 1]}
    (tmp_path / "model/prior/config.json").write_text(json.dumps(legacy))
    component = inspect(tmp_path / "model").components[Stage.PRIOR]
    assert component.variant is Variant.TINY
    assert to_json(component.config)["_class_name"] == "StableCascadeUNet"


HOSTILE_INDEXES = {
    "no map": ({}, "expected a weight_map"),
    "numbers": ({"weight_map": {"a": 1}}, "expected a weight_map"),
    "outside": ({"weight_map": {"a": "../../secret.safetensors"}}, "which is not a file beside it"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "which is not a file beside it"),
    "no such shard": ({"weight_map": {"a": "b.safetensors"}}, "cannot be read"),
}


@pytest.mark.parametrize(("index", "message"), HOSTILE_INDEXES.values(), ids=HOSTILE_INDEXES)
def test_hostile_indexes(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        inspect(tmp_path)


def test_a_shard_that_lacks_its_tensor(whole: Path, tmp_path: Path) -> None:
    convert([whole / "stage_c.safetensors"], tmp_path / "m", "diffusers", shard_size=1_000_000)
    first = min((tmp_path / "m/prior").glob("*.safetensors"))
    tensors = load_file(first)
    lost = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, first)
    with pytest.raises(CheckpointError, match=f"{lost} is not in {first.name}"):
        inspect(tmp_path / "m")


# dtype


@pytest.mark.parametrize(("dtype", "theirs"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
@pytest.mark.parametrize("to", ["diffusers", "original", "comfyui"])
def test_casts_equal_torch_and_leave_counters_alone(
    whole: Path, tmp_path: Path, dtype: str, theirs: torch.dtype, to: str
) -> None:
    convert([whole], tmp_path / "cast", to, dtype=dtype)
    convert([tmp_path / "cast"], tmp_path / "back", "original")
    expected = {
        file: {n: t.to(theirs) if t.is_floating_point() else t for n, t in tensors.items()}
        for file, tensors in tensors_in(whole).items()
    }
    assert_same(tensors_in(tmp_path / "back"), expected)


def overflowing(whole: Path, folder: Path, **options: Any) -> Conversion:
    tensors = load_file(whole / "stage_c.safetensors")
    tensors["clf.1.bias"][:3] = 1e6
    save_file(tensors, folder / "stage_c.safetensors")
    return convert(folder / "stage_c.safetensors", folder / "out.safetensors", "original", dtype="fp16", **options)


def test_overflow_is_counted_named_and_refused(whole: Path, tmp_path: Path) -> None:
    from cascadekit.schemas.errors import ConversionError

    with pytest.raises(ConversionError, match=r"clf\.1\.bias.*3.*allow_overflow=True"):
        overflowing(whole, tmp_path)
    assert not (tmp_path / "out.safetensors").exists()
    done = overflowing(whole, tmp_path, allow_overflow=True)
    assert "3 values in 1 tensors became infinite in the new dtype, most in clf.1.bias (3)" in "\n".join(done.notes)


def test_what_has_no_place_is_named(whole: Path, tmp_path: Path) -> None:
    done = convert([whole / "stage_b.safetensors", whole / "previewer.safetensors"], tmp_path / "out", "comfyui")
    assert any("no place in these ComfyUI files for previewer; left out" in note for note in done.notes)
    with pytest.raises(UsageError, match="with stage_c or stage_b, and previewer comes with neither"):
        convert([whole / "previewer.safetensors"], tmp_path / "none", "comfyui")


def test_a_file_like_a_known_one(whole: Path, tmp_path: Path) -> None:
    """Unknown files are told what they come nearest to."""
    tensors = load_file(whole / "stage_c.safetensors")
    del tensors["clip_txt_mapper.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LayoutError, match=r"9\d% of the prior \(tiny, original layout\); the first .* clip_txt_mapper"):
        inspect(tmp_path / "x.safetensors")

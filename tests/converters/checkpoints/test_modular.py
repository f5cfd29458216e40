"""diffusers' modular pipelines: diffusers loads the folder and generates what our runtime generates."""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.utils import dynamic_modules_utils

from cascadekit import Cascade, convert, export, inspect
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.parity.image_metrics import psnr
from cascadekit.schemas.errors import CheckpointError, UsageError
from cascadekit.schemas.stages import Stage
from helpers.whole import LITE_PRIOR, _write_unet, picture

LEAST_PSNR = 80.0  # dB; measured 100 and more
PROMPTS = ["a strawberry, glossy style", "a red heart above a blue square"]
SIZE = {"height": 120, "width": 88}  # 30 x 22 latents for stage B, whose halves are odd
OTHER_GUIDERS = (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)


def load(folder: Path) -> Any:
    pipe = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, seed: int = 11, **options: Any) -> Any:
    """(B, 3, height, width) in 0..1."""
    options = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "output_type": "pt", **SIZE, **options}
    return pipe(**options, generator=torch.Generator().manual_seed(seed), output="images").numpy()


@pytest.fixture(scope="module", autouse=True)
def code_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """diffusers copies block.py into a folder of the test, instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        patch.syspath_prepend(dynamic_modules_utils.HF_MODULES_CACHE)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model; read only."""
    path = tmp_path_factory.mktemp("modular") / "model"
    convert(EXAMPLE_MODEL, path, "modular", dtype="fp32")
    return path


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Iterator[Cascade]:
    export(folder, folder.with_name("bundle"))
    with Cascade.open(folder.with_name("bundle"), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return load(folder)


@dataclass(frozen=True)
class Case:
    """Options of both programs that mean the same."""

    prior_guidance: float
    decoder_guidance: float
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


CASES = {
    "one guidance": Case(4.0, 1.0),
    "both guidances, negative prompts": Case(
        6.0, 1.7, {"negative": ["circle", "red"]}, {"negative_prompt": ["circle", "red"]}
    ),
    "no guidance, two images for each prompt": Case(1.0, 1.0, {"num_images": 2}, {"num_images_per_prompt": 2}),
    "two image prompts": Case(
        4.0,
        1.5,
        {"image_prompts": [picture(90, 70), picture(40, 60, 1)]},
        {"images": [picture(90, 70), picture(40, 60, 1)]},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_pictures(pipe: Any, cascade: Cascade, case: Case) -> None:
    guidance = {"prior_guidance": case.prior_guidance, "decoder_guidance": case.decoder_guidance}
    ours = cascade.generate(PROMPTS, seed=11, prior_steps=3, decoder_steps=2, **SIZE, **guidance, **case.ours).pixels
    pipe.update_components(
        prior_guider=ClassifierFreeGuidance(guidance_scale=case.prior_guidance),
        decoder_guider=ClassifierFreeGuidance(guidance_scale=case.decoder_guidance),
    )
    theirs = generate(pipe, prompt=PROMPTS, **case.theirs)
    assert ours is not None
    assert ours.shape == theirs.shape == (2 * case.theirs.get("num_images_per_prompt", 1), 3, 120, 88)
    assert psnr(ours, theirs) >= LEAST_PSNR


def test_a_lite_prior_with_another_decoder(original: Path, tmp_path: Path) -> None:
    """The prior is wider than the tiny cascade's, and there is no image encoder."""
    shutil.copytree(original, tmp_path / "mixed")
    _write_unet(LITE_PRIOR, tmp_path / "mixed" / "stage_c.safetensors", 21)
    convert(tmp_path / "mixed", tmp_path / "model", "modular")
    export(tmp_path / "model", tmp_path / "bundle")
    with Cascade.open(tmp_path / "bundle", threads=1) as cascade:
        ours = cascade.generate("a cat", seed=3, prior_steps=3, decoder_steps=2, **SIZE).pixels
    pipe = load(tmp_path / "model")
    theirs = generate(pipe, 3, prompt="a cat")
    assert psnr(ours, theirs) >= LEAST_PSNR
    assert pipe.image_encoder is None
    with pytest.raises(ValueError, match="no image_encoder"):
        generate(pipe, prompt="a cat", images=picture(8, 8))


def test_the_code_of_the_page_runs(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, at a small size."""
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    convert(original, "modular", "modular")
    values: dict[str, Any] = {}
    exec(compile(block.replace("1024", "64"), "checkpoints.md", "exec"), values)
    assert [image.size for image in values["images"]] == [(64, 64)]
    assert values["pipe"].dtype is torch.bfloat16


def test_guiders_of_diffusers(folder: Path) -> None:
    pipe = load(folder)
    small = {"prompt": "a fox", "height": 64, "width": 64}
    usual = generate(pipe, **small)
    for guider in OTHER_GUIDERS:
        pipe.update_components(prior_guider=guider(), decoder_guider=guider())
        found = generate(pipe, **small)
        assert np.isfinite(found).all()
        assert np.abs(found - usual).max() > 0.01, guider


def test_the_code_imports_nothing_of_ours(folder: Path) -> None:
    tree = ast.parse((folder / "block.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} == {"math", "torch", "diffusers", "tqdm", "transformers"}


@pytest.mark.parametrize("variant", ["", "bf16"])
def test_every_byte_comes_back(tmp_path: Path, variant: str) -> None:
    convert(EXAMPLE_MODEL, tmp_path / "model", "modular", as_variant=variant)
    convert(tmp_path / "model", tmp_path / "back", "original")
    files = sorted(EXAMPLE_MODEL.rglob("*.safetensors"))
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "back" / file.relative_to(EXAMPLE_MODEL)).read_bytes() == file.read_bytes()
    assert all(type(value).__name__ != "NoneType" for value in load(tmp_path / "model").components.values())


def test_a_folder_that_diffusers_saved(pipe: Any, folder: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    pipe.blocks.save_pretrained(tmp_path / "saved")
    saved, ours = (json.loads((path / "modular_config.json").read_text()) for path in (tmp_path / "saved", folder))
    assert saved == ours
    assert any("block.py: missing" in note for note in inspect(tmp_path / "saved").notes)
    shutil.copyfile(folder / "block.py", tmp_path / "saved" / "block.py")
    found = inspect(tmp_path / "saved")
    assert {str(component.layout) for component in found.components.values()} == {"modular"}
    assert not found.notes
    again = load(tmp_path / "saved")
    assert type(again.vqgan) is type(pipe.vqgan)
    assert diffusers.PaellaVQModel is type(pipe.vqgan)


def copied(folder: Path, target: Path) -> Path:
    """A folder of hard links, with files of its own in place of the pipeline's."""
    shutil.copytree(folder, target, copy_function=os.link)
    for name in ("block.py", "modular_config.json", "modular_model_index.json"):
        (target / name).unlink()
        shutil.copyfile(folder / name, target / name)
    return target


def test_other_code_is_named_and_not_run(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    text = (folder / "block.py").read_text()
    (other / "block.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{text}")
    (note,) = inspect(other).notes
    what = "is not the code that cascadekit writes; it is not run here, but diffusers would run it"
    assert note == f"{other / 'block.py'}: {what}"
    assert note in convert(other, tmp_path / "again", "modular").notes
    assert (tmp_path / "again" / "block.py").read_text() == text
    (other / "block.py").write_text(text.replace("0.42", "0.43"))  # of the same size
    assert "is not the code" in inspect(other).notes[0]
    assert not (tmp_path / "ran").exists()
    (other / "modular_config.json").unlink()
    assert "modular_config.json: missing" in inspect(other).notes[0]


WRONG = {
    "modular_model_index.json": {
        "{": "not readable as JSON",
        '{"prior": ["diffusers", "StableCascadeUNet"]}': "damaged: prior: expected .library, class",
        '{"prior": [null, null, {"subfolder": 3}]}': "damaged: prior: expected",
        '{"prior": [null, null, {"subfolder": "gone"}]}': "the prior is to be in .*gone, which is no folder",
        '{"vqgan": [null, null, {"subfolder": "../model/vqgan"}]}': "which is no folder",
        f'{{"vqgan": [null, null, {{"subfolder": "{"x" * 300}"}}]}}': "which is no folder",
    },
    "modular_config.json": {
        "[]": "not readable as JSON",
        "{}": "expected an auto_map",
        '{"auto_map": {"ModularPipelineBlocks": 3}}': "expected an auto_map",
    },
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_wrong_files(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    wrong = copied(folder, tmp_path / "wrong")
    (wrong / name).write_text(text)
    with pytest.raises(CheckpointError, match=WRONG[name][text]) as caught:
        inspect(wrong)
    assert str(caught.value).startswith(str(wrong / name))
    assert "\n" not in str(caught.value)


def test_the_index_names_other_places(folder: Path, tmp_path: Path) -> None:
    """A component in a folder of another name is read; one in another repository is named."""
    moved = copied(folder, tmp_path / "moved")
    (moved / "prior").rename(moved / "unet")
    shutil.rmtree(moved / "text_encoder")
    index = json.loads((moved / "modular_model_index.json").read_text())
    index["prior"][2]["subfolder"] = "unet"
    index["text_encoder"][2]["pretrained_model_name_or_path"] = "owner/encoders"
    (moved / "modular_model_index.json").write_text(json.dumps(index))
    found = inspect(moved)
    assert found.components[Stage.PRIOR].path == moved / "unet" / "diffusion_pytorch_model.safetensors"
    assert Stage.TEXT_ENCODER not in found.components
    assert any("text_encoder is loaded from owner/encoders" in note for note in found.notes)
    assert any("also needs text_encoder" in note for note in convert(moved, tmp_path / "without", "modular").notes)


def test_what_may_be_replaced(folder: Path, tmp_path: Path) -> None:
    source = copied(folder, tmp_path / "source")
    convert(source, tmp_path / "out", "modular")
    with pytest.raises(UsageError, match="exists already"):
        convert(source, tmp_path / "out", "modular")
    convert(source, tmp_path / "out", "diffusers", force=True)
    assert not (tmp_path / "out" / "block.py").exists()
    (tmp_path / "out" / "mine.py").write_text("mine")
    with pytest.raises(UsageError, match=r"model_index\.json of another model"):
        convert(source, tmp_path / "out", "modular", force=True)
    assert (tmp_path / "out" / "mine.py").read_text() == "mine"


def test_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for options in ({"output": tmp_path / "x", "combined": True}, {"output": tmp_path / "x.safetensors"}):
        with pytest.raises(UsageError, match=r"combined=True|one file cannot hold"):
            convert(folder, to="modular", **options)

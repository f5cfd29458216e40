"""The pipeline on its own: sizes, batches, seeds, embeddings, metadata, memory, errors."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascadekit import Cascade, Settings, export
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeStage
from cascadekit.runtime.engines.protocol import check_inputs
from cascadekit.runtime.images.png import image_paths, read_settings, save_png
from cascadekit.runtime.sampling.loop import ROW_AREA
from cascadekit.schemas.errors import CheckpointError, EngineError, UsageError
from cascadekit.schemas.ports import Port
from cascadekit.schemas.stages import Stage

QUICK = Settings(128, 64, prior_steps=2, decoder_steps=2)


@pytest.fixture(scope="module")
def cascade(tiny: Path) -> Cascade:
    return Cascade.open(tiny / "bundle")


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 88), (200, 104), (136, 328), (832, 64)])
def test_every_multiple_of_8_comes_out_exactly(cascade: Cascade, width: int, height: int) -> None:
    (image,) = cascade.generate("x", seed=0, settings=QUICK, width=width, height=height, decoder_guidance=2.0).images
    assert image.size == (width, height)


def test_default_size_is_the_bundles(cascade: Cascade) -> None:
    image = cascade.generate("x", seed=0, prior_steps=1, decoder_steps=1).images[0]
    assert image.size == cascade.manifest.default_size == (256, 256)


def test_the_same_seed_draws_the_same_image(cascade: Cascade) -> None:
    first, again, other = (cascade.generate("x", seed=seed, settings=QUICK).images[0] for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_images_of_their_own_seed_do_not_depend_on_the_batch(cascade: Cascade) -> None:
    together = cascade.generate(["a", "b"], seed=[8, 9], settings=QUICK)
    alone = cascade.generate("b", seed=[9], settings=QUICK)
    assert np.allclose(together.decoder_latents[1], alone.decoder_latents[0], rtol=1e-3, atol=1e-2)
    assert together.settings[1]["seed"] == 9


def test_a_chosen_seed_is_told_and_repeats(cascade: Cascade) -> None:
    result = cascade.generate("x", settings=QUICK)
    again = cascade.generate("x", seed=result.settings[0]["seed"], settings=QUICK)
    assert again.images[0].tobytes() == result.images[0].tobytes()


def test_prior_and_decode_by_hand_equal_generate(cascade: Cascade) -> None:
    whole = cascade.generate("x", negative="y", seed=[1], settings=QUICK)
    embeds = cascade.encode_prompt("x", "y")
    size = {"height": QUICK.height, "width": QUICK.width}
    steps = list(cascade.prior(embeds, **size, steps=2, seed=[1]))
    assert np.array_equal(steps[-1].latents, whole.prior_latents)
    given = cascade.prior(embeds, **size, steps=2, seed=[1], latents=np.zeros_like(steps[0].latents))
    assert not np.array_equal(list(given)[-1].latents, whole.prior_latents)


def test_long_lists_go_through_in_parts_that_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images do not depend on the parts; nine prompts with guidance are batches of 18."""
    batches: dict[Stage, list[int]] = {Stage.PRIOR: [], Stage.DECODER: []}
    run = OnnxRuntimeStage.__call__

    def counting(self: OnnxRuntimeStage, inputs: Any) -> Any:
        if "sample" in inputs:
            batches[self.stage].append(len(inputs["sample"]))
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeStage, "__call__", counting)
    call = {"prompt": [f"image {n}" for n in range(9)], "seed": 0, "settings": QUICK, "decoder_guidance": 1.5}
    found = {}
    for rows in (None, 4):
        for each in batches.values():
            each.clear()
        with Cascade.open(tiny / "bundle", threads=1, rows=rows) as cascade:
            found[rows] = cascade.generate(**call)
        assert all(sum(each) == 18 * 2 for each in batches.values())
        assert all(max(each) == (rows or 18) for each in batches.values())
    difference = np.linalg.norm(found[4].decoder_latents - found[None].decoder_latents)
    assert difference <= 1e-5 * np.linalg.norm(found[None].decoder_latents)
    monkeypatch.setitem(ROW_AREA, Stage.DECODER, 3 * 16 * 32)  # as a 1024x1024 image is of the default
    batches[Stage.DECODER].clear()
    with Cascade.open(tiny / "bundle", threads=1) as cascade:
        cascade.generate(**call)
    assert max(batches[Stage.DECODER]) == 3


@pytest.mark.parametrize("rows", [0, -1])
def test_a_batch_of_no_rows_is_refused(tiny: Path, rows: int) -> None:
    with pytest.raises(UsageError, match=f"rows={rows}: expected at least 1"):
        Cascade.open(tiny / "bundle", rows=rows)


def test_image_embeddings_change_the_result(cascade: Cascade) -> None:
    embeds = cascade.encode_prompt("x")
    results = [
        list(cascade.prior(embeds, height=64, width=64, steps=1, seed=0, image_embeds=images))[-1].latents
        for images in (None, np.ones((1, 1, 768), np.float32), np.ones((1, 3, 768), np.float32))
    ]
    assert not np.allclose(results[0], results[1])
    assert not np.allclose(results[1], results[2])


def test_empty_and_long_prompts(cascade: Cascade) -> None:
    long = "word " * 100
    embeds = cascade.encode_prompt(["", long], "short")
    assert embeds.clip_text.shape == (2, 77, 8)
    assert embeds.truncated[0] == embeds.truncated[2] == ""
    assert embeds.truncated[1].split() == ["word"] * 25  # 75 words fit between start and end


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"width": 100}, "width 100: expected a multiple of 8"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 images"),
        ({"num_images": 0}, "num_images=0: expected at least 1"),
        ({"negative": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"steps": 3}, "steps: unknown, did you mean prior_steps or decoder_steps?"),
        ({"prior_stpes": 3}, "prior_stpes: unknown, did you mean prior_steps"),
        ({"num_inference_steps": 3}, "num_inference_steps: unknown, did you mean prior_steps or decoder_steps?"),
        ({"guidance_scale": 3}, "guidance_scale: unknown, did you mean prior_guidance or decoder_guidance?"),
        ({"negative_prompt": "x"}, "negative_prompt: unknown, did you mean negative?"),
        ({"image": "x.png"}, "image: unknown, did you mean init_image or image_prompts?"),
        ({"prior_steps": 0}, "prior_steps=0: expected 1 to 1000"),
        ({"size_policy": "x"}, "size_policy: Input should be 'exact' or 'diffusers'"),
        ({"output": "pixels"}, "output 'pixels': expected images, latents or prior"),
        ({"prompt": 5}, "prompt 5: expected a text, or a list of texts"),
        ({"prompt": []}, "no prompts; give a text, or a list of texts"),
        ({"controls": ["canny"]}, r"controls: expected ControlPicture\(\"canny\", picture\), found 'canny'"),
        ({"controls": "canny"}, "controls: expected ControlPicture"),
        ({"image_prompts": "none.png"}, "^none.png: expected a picture, found no such file"),  # one path is no list
        ({"init_image": np.zeros((8, 8, 3))}, "expected a picture as a path or a PIL image, found ndarray"),
        ({"init_image": Image.new("RGB", (8, 8)), "mask": 5}, "expected a picture as a path or a PIL image, found int"),
        ({"image_prompts": 5}, "expected a picture as a path or a PIL image, found int"),
        ({"controls": 5}, "controls: expected ControlPicture"),
    ],
)
def test_calls_that_cannot_be(cascade: Cascade, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cascade.generate(**{"prompt": "x", "settings": QUICK, "seed": 0, **call})


def test_a_result_is_shown_by_its_shapes(cascade: Cascade) -> None:
    """Hundreds of lines of numbers stood below a call in a notebook."""
    result = cascade.generate("x", seed=0, settings=QUICK)
    assert repr(result) == (
        "Result(prior_latents=float32 (1, 16, 2, 3), decoder_latents=float32 (1, 4, 16, 32), "
        "pixels=float32 (1, 3, 64, 128))"
    )
    assert repr(result.embeds).startswith("PromptEmbeds(clip_text=float32 (1, 77, 8), pooled=float32 (1, 1, 12), ")
    for step in cascade.prior(result.embeds, height=64, width=64, steps=1):
        assert repr(step).startswith("Step(index=0, steps=1, timestep_ratio=0.0, latents=float32 (1, 16, 2, 2), ")


def test_settings_and_what_overrides_them_are_read_alike(cascade: Cascade) -> None:
    """As words and as numbers of numpy, with settings and without."""
    words: dict[str, Any] = {"size_policy": "exact", "sampler": "gdf", "prior_guidance": "3"}
    (found,) = cascade.generate("x", seed=0, settings=Settings(np.int64(64), 64, prior_steps=1), **words).settings
    (same,) = cascade.generate("x", seed=0, width=64, height=64, prior_steps=1, **words).settings
    of_gdf = ("prior_shift", "decoder_guidance", "rescale")  # without settings, the sampler chooses them
    assert {name: value for name, value in found.items() if name not in of_gdf} == {
        name: value for name, value in same.items() if name not in of_gdf
    }
    json.dumps(found)


@pytest.mark.parametrize("change", [
    lambda e: {"pooled": e.pooled[:1]},
    lambda e: {"pooled": e.pooled[:, 0]},
    lambda e: {"negative_clip_text": e.negative_clip_text[:, :9]},
    lambda e: {"negative_clip_text": e.negative_clip_text[:1], "negative_pooled": e.negative_pooled[:1]},
])  # fmt: skip
def test_embeddings_that_do_not_fit_together(cascade: Cascade, change: Any) -> None:
    embeds = cascade.encode_prompt(["a", "b"])
    with pytest.raises(UsageError, match=r"embeddings: expected .* found clip_text"):
        replace(embeds, **change(embeds))


def test_latents_of_another_shape(cascade: Cascade) -> None:
    embeds = cascade.encode_prompt("x")
    with pytest.raises(UsageError, match=r"prior latents: expected shape \[1, 16, 2, 2\], found \[1, 16, 3, 3\]"):
        list(cascade.prior(embeds, height=64, width=64, latents=np.zeros((1, 16, 3, 3), np.float32)))


def test_one_stage_in_memory_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[tuple[Stage, str]] = []
    seen: list[tuple[Stage, str]] = []
    load = OnnxRuntimeEngine.load

    def counting(self: OnnxRuntimeEngine, stage: Stage, graph: str = "model") -> Any:
        runner = load(self, stage, graph)
        alive.append((stage, graph))
        seen.append((stage, graph))
        close = runner.close
        monkeypatch.setattr(runner, "close", lambda: (alive.remove((stage, graph)), close()))
        assert alive == [(stage, graph)]
        return runner

    monkeypatch.setattr(OnnxRuntimeEngine, "load", counting)
    with Cascade.open(tiny / "bundle", memory="staged") as staged:
        staged.generate("x", seed=0, settings=QUICK)
        assert alive == [(Stage.VQGAN, "model")]
    assert not alive
    assert seen == [
        (Stage.TEXT_ENCODER, "model"),
        (Stage.PRIOR, "conditioning"),
        (Stage.PRIOR, "step"),
        (Stage.DECODER, "model"),
        (Stage.VQGAN, "model"),
    ]


def test_a_bundle_without_split_graphs_draws_the_same(tiny: Path, tmp_path: Path) -> None:
    """Conditions in every step instead of once: only the order of some sums differs."""
    shutil.copytree(tiny / "bundle", tmp_path / "plain")
    path = tmp_path / "plain" / "cascade.json"
    content = json.loads(path.read_text())
    for stage in ("prior", "decoder"):
        content["stages"][stage]["graphs"] = {"model": content["stages"][stage]["graphs"]["model"]}
    path.write_text(json.dumps(content))
    guided = replace(QUICK, decoder_guidance=1.5)
    results = []
    for bundle in (tiny / "bundle", tmp_path / "plain"):
        with Cascade.open(bundle) as cascade:
            results.append(cascade.generate(["x", "y"], negative="n", seed=0, settings=guided).decoder_latents)
    assert np.linalg.norm(results[0] - results[1]) <= 1e-5 * np.linalg.norm(results[1])


def test_metadata_of_a_png(cascade: Cascade, tmp_path: Path) -> None:
    result = cascade.generate(["a ü", "b"], negative="n", num_images=2, seed=5, settings=QUICK)
    path = tmp_path / "new" / "x.png"
    save_png(path, result.images[3], result.settings[3])
    settings = read_settings(path)
    assert settings is not None
    assert set(settings.pop("precision")) == {"text_encoder", "prior", "decoder", "vqgan"}
    assert len(settings.pop("bundle")) == 64  # a SHA-256
    assert settings.pop("version") == version("cascadekit")
    assert settings | {"created_by": ""} == {
        **{"prompt": "b", "negative": "n", "seed": 5, "index": 3, "batch": 4, "width": 128, "height": 64},
        **{"prior_steps": 2, "prior_guidance": 4.0, "decoder_steps": 2, "decoder_guidance": 0.0},
        **{"size_policy": "exact", "sampler": "ddpm-wuerstchen", "prior_shift": 1.0, "decoder_shift": 1.0},
        **{"rescale": 0.0, "strength": 0.8, "weighted": False, "long_prompts": False},
        **{"vqgan_scale": 0.3764, "engine": "onnxruntime", "created_by": ""},
    }
    assert result.settings[0]["prompt"] == "a ü"
    with Image.open(path) as picture:
        assert picture.tobytes() == result.images[3].tobytes()


def test_names_of_images(tmp_path: Path) -> None:
    (tmp_path / "0003.png").touch()
    (tmp_path / "cat.png").touch()
    assert [path.name for path in image_paths(tmp_path, 2)] == ["0004.png", "0005.png"]
    assert image_paths(tmp_path / "dog.png", 1) == [tmp_path / "dog.png"]
    with pytest.raises(UsageError, match="one file for 2 images"):
        image_paths(tmp_path / "dog.png", 2)
    with pytest.raises(UsageError, match="exists already"):
        image_paths(tmp_path / "cat.png", 1)
    assert image_paths(tmp_path / "cat.png", 1, force=True)
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError, match="expected a folder"):
        image_paths(tmp_path / "file.txt", 1)


def test_an_image_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the image cannot be written"):
        save_png(tmp_path / "file" / "x.png", Image.new("RGB", (8, 8)), {})


def test_bundles_that_are_none_or_damaged(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a bundle.*cascadekit export"):
        Cascade.open(tmp_path)
    export(tiny / "model", tmp_path / "prior-only", stages=[Stage.PRIOR])
    with pytest.raises(UsageError, match="has no text_encoder"):
        Cascade.open(tmp_path / "prior-only").encode_prompt("x")
    export(tiny / "model", tmp_path / "cut", weights="copy")
    with (tmp_path / "cut/prior/weights.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: expected \d+ bytes, it has 1000"):
        Cascade.open(tmp_path / "cut").generate("x", seed=0, settings=QUICK)
    manifest = tmp_path / "cut/cascade.json"
    content = json.loads(manifest.read_text())
    content["stages"]["prior"]["files"][0]["path"] = "../../etc/passwd"
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="leads out of the bundle"):
        Cascade.open(tmp_path / "cut")


def test_a_bundle_for_another_engine(tiny: Path, tmp_path: Path) -> None:
    content = json.loads((tiny / "bundle" / "cascade.json").read_text()) | {"engines": ["abacus"]}
    (tmp_path / "cascade.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match="made for abacus; expected onnxruntime"):
        Cascade.open(tmp_path)


def test_a_device_that_is_not_there(tiny: Path) -> None:
    with pytest.raises(UsageError, match="expected one of auto, cpu, cuda"):
        Cascade.open(tiny / "bundle", device="tpu")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "expected inputs x, y, found"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(2, np.float32)}, "input x: expected float32"),
        ({"x": np.zeros((2, 4), np.float32), "y": np.zeros(2, np.float32)}, r"expected float32 \[batch=2, 3\]"),
        ({"x": np.zeros((2, 3), np.float32), "y": np.zeros(1, np.float32)}, r"y: .*\[batch=2\], found float32 \[1\]"),
        ({"x": np.zeros(3, np.float32), "y": np.zeros(1, np.float32)}, r"found float32 \[3\]"),
    ],
)
def test_inputs_are_checked_against_ports(inputs: dict[str, Any], message: str) -> None:
    ports = (Port("x", "float32", ("batch", 3)), Port("y", "float32", ("batch",)))
    with pytest.raises(EngineError, match=message):
        check_inputs(Stage.PRIOR, ports, inputs)

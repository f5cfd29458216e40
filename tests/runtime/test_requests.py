"""From an image back to the request that made it: PNG metadata, drawn again bit for bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cascadekit import Cascade
from cascadekit.cli import main
from cascadekit.runtime.batch.generate_requests import generate_requests, request_groups
from cascadekit.runtime.images.png import require_settings, save_png
from cascadekit.runtime.sampling.noise import PlacedSeed
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.request import Request, parse_request
from cascadekit.schemas.stages import Stage
from helpers.whole import Whole, picture

SIZE = (128, 64)
QUICK: dict[str, Any] = {"width": 128, "height": 64, "prior_steps": 2, "decoder_steps": 2, "prior_guidance": 3.5}


def silent(stage: object, step: object) -> None: ...


@pytest.fixture(scope="module")
def cascade(whole: Whole) -> Cascade:
    return Cascade.open(whole.bundle, threads=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With pictures a.png, b.png and a mask.png for the former."""
    for number, name in enumerate("ab"):
        picture(160, 80, number).save(tmp_path / f"{name}.png")
    mask = Image.new("L", (160, 80))
    mask.paste(255, (20, 20, 60, 50))
    mask.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn_again(cascade: Cascade, request: Request, folder: Path) -> tuple[Image.Image, Image.Image, dict[str, Any]]:
    """The image, what is drawn from the metadata in its PNG, and these."""
    (first,) = generate_requests(cascade, [request], silent)
    save_png(folder / "drawn.png", first.image, first.metadata)
    metadata = require_settings(folder / "drawn.png")
    (second,) = generate_requests(cascade, [parse_request(metadata, SIZE)], silent)
    assert {**second.metadata} == metadata == {**first.metadata}
    return first.image, second.image, metadata


CASES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": 'ü "quoted"\n日本', "negative": "x", "seed": 2**63 + 5, "index": 1, "batch": 3},
    "gdf": {"prompt": "", "seed": -1, "sampler": "gdf", "prior_shift": 1.7, "rescale": 0.3, "decoder_guidance": 1.3},
    "timesteps": {"prompt": "x", "seed": 0, "prior_timesteps": [0.95, 1 / 3, 0], "decoder_timesteps": (1, 0.123456789)},
    "image prompts": {"prompt": "x", "seed": 1, "image_prompts": ["a.png", "b.png"]},
    "varied": {"prompt": "x", "seed": 1, "init_image": "a.png", "strength": 0.55, "prior_steps": 4},
    "inpainted": {"prompt": "x", "seed": 1, "init_image": "a.png", "mask": "mask.png", "strength": 1.0},
    "controlled": {"prompt": "x", "seed": 1, "controls": ["canny=b.png:0.4", {"name": "edges", "path": "a.png"}]},
    "controlled with a mask": {"prompt": "x", "seed": 1, "controls": ["inpainting=a.png"], "mask": "mask.png"},
}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_metadata_draw_the_image_again(cascade: Cascade, folder: Path, given: dict[str, Any]) -> None:
    request = parse_request({**QUICK, **given}, SIZE)
    first, second, metadata = drawn_again(cascade, request, folder)
    assert first.size == second.size == SIZE
    assert first.tobytes() == second.tobytes()
    assert metadata["prompt"] == given["prompt"]
    assert metadata["seed"] == given["seed"]
    refs = [*metadata.get("image_prompts", []), *metadata.get("controls", [])]
    refs += [metadata[name] for name in ("init_image", "mask") if name in metadata]
    for ref in refs:
        assert ref["sha256"] == hashlib.sha256((folder / ref["path"]).read_bytes()).hexdigest()
    named = {name for name in ("image_prompts", "controls", "init_image", "mask") if name in given}
    assert bool(refs) == bool(named)
    for name in named:  # each matters: without it another image comes out
        rest = {key: value for key, value in given.items() if key not in (name, "mask")}
        if name == "mask" or (name == "controls" and "mask" in given):
            continue
        (other,) = generate_requests(cascade, [parse_request({**QUICK, **rest}, SIZE)], silent)
        assert other.image.tobytes() != first.tobytes()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"image_prompts": ["a.png", "b.png"]}, "b.png"),
        ({"init_image": "a.png"}, "a.png"),
        ({"init_image": "a.png", "mask": "mask.png"}, "mask.png"),
        ({"controls": ["canny=b.png"]}, "b.png"),
    ],
)
def test_a_picture_that_has_changed(cascade: Cascade, folder: Path, given: dict[str, Any], name: str) -> None:
    request = parse_request({**QUICK, "prompt": "x", "seed": 0, **given}, SIZE)
    (drawn,) = generate_requests(cascade, [request], silent)
    again = parse_request(drawn.metadata, SIZE)
    picture(160, 80, 9).save(folder / name)
    with pytest.raises(UsageError) as error:
        generate_requests(cascade, [again], silent)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert "SHA-256" in str(error.value)
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name}: expected a picture, found no such file"):
        generate_requests(cascade, [again], silent)


def test_one_image_of_a_batch_alone_and_in_other_company(cascade: Cascade, folder: Path) -> None:
    """Up to rounding: the others of a batch may change the order of sums."""
    batch = cascade.generate(["a", "b", "c"], negative=["1", "2", "3"], seed=8, **QUICK)
    requests = [parse_request(settings, SIZE) for settings in batch.settings]
    assert [each.prompt + each.negative + str(each.index) for each in requests] == ["a10", "b21", "c32"]
    alone = generate_requests(cascade, [requests[2]], silent)
    company = generate_requests(cascade, [requests[2], requests[0]], silent)
    for drawn, index in ((alone[0], 2), (company[0], 2), (company[1], 0)):
        difference = np.abs(np.asarray(drawn.image).astype(int) - np.asarray(batch.images[index]).astype(int))
        assert difference.max() <= 1
        assert drawn.metadata == batch.settings[index]
    apart = np.abs(np.asarray(batch.images[0]).astype(int) - np.asarray(batch.images[2]).astype(int))
    assert apart.mean() > 2


def test_a_mask_of_no_picture(cascade: Cascade, folder: Path) -> None:
    request = parse_request({**QUICK, "prompt": "x", "seed": 0, "mask": "mask.png"}, SIZE)
    with pytest.raises(UsageError, match="the mask needs a picture; give init_image"):
        generate_requests(cascade, [request], silent)
    with pytest.raises(UsageError, match="the mask needs a picture"):
        cascade.generate("x", seed=0, mask=Image.new("L", (8, 8), 255), **QUICK)


def test_embeddings_do_not_pass_for_an_empty_prompt(cascade: Cascade) -> None:
    embeds = cascade.encode_prompt(["a", "b"], "n")
    result = cascade.generate(embeds=embeds, num_images=2, seed=0, output="prior", **QUICK)
    assert [each["index"] for each in result.settings] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="prompt: Field required"):
        parse_request(result.settings[0], SIZE)
    said = cascade.generate(["a", "b"], negative=["c", "d"], num_images=3, seed=0, output="prior", **QUICK)
    assert [each["prompt"] + each["negative"] for each in said.settings] == ["ac"] * 3 + ["bd"] * 3


def test_groups_are_neighbours_that_differ_in_words_and_seeds_alone() -> None:
    def request(seed: int, **more: Any) -> Request:
        return parse_request({**QUICK, "prompt": str(seed), "seed": seed, **more}, SIZE)

    requests = [request(0), request(1), request(2), request(3, prior_steps=3), request(4), request(5, mask="m")]
    assert [[each.seed for each in group] for group in request_groups(requests, 2)] == [[0, 1], [2], [3], [4], [5]]


def test_rescaled_guidance_does_not_tie_images_together(cascade: Cascade, folder: Path) -> None:
    """The library rescales by all images of a batch, as the original does; requests are drawn apart."""
    call = {**QUICK, "sampler": "gdf"}
    together = cascade.generate(["a", "b", "c"], seed=8, output="prior", **call)
    alone = cascade.generate("c", seed=PlacedSeed(8, 2, 3), output="prior", **call)
    difference = np.abs(together.prior_latents[2] - alone.prior_latents[0]).max()
    assert difference > 1e-3 * np.abs(alone.prior_latents).max()
    requests = [parse_request(settings, SIZE) for settings in together.settings]
    parts = list(request_groups(requests, 8))
    assert [len(part) for part in parts] == [1, 1, 1]
    (drawn,) = generate_requests(cascade, parts[2], silent)
    assert drawn.image.tobytes() == drawn_again(cascade, requests[2], folder)[1].tobytes()
    assert drawn.metadata == together.settings[2]


def test_seeds_of_other_integers_are_stored_as_numbers(cascade: Cascade) -> None:
    """numpy's integers, from arange say."""
    for seed in (np.int64(5), np.arange(4, 6)[1:], [np.uint8(5)]):
        result = cascade.generate("x", seed=seed, output="prior", **QUICK)
        assert json.loads(json.dumps(result.settings))[0]["seed"] == 5
        expected = cascade.generate("x", seed=5, output="prior", **QUICK)
        assert np.array_equal(result.prior_latents, expected.prior_latents)


def test_the_command_line_draws_again_what_it_drew(whole: Whole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    lite = ["--from", f"prior={whole.lite}", "--engine", "onnxruntime", "--threads", "1", "--memory", "resident"]
    common = ["generate", str(whole.bundle), *lite]
    words = "--size 128x64 --prior-steps 2 --decoder-steps 2 --sampler gdf --image-prompt b.png"
    pictures = "--init-image a.png --mask mask.png --negative n --prior-timesteps 1,0.5,0.25,0 --images 2"
    run = CliRunner().invoke(main, [*common, "a b", "-o", "out", *words.split(), *pictures.split()])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(main, [*common, "--like", "out/0000.png", "-o", "again.png"])
    assert run.exit_code == 0, run.output
    with Image.open("out/0000.png") as first, Image.open("again.png") as second:
        difference = np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int))
        assert difference.max() <= 1  # alone, which was two
    settings = require_settings(Path("out/0000.png"))
    assert settings == require_settings(Path("again.png"))
    assert (settings["strength"], settings["sampler"], settings["prior_shift"]) == (0.8, "gdf", 2.0)
    picture(64, 64).save("b.png")
    run = CliRunner().invoke(main, [*common, "--like", "out/0000.png", "-o", "changed.png"])
    assert run.exit_code == 2, run.output
    assert "b.png: expected the picture of SHA-256" in run.output
    assert not Path("changed.png").exists()


def test_an_image_made_with_loras_is_drawn_again_with_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[Any] = []

    def with_loras(bundle: Path, loras: Any, **_: Any) -> Path:
        merged.append(list(loras))
        return bundle

    monkeypatch.setattr("cascadekit.converters.lora.bundle_cache.with_loras", with_loras)
    monkeypatch.setenv("CASCADEKIT_LORAS", str(tmp_path))
    for name in ("ink", "line"):
        (tmp_path / f"{name}.safetensors").touch()
    words = "--size 64x64 --prior-steps 1 --decoder-steps 1 --engine onnxruntime --threads 1 --memory resident"
    common = ["generate", str(tiny / "bundle"), *words.split()]
    runs = [
        ["x", "--seed", "1", "--lora", "ink:0.5", "--lora", "line", "-o", str(tmp_path / "1.png")],
        ["--like", str(tmp_path / "1.png"), "-o", str(tmp_path / "2.png")],
        ["--like", str(tmp_path / "1.png"), "--lora", "ink", "-o", str(tmp_path / "3.png")],
    ]
    for arguments in runs:
        run = CliRunner().invoke(main, [*common, *arguments])
        assert run.exit_code == 0, run.output
    assert merged == [[("ink", 0.5), ("line", 1.0)]] * 2 + [[("ink", 1.0)]]
    found = [require_settings(tmp_path / f"{number}.png") for number in (1, 2, 3)]
    assert found[0] == found[1]
    assert found[2]["loras"] == [{"name": "ink"}]


def test_a_short_prompt_is_not_drawn_with_the_empty_chunks_of_a_long_one(tiny: Path, tmp_path: Path) -> None:
    words = "--size 64x64 --prior-steps 2 --decoder-steps 2 --engine onnxruntime --threads 1 --memory resident"
    common = ["generate", str(tiny / "bundle"), *words.split(), "-o", str(tmp_path)]
    run = CliRunner().invoke(main, [*common, "a cat", "one of many words " * 30, "--seed", "1", "--long-prompts"])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(main, [*common, "--like", str(tmp_path / "0000.png")])
    assert run.exit_code == 0, run.output
    with Image.open(tmp_path / "0000.png") as first, Image.open(tmp_path / "0002.png") as again:
        assert np.abs(np.asarray(first).astype(int) - np.asarray(again).astype(int)).max() <= 1


def test_what_is_asked_for_in_a_stage_that_is_not_there(whole: Whole, tiny: Path, folder: Path) -> None:
    """One line each, before anything long is done."""
    with Cascade.open(tiny / "bundle", threads=1) as bare:
        for given in ({"image_prompts": ["a.png"]}, {"init_image": "a.png"}, {"controls": ["canny=a.png"]}):
            request = parse_request({**QUICK, "prompt": "x", "seed": 0, **given}, SIZE)
            with pytest.raises(Exception, match=r"has no (image_encoder|effnet_encoder|controlnet)") as error:
                generate_requests(bare, [request], silent)
            assert type(error.value).__name__ in ("UsageError", "EngineError")
        assert Stage.PRIOR not in {stage for stage, _ in bare.residency._loaded}

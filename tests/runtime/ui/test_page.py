"""The page in a browser, on a tiny cascade that has all stages."""

import urllib.request
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cascadekit.cli import main
from cascadekit.runtime.batch.generate_requests import generate_requests
from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.images.png import read_settings, save_png
from cascadekit.runtime.ui.http_server import PageServer
from cascadekit.schemas.request import parse_request
from helpers.page import DESKTOP, PHONE, QUICK, Gate, Visit, add_picture, call, fill, serving, too_wide, wait_for_text
from helpers.whole import picture


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_generating(
    served: PageServer,
    visit: Visit,
    gate: Gate,
    cascade: Cascade,
    tmp_path: Path,
    size: tuple[int, int],
    scheme: str,
) -> None:
    page = visit(served, size, color_scheme=scheme)
    page.wait_for_selector("#nothing")
    fill(page, prompt="a <b>cat</b>", seed=2**64 - 1, **QUICK)
    page.keyboard.press("Control+Enter")
    wait_for_text(page, "#steps", "prior 1 of 3 · decoder 0 of 2")
    assert page.get_attribute("#track", "aria-valuenow") == "1"
    assert page.inner_text("#generate-name") == "Add to the queue"
    assert page.title() == "1/5 · cascadekit"
    gate.opened.set()
    page.wait_for_selector("#shown button img")
    page.wait_for_selector("#grid .thumb")
    assert page.inner_text("#phase").startswith("Generated in 0:")
    assert page.evaluate("document.querySelector('#shown img').naturalWidth") == 64
    assert too_wide(page) == []
    path = tmp_path / "images" / "0000.png"
    settings = read_settings(path)
    assert settings is not None
    assert settings.items() >= {"prompt": "a <b>cat</b>", "seed": 2**64 - 1, **QUICK}.items()
    if size == DESKTOP:
        bundle = cascade.engine.bundle.root  # type: ignore[attr-defined]
        arguments = ["generate", bundle, "--like", path, "-o", tmp_path / "again.png", "--engine", "onnxruntime"]
        again = CliRunner().invoke(main, [*map(str, arguments), "--threads", "1"])
        assert again.exit_code == 0, again.output
        assert Image.open(path).tobytes() == Image.open(tmp_path / "again.png").tobytes()


def test_previews_cancel_and_queue(served: PageServer, visit: Visit, gate: Gate, tmp_path: Path) -> None:
    page = visit(served)
    fill(page, prompt="first", **QUICK)
    page.click("#generate")
    assert gate.reached.wait(30)
    fill(page, prompt="second")
    page.click("#generate")
    wait_for_text(page, "#queue li", "second")
    page.reload()  # whoever comes back finds the jobs again
    wait_for_text(page, "#queue li", "second")
    page.click("#queue button")
    page.wait_for_selector("#queue", state="hidden")
    page.click("#cancel")
    wait_for_text(page, "#phase", "Cancelling after this step")
    assert page.is_disabled("#cancel")
    gate.opened.set()
    wait_for_text(page, "#phase", "Cancelled after")
    assert page.is_visible("#empty")
    assert page.inner_text("#generate-name") == "Generate"
    assert not (tmp_path / "images").exists()
    gate.opened.clear()
    gate.previews_before = 1
    page.click("#generate")
    page.wait_for_selector("#shown .draft")
    wait_for_text(page, "#steps", "prior 2 of 3 · decoder 0 of 2")
    assert page.get_attribute("#shown .draft", "src").startswith("data:image/jpeg;base64,")
    gate.opened.set()
    page.wait_for_selector("#shown button")
    assert page.locator("#shown .draft").count() == 0


def test_errors_in_words(served: PageServer, visit: Visit) -> None:
    page = visit(served, PHONE)
    fill(page, prompt="x", **{**QUICK, "height": 100})
    page.click("#generate")
    wait_for_text(page, "#error", "Height 100: expected a multiple of 8, at least 64; the nearest is 96")
    assert page.get_attribute("#height", "aria-invalid") == "true"
    assert page.get_attribute("#width", "aria-invalid") is None
    assert too_wide(page) == []
    fill(page, **QUICK, prior_timesteps="0.5, 0.7")  # found out while generating
    page.click("#generate")
    wait_for_text(page, "#error", "Timesteps 0.5, 0.7: expected two or more that fall")
    fill(page, prior_timesteps="")
    page.click("#generate")
    page.wait_for_selector("#shown button")
    assert page.is_hidden("#error")


def test_settings_come_back_from_the_gallery(
    served: PageServer, visit: Visit, cascade: Cascade, tmp_path: Path
) -> None:
    """An image that the command line generated, third of a batch, with settings unlike the defaults."""
    folder, settings = tmp_path / "images", {
        "prior_guidance": 3.5, "decoder_guidance": 1.25, "sampler": "gdf", "prior_shift": 1.75, "rescale": 0.6,
        "decoder_timesteps": (1.0, 0.3, 0.0), "weighted": True, **{**QUICK, "width": 72},
    }  # fmt: skip
    result = cascade.generate("a (cat:1.3)", negative="dogs", num_images=3, seed=7, **settings)
    for number, image in enumerate(result.images):
        save_png(folder / f"{number:04d}.png", image, result.settings[number])
    page = visit(served)
    page.wait_for_selector("#grid .thumb >> nth=2")  # the gallery is asked for after the page has loaded
    assert page.locator("#grid .thumb").count() == 3
    page.click("#grid .thumb >> nth=0")
    assert page.inner_text("#viewer-name") == "0002.png"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-name") == "0001.png"
    page.keyboard.press("ArrowLeft")
    assert "image 3 of 3" in page.inner_text("#viewer-settings")
    assert (page.get_attribute("#download", "download"), page.locator("#download").get_attribute("href")[:16]) == (
        "0002.png", "/images/0002.png",
    )  # fmt: skip
    page.click("#viewer [data-do=use]")
    assert page.is_hidden("#viewer")
    assert page.evaluate("document.activeElement.id") == "prompt"
    fill(page)
    shown = {name: page.input_value(f"#{name}") for name in (
        "prompt", "negative", "seed", "width", "prior_guidance", "decoder_guidance", "sampler", "prior_shift",
        "rescale", "decoder_timesteps",
    )}  # fmt: skip
    assert shown == {
        "prompt": "a (cat:1.3)", "negative": "dogs", "seed": "7", "width": "72", "prior_guidance": "3.5",
        "decoder_guidance": "1.25", "sampler": "gdf", "prior_shift": "1.75", "rescale": "0.6",
        "decoder_timesteps": "1, 0.3, 0",
    }  # fmt: skip
    assert page.is_checked("#weighted")
    page.click("#generate")
    page.wait_for_selector("#shown button")
    generated = read_settings(folder / "0003.png")
    assert generated == read_settings(folder / "0002.png")
    assert np.abs(np.asarray(Image.open(folder / "0003.png"), int) - np.asarray(result.images[2])).max() <= 1
    page.click("#dice")  # another seed is no place in that batch
    assert page.is_hidden("#place")
    assert page.input_value("#seed").isdecimal()
    page.select_option("#sampler", "ddpm-wuerstchen")
    assert page.is_hidden("#prior_shift")
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.inner_text("#settings-count") == ""


def test_pictures(served: PageServer, visit: Visit, cascade: Cascade, tmp_path: Path) -> None:
    """A start picture and a mask: kept beside the image under their hashes, so that it can be generated again."""
    picture(128, 96).save(tmp_path / "photo.jpg", quality=90)
    mask = np.zeros((96, 128), np.uint8)
    mask[30:70, 40:90] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "words.png").write_bytes(b"no picture")
    page = visit(served)
    fill(page, prompt="x", seed=3, **{**QUICK, "width": 96})
    start, hole = page.get_by_label("Start picture", exact=True), page.get_by_label("Mask", exact=True)
    assert hole.first.is_disabled()
    start.first.set_input_files(tmp_path / "words.png")
    wait_for_text(page, "#error", "Words.png: the picture: not a picture of a known format")
    start.first.set_input_files(tmp_path / "photo.jpg")
    page.wait_for_selector("img[alt='photo.jpg']")
    hole.first.set_input_files(tmp_path / "mask.png")
    page.wait_for_selector("img[alt='mask.png']")
    fill(page, strength=0.6)
    page.click("#generate")
    page.wait_for_selector("#shown button")
    path = tmp_path / "images" / "0000.png"
    settings = read_settings(path)
    assert settings is not None
    for name, file in (("init_image", "photo.jpg"), ("mask", "mask.png")):
        found = sha256((tmp_path / file).read_bytes()).hexdigest()
        assert settings[name] == {"path": str(tmp_path / "images" / "pictures" / found), "sha256": found}
    assert settings["strength"] == 0.6
    (again,) = generate_requests(
        cascade, [parse_request(settings, (64, 64))], lambda stage, step: None
    )  # as --like does
    assert Image.open(path).tobytes() == again.image.tobytes()
    page.get_by_label("Remove photo.jpg").click()
    page.click("#grid .thumb >> nth=0")
    page.click("#viewer [data-do=use]")
    page.wait_for_function("() => document.querySelectorAll('.items img').length === 2")
    assert page.input_value("#strength") == "0.6"
    page.click("#result [data-do=start]")
    page.wait_for_selector("img[alt='0000.png']")


def test_a_painted_mask(served: PageServer, visit: Visit, tmp_path: Path) -> None:
    """White where the pointer went, black elsewhere, of the picture's proportions."""
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "sea.png")
    page = visit(served)
    fill(page)
    assert page.is_disabled("#paint")
    page.get_by_label("Start picture", exact=True).first.set_input_files(tmp_path / "sea.png")
    page.click("#paint:enabled")
    page.fill("#brush", "20")
    box = page.locator("#canvas").bounding_box()
    x, y = (box["x"] + box["width"] * share for share in (0.25, 0.5)), box["y"] + box["height"] * 0.5
    page.mouse.move(next(x), y)
    page.mouse.down()
    page.mouse.move(next(x), y, steps=4)
    page.mouse.up()
    page.click("#painted")
    shown = page.locator("img[alt='painted mask']")
    shown.wait_for()
    with urllib.request.urlopen(served.url + shown.get_attribute("src")) as reply:
        mask = np.asarray(Image.open(reply).convert("L"), int)
    assert mask.shape == (200, 300)
    rows, columns = np.mgrid[:200, :300]
    nearest = columns.clip(75, 150)  # a stroke of 60 pixels from (75, 100) to (150, 100), its ends round
    expected = np.hypot(columns - nearest, rows - 100) < 30
    assert (mask > 128)[expected].mean() > 0.98
    assert (mask > 128)[~expected].mean() < 0.01


def test_every_field_has_a_name_and_keys_reach_it(served: PageServer, visit: Visit) -> None:
    page = visit(served, PHONE)
    fill(page)
    nameless = page.evaluate("""() =>
        [...document.querySelectorAll("input, select, textarea, button")]
            .filter(field => !field.ariaHidden && !field.hidden && !field.ariaLabel)
            .filter(field => !(field.labels && field.labels.length) && !field.textContent.trim())
            .map(field => field.outerHTML)
    """)
    assert nameless == []
    assert too_wide(page) == []
    seen = set()
    for _ in range(50):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert seen >= {
        "negative",
        "width",
        "height",
        "swap",
        "bundle",
        "seed",
        "dice",
        "images",
        "prior_steps",
        "sampler",
        "generate",
    }


def test_a_bundle_without_a_previewer_says_so(tiny: Path, visit: Visit, tmp_path: Path) -> None:
    with Cascade.open(tiny / "bundle", threads=1) as cascade, serving(cascade, tmp_path / "images") as server:
        page = visit(server)
        fill(page, prompt="word " * 90, **QUICK)
        assert page.is_disabled("#preview_prior")
        assert "no previewer" in page.inner_text("#groups")
        assert "follows words only" in page.inner_text("#zones")
        page.click("#generate")
        page.wait_for_selector("#shown button")
        assert "CLIP reads 77 tokens" in page.inner_text("#notes")
        answer = call(
            server, "POST", "/api/jobs", {"prompt": "x", "image_prompts": [add_picture(server, picture(8, 8))]}
        )
        assert answer.json["error"] == "the bundle has no image_encoder; export the model with it"

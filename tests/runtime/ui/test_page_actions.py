"""The actions of the page around an image: presets, choices, actions, gallery, time left; in a browser."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.images.png import read_settings, save_png
from cascadekit.runtime.ui.http_server import PageServer
from cascadekit.runtime.ui.models import Models
from helpers.page import QUICK, Visit, call, fill, serving_models, wait_for_text
from helpers.whole import Whole


def settings(path: Path) -> dict[str, Any]:
    found = read_settings(path)
    assert found is not None
    return found


def saved(folder: Path, *prompts: str) -> None:
    """Images of these prompts, the first one the oldest."""
    for number, prompt in enumerate(prompts):
        made = {"prompt": prompt, "seed": 70 + number, **QUICK}
        save_png(folder / f"{number:04d}.png", Image.new("RGB", (64, 64), "navy"), made)


def sides_of(server: PageServer, ratio: float) -> tuple[str, str]:
    """Width and height of these proportions and of the default's area, as the fields show them."""
    bundle = call(server, "GET", "/api/bundles/bundle").json
    side = bundle["defaults"]["ddpm-wuerstchen"]["width"]
    width, height = (max(64, round(side * factor / 8) * 8) for factor in (ratio**0.5, ratio**-0.5))
    return str(width), str(height)


def captions(page: Any) -> list[str]:
    return page.locator("#grid .caption").all_inner_texts()


def test_presets_of_size_and_quality(served: PageServer, visit: Visit) -> None:
    """The size keeps the default's area, in steps of 8."""
    page = visit(served)
    width, height = sides_of(served, 16 / 9)
    checked = "() => [...document.querySelectorAll('#form input[type=radio]:checked')].map(field => field.value)"
    sides = "() => [width.value, height.value]"
    assert page.evaluate(checked) == ["1:1", "standard"]
    page.click("#shapes label >> text=16:9")
    assert page.evaluate(sides) == [width, height]
    page.click("#swap")
    assert page.evaluate(sides) == [height, width]
    assert page.evaluate(checked) == ["9:16", "standard"]
    page.click("#qualities label >> text=Draft")
    assert page.evaluate("() => [prior_steps.value, decoder_steps.value]") == ["10", "5"]
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.fill("#prior_steps", "11")
    assert "draft" not in page.evaluate(checked)
    page.click("#qualities label >> text=Fine")
    assert page.evaluate("() => [prior_steps.value, decoder_steps.value]") == ["40", "20"]


def test_a_start_picture_sets_the_proportions_and_survives_a_reload(
    served: PageServer, visit: Visit, tmp_path: Path
) -> None:
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "sea.png")
    page = visit(served)
    fill(page, prompt="waves")
    page.get_by_label("Start picture", exact=True).first.set_input_files(tmp_path / "sea.png")
    width, height = sides_of(served, 300 / 200)
    wait_for_text(page, "#notice", f"The size follows the start picture: {width} × {height}.")
    fill(page, strength=0.35)
    page.reload()
    page.wait_for_selector("img[alt='sea.png']", state="attached")
    assert page.input_value("#prompt") == "waves"
    assert page.input_value("#strength") == "0.35"
    assert (page.input_value("#width"), page.input_value("#height")) == (width, height)


def test_an_empty_prompt_asks_first(served: PageServer, visit: Visit, tmp_path: Path) -> None:
    page = visit(served)
    fill(page, **QUICK)
    page.keyboard.press("Control+Enter")
    wait_for_text(page, "#question", "Generate without a prompt?")
    page.keyboard.press("Escape")
    page.wait_for_selector("#prompt:focus")
    page.click("#generate")
    page.click("#question-yes")
    page.wait_for_selector("#shown button")
    assert settings(tmp_path / "images" / "0000.png")["prompt"] == ""


def test_actions_below_the_result(served: PageServer, visit: Visit, tmp_path: Path) -> None:
    """Vary takes a new seed and Again the same one; both take the settings of the image, not those of the form."""
    folder = tmp_path / "images"
    page = visit(served)
    fill(page, prompt="a cat", images=2, seed=5, **QUICK)
    page.click("#generate")
    page.wait_for_selector("#strip button >> nth=1")
    page.click("#strip button >> nth=1")
    wait_for_text(page, "#result-name", "0001.png · 64 × 64 · seed 6")
    assert page.is_hidden("#result [data-do=folder]")
    page.fill("#prompt", "a dog")
    page.click("#result [data-do=again]")
    wait_for_text(page, "#result-name", "0002.png · 64 × 64 · seed 6")
    assert (folder / "0001.png").read_bytes() == (folder / "0002.png").read_bytes()
    page.click("#result [data-do=vary]")
    wait_for_text(page, "#result-name", "0003.png")
    varied = settings(folder / "0003.png")
    assert varied["seed"] != 6
    assert {**varied, "seed": 6} == settings(folder / "0001.png")
    page.click("#result [data-do=start]")
    page.wait_for_selector("img[alt='0003.png']")
    page.click("#result [data-do=remove]")
    page.click("#question-yes")
    wait_for_text(page, "#notice", "0003.png was deleted.")
    assert page.is_hidden("#result")
    assert not (folder / "0003.png").exists()
    page.get_by_role("button", name="Undo").click()
    wait_for_text(page, "#notice", "0003.png is back.")
    assert (folder / "0003.png").exists()


def test_the_gallery_has_captions_a_search_and_a_trash(served: PageServer, visit: Visit, tmp_path: Path) -> None:
    saved(tmp_path / "images", "a red barn", "", "<b>the sea</b>")
    page = visit(served)
    page.wait_for_selector("#grid .thumb >> nth=2")
    assert captions(page) == ["<b>the sea</b>", "(no prompt)", "a red barn"]
    page.fill("#search", "BARN")
    wait_for_text(page, "#found", "1 found")
    assert captions(page) == ["a red barn"]
    page.fill("#search", "boat")
    wait_for_text(page, "#nothing", "No image has “boat” in its prompt, name or seed.")
    page.fill("#search", "")
    page.click("#grid .thumb >> nth=0")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")  # no
    page.wait_for_selector("#question", state="hidden")
    assert page.inner_text("#viewer-name") == "0002.png"
    page.keyboard.press("Delete")
    page.click("#question-yes")
    wait_for_text(page, "#viewer-name", "0001.png")  # the next one
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")
    page.wait_for_function("() => document.querySelectorAll('#grid .thumb').length === 2")
    assert {path.name for path in (tmp_path / "images" / "trash").iterdir()} == {"0002.png"}


def test_a_question_that_is_asked_again_at_once_waits_for_its_own_answer(served: PageServer, visit: Visit) -> None:
    """The browser tells that the first one was closed when the second one is open already."""
    page = visit(served)
    asked = """async () => {
        const {confirmed} = await import("/page/messages.js");
        const dialog = document.getElementById("question");
        const first = confirmed("First?", "", "Yes");
        dialog.close();
        const second = confirmed("Second?", "", "Yes");
        await new Promise(resolve => setTimeout(resolve, 50));
        document.getElementById("question-yes").click();
        return [await first, await second];
    }"""
    assert page.evaluate(asked) == [False, True]


def test_bundle_engine_and_loras_are_chosen(whole: Whole, tiny: Path, visit: Visit, tmp_path: Path) -> None:
    """The whole bundle follows pictures, the small one does not; the choice is there again after a reload."""
    models, opened = tmp_path / "models", []
    models.mkdir()
    (models / "full").symlink_to(whole.bundle)
    (models / "small").symlink_to(tiny / "bundle")

    def opener(path: Path, engine: str, loras: Sequence[tuple[str, float]]) -> Cascade:
        opened.append((path.name, engine, list(loras)))
        return Cascade.open(path, engine=engine, threads=1)

    offered = Models(models, opener, engine="onnxruntime", loras=lambda: {"style": "/l/style.safetensors"})
    with offered, serving_models(offered, tmp_path / "images") as server:
        page = visit(server)
        fill(page, prompt="x", **QUICK)
        assert page.inner_text("#about") == "full · onnxruntime"
        assert page.locator("#zones .zone").count() > 2
        page.select_option("#bundle", "small")
        wait_for_text(page, "#zones", "follows words only")
        page.select_option("#lora", "style")
        page.get_by_label("Strength of style").fill("0.5")
        page.reload()
        page.wait_for_selector("#generate:enabled")
        assert page.inner_text("#about") == "small · onnxruntime · 1 LoRA"
        page.click("#generate")
        page.wait_for_selector("#shown button")
        page.close()  # before the server ends, which would be an error in the console
    assert opened == [("small", "onnxruntime", [("/l/style.safetensors", 0.5)])]


def test_the_time_left_follows_from_the_steps(served: PageServer, visit: Visit) -> None:
    """Two of four steps left at 3 seconds, two of the decoder at 2, and then another group of as many images."""
    page = visit(served)
    left = """async ([rates, event]) => {
        const {secondsLeft} = await import("/page/eta.js");
        return secondsLeft({prior: 4, decoder: 2}, rates, event);
    }"""
    event = {"stage": "prior", "index": 2, "first": 1, "last": 2, "of": 3}
    assert page.evaluate(left, [{}, event]) is None
    assert page.evaluate(left, [{"prior": 3, "decoder": 2}, event]) == 2 * 3 + 2 * 2 + 4 * 3 + 2 * 2
    assert page.evaluate(left, [{"prior": 3}, {**event, "last": 3}]) == 2 * 3 + 2 * 3  # the decoder's are not known yet
    over = {"stage": "decoder", "index": 2, "first": 3, "last": 3, "of": 3}
    assert page.evaluate(left, [{"prior": 3, "decoder": 2}, over]) == 0

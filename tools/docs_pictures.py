"""python -m tools.docs_pictures: makes the pictures of the README and of docs/ with the example model.

It needs PyTorch for the report, and playwright with Chromium for the screenshots. `tools.tour` makes the terminals.
"""

import os
import shutil
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cascadekit import Cascade, Stage, export, verify
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL, EXAMPLE_PROMPT, EXAMPLE_PROMPTS
from cascadekit.runtime.images.contact_sheet import contact_sheet
from cascadekit.runtime.images.png import save_png
from cascadekit.runtime.ui.models import Models
from cascadekit.runtime.ui.page_server import page_server

FOLDER = Path(__file__).parents[1] / "docs" / "images"
BUNDLE = Path("bundle")
WIDTH, HEIGHT = 1280, 860  # pixels of a screenshot
SIDE, GAP, HEAD, FOOT = 256, 56, 34, 30  # of the strip: a panel, between two panels, lines above and below
INK, SOFT, CARD = "#1f2328", "#656d76", "#f3f4f6"
Panel = tuple[str, Image.Image, str]  # title, picture, what it is


def main() -> None:
    """Make all pictures."""
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as work:
        os.chdir(work)
        export(EXAMPLE_MODEL, BUNDLE)
        with Cascade.open(BUNDLE, engine="onnxruntime") as cascade:
            result = cascade.generate(EXAMPLE_PROMPTS, seed=0)
            contact_sheet(result.images, EXAMPLE_PROMPTS).save(FOLDER / "example-model.png", optimize=True)
            for number, (image, settings) in enumerate(zip(result.images, result.settings, strict=True)):
                save_png(Path("images") / f"{number:04d}.png", image, settings)
            strip(panels(cascade)).save(FOLDER / "stages.png", optimize=True)
        with browser() as opened:
            picture_report(opened)
            picture_page(opened)
        os.chdir(FOLDER)


def panels(cascade: Cascade) -> list[Panel]:
    """The prompt, both kinds of latents, and the image. The prior's are shown by the previewer too."""
    result = cascade.generate(EXAMPLE_PROMPT, seed=0)
    (image,), prior, decoder = result.images, result.prior_latents, result.decoder_latents
    (preview,) = cascade.preview(Stage.PRIOR, prior)
    return [
        ("prompt", _card(f"“{EXAMPLE_PROMPT}”"), "text encoder: 77 tokens"),
        ("stage C, the prior", _colours(prior), f"{_size(prior)}, 20 steps"),
        ("its preview", preview, "by the previewer"),
        ("stage B, the decoder", _colours(decoder), f"{_size(decoder)}, 10 steps"),
        ("stage A, the VQGAN", image, f"{image.width}x{image.height} pixels"),
    ]


def _size(latents: NDArray[np.float32]) -> str:
    _, channels, height, width = latents.shape
    return f"latents {width}x{height}x{channels}"


def _colours(latents: NDArray[np.float32]) -> Image.Image:
    """The first three channels as red, green and blue; each from its lowest to its highest value."""
    three = latents[0, :3]
    low, high = three.min(axis=(1, 2), keepdims=True), three.max(axis=(1, 2), keepdims=True)
    return Image.fromarray(((three - low) / (high - low) * 255).astype(np.uint8).transpose(1, 2, 0))


def _card(text: str) -> Image.Image:
    card = Image.new("RGB", (SIDE, SIDE), CARD)
    lines = "\n".join(textwrap.wrap(text, 14))
    centre, font = (SIDE // 2, SIDE // 2), ImageFont.load_default(26)
    ImageDraw.Draw(card).multiline_text(centre, lines, INK, font, anchor="mm", align="center", spacing=10)
    return card


def strip(panels: list[Panel]) -> Image.Image:
    """The panels from left to right, with arrows between them."""
    step = SIDE + GAP
    page = Image.new("RGB", (len(panels) * step - GAP + 16, HEAD + SIDE + FOOT + 8), "white")
    ink, large, small = ImageDraw.Draw(page), ImageFont.load_default(20), ImageFont.load_default(17)
    for number, (title, picture, about) in enumerate(panels):
        x, middle = 8 + number * step, HEAD + SIDE // 2
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, HEAD))
        ink.rectangle((x, HEAD, x + SIDE, HEAD + SIDE), outline="#d0d7de")
        ink.text((x + SIDE // 2, HEAD // 2), title, INK, large, anchor="mm")
        ink.text((x + SIDE // 2, HEAD + SIDE + FOOT // 2 + 2), about, SOFT, small, anchor="mm")
        if number:
            tip = x - GAP // 2 + 14
            ink.line((tip - 28, middle, tip - 6, middle), SOFT, 4)
            ink.polygon([(tip, middle), (tip - 12, middle - 9), (tip - 12, middle + 9)], SOFT)
    return page


@contextmanager
def browser() -> Iterator[Any]:
    """The Chromium that is installed, without a window."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def picture_report(browser: Any) -> None:
    """The head of a report about the bundle."""
    report = Path("report.html")
    verify(BUNDLE, EXAMPLE_MODEL, reports=[report], verdict=False)
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(report.absolute().as_uri())
    _save(page, "report.png")


def picture_page(browser: Any) -> None:
    """The page with an image that was generated on it, and a gallery of others."""
    models = Models(BUNDLE, lambda path, engine, loras: Cascade.open(path, engine="onnxruntime"))
    with page_server(models, Path("images"), port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(300_000)  # milliseconds
        page.goto(server.url)
        page.wait_for_selector("#generate:enabled")
        page.fill("#prompt", EXAMPLE_PROMPT)
        page.fill("#seed", "0")
        page.click("#generate")
        page.wait_for_selector("#shown button img")
        page.wait_for_selector(f"#grid .thumb >> nth={len(EXAMPLE_PROMPTS)}")
        page.wait_for_timeout(1000)  # until the last picture has faded in
        _save(page, "page.png")
        server.shutdown()
        thread.join()


def _save(page: Any, name: str) -> None:
    """A screenshot in 256 colours, which is a third of the size."""
    page.screenshot(path=name)
    with Image.open(name) as shot:
        shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()

"""The report as a browser shows it: headless Chromium, wide and narrow, light and dark, without a network."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascadekit.parity.report.write_report import write_report
from helpers.reports import alone, comparison, healthy, made_report, noise_images, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here (apt-get install chromium)")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SCREENS = {"desktop": (1280, 900), "phone": (375, 812)}
SCHEMES = ("light", "dark")

# Text that reaches out of its chart, or is too small to read; the chart of the other width is not shown.
TEXT_FAULTS = """() => [...document.querySelectorAll('.chart > svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  if (!frame.width) return [];
  return [...svg.querySelectorAll('text')].flatMap(text => {
    const box = text.getBoundingClientRect();
    const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.top >= frame.top - 1
      && box.bottom <= frame.bottom + 1;
    return inside && box.height >= 10 ? [] : [text.textContent + ' ' + Math.round(box.height)];
  });
})"""
COLOURS = """() => {
  const look = (selector, of) => getComputedStyle(document.querySelector(selector))[of];
  const pairs = [['body', 'body'], ['.quiet', 'body'], ['.verdict h1', '.verdict'], ['.verdict p', '.verdict'],
    ['td .passed', 'body'], ['td .failed', 'body'], ['figcaption', '.chart'], ['summary', '.chart']];
  const text = pairs.map(([front, back]) => [front, look(front, 'color'), look(back, 'backgroundColor')]);
  const drawn = ['fill', 'stroke'].flatMap(kind => [...document.querySelectorAll('.chart > svg *')]
    .filter(one => one.getBoundingClientRect().width && !one.matches(kind == 'fill' ? 'line' : '.grid'))
    .map(one => [kind + ' ' + one.classList, getComputedStyle(one)[kind], look('.chart', 'backgroundColor')])
    .filter(one => one[1] != 'none' && one[1] != one[2]));
  return [text, drawn];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator["api.Browser"]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, some of it hostile, that failed."""
    hostile = '"><script>document.title="taken"</script><img src="https://example.org/x.png">'
    run = made_report(
        (*healthy(), comparison(alone("prior", f"{hostile}"), 0.5), comparison(alone("vqgan", "z"), float("inf"))),
        image_psnr=30.0,
    )
    images = noise_images()
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report(run, images, bundle="bundle" * 30 + hostile, command=f"verify {hostile}"), images)
    return path


def opened(browser: "api.Browser", path: Path, screen: str = "desktop", scheme: str = "light") -> "api.Page":
    """The page in a context of its own; what goes wrong is in `page.faults`."""
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.faults = faults
    return page


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it, of "rgb(r, g, b)"."""
    parts = np.array([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_can_be_read_everywhere(browser: "api.Browser", failed: Path, screen: str, scheme: str) -> None:
    page = opened(browser, failed, screen, scheme)
    assert page.faults == []
    assert page.title().startswith("FAILED: bundle")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    verdict = page.locator("h1").bounding_box()
    assert verdict is not None
    assert verdict["y"] < 160  # first of all
    assert page.evaluate(TEXT_FAULTS) == []
    open_ones = "[...document.querySelectorAll('.scroll')].filter(s => !s.closest('details:not([open])'))"
    cut = f"{open_ones}.filter(s => s.scrollWidth > s.clientWidth + 1).length"
    assert page.evaluate(cut) == 0  # no table has to be pushed sideways
    shown = page.evaluate(
        "[...document.querySelectorAll('figure.chart')].map(f =>"
        " [...f.querySelectorAll(':scope > svg')].filter(s => s.getBoundingClientRect().width).length)"
    )
    assert shown
    assert set(shown) == {1}
    text, drawn = page.evaluate(COLOURS)
    assert [(name, front, back) for name, front, back in text if contrast(front, back) < 4.5] == []
    assert [(name, front, back) for name, front, back in drawn if contrast(front, back) < 3] == []
    body = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert body < 0.05 if scheme == "dark" else body > 0.8
    page.close()


def test_series_differ_without_colour(browser: "api.Browser", failed: Path) -> None:
    page = opened(browser, failed)
    for chart in page.locator("figure.chart:has(.legend)").all():
        lines = chart.locator("svg.wide .line").evaluate_all("all => all.map(l => l.getAttribute('stroke-dasharray'))")
        assert len(set(lines)) == len(lines) > 1
        keys = chart.locator(".legend .mark").evaluate_all("all => all.map(m => m.tagName + m.getAttribute('points'))")
        assert len(set(keys)) == len(lines)
    page.close()


def test_the_slider_moves_between_the_images(browser: "api.Browser", tmp_path: Path) -> None:
    red, blue = (np.zeros((1, 3, 32, 64), np.float32) for _ in range(2))
    red[:, 0], blue[:, 2] = 1, 1
    write_report(tmp_path / "r.html", report(made_report(healthy()), (red, blue)), (red, blue))
    page = opened(browser, tmp_path / "r.html")
    stack, slider = page.locator(".stack"), page.locator(".compare input")

    def seen(part: float) -> tuple[int, ...]:
        picture = Image.open(io.BytesIO(stack.screenshot())).convert("RGB")
        return tuple(picture.getpixel((int(picture.width * part), picture.height // 2)))

    engine, reference = (255, 0, 0), (0, 0, 255)
    assert (seen(0.25), seen(0.75)) == (engine, reference)
    slider.fill("90")
    assert (seen(0.25), seen(0.75)) == (engine, engine)
    slider.focus()
    page.keyboard.press("Home")
    assert (seen(0.25), seen(0.75)) == (reference, reference)
    difference = Image.open(io.BytesIO(page.locator(".images figure:last-child img").screenshot())).convert("RGB")
    assert difference.getpixel((difference.width // 2, difference.height // 2)) == (255, 0, 255)
    assert page.faults == []
    page.close()


@pytest.mark.parametrize(("error", "word", "strongest"), [(1e-6, "✓ Passed", 1), (0.5, "✗ Failed", 0)])
def test_a_screenshot_shows_the_verdict(
    browser: "api.Browser", tmp_path: Path, error: float, word: str, strongest: int
) -> None:
    """Its paper is tinted green or red, and numbers unfold."""
    write_report(tmp_path / "r.html", report(made_report((*healthy(), comparison(alone("prior", "z"), error)))))
    page = opened(browser, tmp_path / "r.html", "phone")
    assert page.locator("h1").inner_text() == word
    picture = Image.open(io.BytesIO(page.locator(".verdict").screenshot())).convert("RGB")
    tint = picture.getpixel((picture.width // 2, picture.height - 8))
    assert int(np.argmax(tint)) == strongest
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20  # text is there
    table = page.locator("figure.chart table").first
    assert not table.is_visible()
    page.locator("figure.chart summary").first.click()
    assert table.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()

"""The page without a mouse and without good eyes: axe-core finds nothing serious, and keys reach everything."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascadekit.runtime.images.png import save_png
from cascadekit.runtime.ui.http_server import PageServer
from helpers.page import DESKTOP, PHONE, QUICK, Visit, fill, too_wide

axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python holds axe-core")
AXE = Path(axe.__file__).parent / "axe.min.js"

# An element that the focus cannot be seen on: neither itself nor an element around it is outlined.
UNSEEN_FOCUS = """() => {
  const outline = element => getComputedStyle(element).outlineStyle;
  const around = element => element && (outline(element) !== "none" || around(element.parentElement));
  return around(document.activeElement) ? null : document.activeElement.outerHTML;
}"""


def faults(page: Any) -> list[str]:
    """The faults that axe-core finds in the page as it stands."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['impact']}: {each['id']}: {each['nodes'][0]['html']}" for each in found]


@pytest.fixture
def images(tmp_path: Path) -> None:
    for number in range(3):
        made = {"prompt": f"a long prompt of number {number} " * 9, "seed": number, **QUICK}
        save_png(tmp_path / "images" / f"{number:04d}.png", Image.new("RGB", (64, 96), "teal"), made)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_axe_finds_nothing(served: PageServer, visit: Visit, size: tuple[int, int], scheme: str) -> None:
    page = visit(served, size, color_scheme=scheme)
    page.wait_for_selector("#grid .thumb >> nth=2")
    assert faults(page) == []
    fill(page, prompt="x", **{**QUICK, "width": 100})
    page.click("#generate")
    page.wait_for_selector("#error:not([hidden])")
    assert faults(page) == []
    fill(page, width=64)
    page.click("#generate")
    page.wait_for_selector("#shown button")
    assert faults(page) == []
    assert too_wide(page) == []
    page.click("#shown button")
    assert faults(page) == []
    page.keyboard.press("Delete")
    assert faults(page) == []
    assert too_wide(page) == []


@pytest.mark.usefixtures("images")
def test_keys_alone(served: PageServer, visit: Visit) -> None:
    """The focus is seen wherever it goes, in the order of reading; Escape closes what Enter opened."""
    page = visit(served)
    page.wait_for_selector("#grid .thumb >> nth=2")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Shift+Tab")
    assert page.inner_text(":focus") == "Skip to the image"
    order, unseen = [], []
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break  # behind the last control the browser's own follow
        unseen.append(page.evaluate(UNSEEN_FOCUS))
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert set(unseen) == {None}
    wanted = ["prompt", "negative", "width", "height", "seed", "images", "generate", "search", "thumb"]
    assert [name for name in dict.fromkeys(order) if name in wanted] == wanted
    page.focus("#grid .thumb >> nth=1")
    page.keyboard.press("Enter")
    assert page.inner_text("#viewer-name") == "0001.png"
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")
    assert page.get_attribute(":focus", "aria-label").startswith("Open 0001.png")
    page.focus("#shapes input:checked")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "4:3"

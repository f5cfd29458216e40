"""The tiny cascade that has all stages, served to tests, and a browser that visits its page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.ui.http_server import PageServer
from cascadekit.schemas.stages import Stage
from helpers.page import DESKTOP, Gate, Visit, serving
from helpers.whole import Whole


@pytest.fixture(scope="module")
def cascade(whole: Whole) -> Iterator[Cascade]:
    with Cascade.open(whole.bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def served(cascade: Cascade, tmp_path: Path) -> Iterator[PageServer]:
    with serving(cascade, tmp_path / "images") as server:
        yield server


@pytest.fixture
def gate(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, preview = Gate(), cascade.preview

    def gated(stage: Stage, latents: Any) -> Any:
        pictures = preview(stage, latents)
        gate.previews_before -= 1
        if stage is Stage.PRIOR and gate.previews_before < 0:
            gate.reached.set()
            assert gate.opened.wait(30)
        return pictures

    monkeypatch.setattr(cascade, "preview", gated)
    yield gate
    gate.opened.set()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens the page; at the end nothing was complained of, nor asked of any other server."""
    contexts, complaints, hosts = [], [], set()

    def open_page(server: PageServer, size: tuple[int, int] = DESKTOP, **more: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, **more))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(server.url)
        page.wait_for_selector("#generate:enabled")
        hosts.discard(urlsplit(server.url).netloc)
        return page

    yield open_page
    hosts_seen = {host for host in hosts if not host.startswith("127.0.0.1:")} - {""}  # "": data URLs
    for context in contexts:
        context.close()
    assert not hosts_seen
    # Chromium reports a refused request in its own words.
    assert [text for text in complaints if "status of 400" not in text] == []

"""Serves the page of a cascade to tests, asks its server, and drives the page in a browser."""

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.ui.http_server import PageServer
from cascadekit.runtime.ui.models import Models
from cascadekit.runtime.ui.page_server import page_server

DESKTOP, PHONE = (1440, 900), (390, 844)
QUICK = {"width": 64, "height": 64, "prior_steps": 3, "decoder_steps": 2}
ID = "0" * 64

Visit = Callable[..., Any]


@contextmanager
def serving(
    cascade: Cascade,
    output: Path,
    *,
    bundles: Path | None = None,
    loras: Mapping[str, str] | None = None,
    first_loras: Sequence[tuple[str, float]] = (),
    **more: Any,
) -> Iterator[PageServer]:
    """A server whose page opens `cascade` whatever is chosen. `bundles` is what the command is given."""
    root = cascade.engine.bundle.root  # type: ignore[attr-defined]
    models = Models(
        bundles or root, lambda path, engine, chosen: cascade, first_loras=tuple(first_loras), loras=lambda: loras or {}
    )
    with serving_models(models, output, **more) as server:
        yield server


@contextmanager
def serving_models(models: Models, output: Path, **more: Any) -> Iterator[PageServer]:
    with page_server(models, output, port=0, **more) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Gate:
    """Holds the cascade at one of the prior's previews, the first or a later one, until it is let through."""

    previews_before: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def call(
    server: PageServer, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str
) -> Answer:
    """A request as it is given: http.client changes neither path nor headers. An empty header is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = {
        "Host": urlsplit(server.url).netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(data or b"")),
    }
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(data)
    reply = connection.getresponse()
    answer = Answer(reply.status, dict(reply.getheaders()), reply.read())
    connection.close()
    assert b"Traceback" not in answer.body
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    if answer.status >= 400:
        assert set(answer.json) == {"error"}
    return answer


def add_picture(server: PageServer, picture: Image.Image) -> str:
    """The id of a picture that is uploaded."""
    content = BytesIO()
    picture.save(content, "PNG")
    answer = call(server, "POST", "/api/pictures", content.getvalue(), Content_Type="application/octet-stream")
    return str(answer.json["id"])


def events(server: PageServer, job: str, last: str = "") -> list[tuple[str, Any]]:
    """All that is told of a job until it is over."""
    text = call(server, "GET", f"/api/jobs/{job}/events", Last_Event_ID=last).body.decode()
    return [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)]


def fill(page: Any, **fields: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def wait_for_text(page: Any, where: str, text: str) -> None:
    page.locator(where, has_text=text).wait_for()


def too_wide(page: Any) -> list[str]:
    """The elements beyond the right edge of the window; there are none when the page cannot be scrolled sideways."""
    return page.evaluate("""() => {
        const {scrollWidth, clientWidth} = document.documentElement;
        const wide = [...document.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > clientWidth);
        return scrollWidth > clientWidth ? wide.map(element => element.outerHTML.slice(0, 200)) : [];
    }""")

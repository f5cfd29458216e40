"""The page in a browser, on a tiny cascade that has all stages; and its server without one."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cascadekit.cli import main
from cascadekit.runtime.batch.generate_requests import generate_requests
from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.images.png import read_settings, save_png
from cascadekit.runtime.sampling.controlnets import ControlPicture
from cascadekit.runtime.ui.http_server import PageServer
from cascadekit.runtime.ui.page_server import page_server
from cascadekit.schemas.request import parse_request
from cascadekit.schemas.stages import Stage
from helpers.whole import Whole, picture

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)
QUICK = {"width": 64, "height": 64, "prior_steps": 3, "decoder_steps": 2}
ID = "0" * 64


@pytest.fixture(scope="module")
def cascade(whole: Whole) -> Iterator[Cascade]:
    with Cascade.open(whole.bundle, threads=1) as opened:
        yield opened


@contextmanager
def serving(cascade: Cascade, output: Path, **more: Any) -> Iterator[PageServer]:
    with page_server(cascade, output, name="tiny", port=0, **more) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def served(cascade: Cascade, tmp_path: Path) -> Iterator[PageServer]:
    with serving(cascade, tmp_path / "images") as server:
        yield server


@dataclass
class Gate:
    """Holds the cascade at one of the prior's previews, the first or a later one, until it is let through."""

    previews_before: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)


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


# Without a browser.


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


def events(server: PageServer, job: str, last: str = "") -> list[tuple[str, Any]]:
    """All that is told of a job until it is over."""
    text = call(server, "GET", f"/api/jobs/{job}/events", Last_Event_ID=last).body.decode()
    return [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)]


def test_a_job_over_http(served: PageServer, cascade: Cascade, tmp_path: Path) -> None:
    """Two images with seeds that follow each other are those that the library draws one by one."""
    request = {
        "prompt": "a cat",
        "negative": "a dog",
        "seed": str(2**64 - 3),
        "images": 2,
        "previews": ["prior"],
        **QUICK,
    }
    submitted = call(served, "POST", "/api/jobs", request)
    assert submitted.status == 201
    assert submitted.json["steps"] == {"prior": 3, "decoder": 2}
    told = events(served, submitted.json["id"])
    assert told[-1][0] == "done"
    assert dict(told)["step"] | {"elapsed": 0} == {
        "stage": "decoder", "index": 2, "steps": 2, "first": 1, "last": 2, "of": 2, "elapsed": 0,
    }  # fmt: skip
    assert [image["settings"]["seed"] for image in told[-1][1]["images"]] == [str(2**64 - 3), str(2**64 - 2)]
    for number in range(2):
        drawn = cascade.generate("a cat", negative="a dog", seed=2**64 - 3 + number, **QUICK).images[0]
        served_file = call(served, "GET", f"/images/{number:04d}.png")
        assert served_file.headers["Content-Type"] == "image/png"
        assert served_file.body == (tmp_path / "images" / f"{number:04d}.png").read_bytes()
        assert (
            np.abs(np.asarray(Image.open(tmp_path / "images" / f"{number:04d}.png"), int) - np.asarray(drawn)).max()
            <= 1
        )
    newest = call(served, "GET", "/api/images?count=1").json
    assert (newest["images"][0]["name"], newest["more"]) == ("0001.png", True)
    assert [name for name, _ in events(served, submitted.json["id"], "999")] == []
    assert call(served, "GET", "/api/jobs").json == {"jobs": []}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"width": 100}, "width 100: expected a multiple of 8"),
        ({"width": 16384, "height": 64}, "expected 1 to 8192"),
        ({"prior_steps": 0}, "prior_steps 0: expected 1 to 1000"),
        ({"decoder_steps": 10**9}, "decoder_steps"),
        ({"prior_guidance": "nan"}, "prior_guidance: Input should be a finite number"),
        ({"strength": 1e999}, "not a JSON object"),
        ({"width": 10**400}, "width a number of hundreds of digits: expected 1 to 8192"),
        ({"images": 10**400}, "images a number of hundreds of digits: expected 1 to 64"),
        ({"prior_guidance": 1e30}, "prior_guidance 1e+30: expected -1000 to 1000"),
        ({"prior_timesteps": ["1", "inf"]}, "prior_timesteps.1: Input should be a finite number"),
        ({"sampler": "euler"}, "sampler 'euler': expected ddpm-wuerstchen or gdf"),
        ({"speed": 2}, "speed: unknown"),
        ({"prompt": ["a"]}, "prompt: Input should be a valid string"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 2**64 - 1, "images": 2}, "too large for 2 images"),
        ({"images": 0}, "images 0: expected 1 to 64"),
        ({"images": 2, "index": 1, "batch": 4}, "leave them out"),
        ({"previews": ["vqgan"]}, "expected prior and decoder"),
        ({"previews": "prior"}, "expected a list"),
        ({"loras": [{"name": "x"}]}, "--lora"),
        ({"init_image": "/etc/passwd"}, "is not on this server"),
        ({"init_image": {"path": "/etc/passwd"}}, "is not on this server"),
        ({"init_image": ID}, "is not on this server"),
        ({"image_prompts": [ID]}, "is not on this server"),
        ({"controls": [{"name": "canny", "picture": ID}]}, "is not on this server"),
        ({"controls": [{"name": "identity", "picture": ID}]}, "control 'identity': expected one of canny"),
        ({"controls": [{"name": "canny", "picture": [ID]}]}, "is not on this server"),
        ({"init_image": [[ID]]}, "is not on this server"),
        ({"prior_timesteps": [1 - number / 2000 for number in range(1002)]}, "timesteps: expected at most 1001"),
        ({"controls": ["canny=/etc/passwd"]}, "expected each as"),
    ],
)
def test_requests_that_are_refused_in_words(served: PageServer, request_: dict[str, Any], words: str) -> None:
    answer = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK, **request_})
    assert answer.status == 400
    assert words in answer.json["error"]
    assert call(served, "GET", "/api/jobs").json == {"jobs": []}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff", b'{"seed": NaN}', b"[" * 200_000])
def test_what_is_no_json_object(served: PageServer, body: bytes) -> None:
    assert call(served, "POST", "/api/jobs", body).status == 400


def test_only_the_images_of_the_folder(served: PageServer, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    shutil.copy(tmp_path / "secret.png", folder / ".hidden.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "damaged.png").write_bytes(b"no png")
    names = "../secret.png ..%2fsecret.png %2e%2e/secret.png ..%5csecret.png .hidden.png link.png x%00.png none.png"
    for name in names.split():
        assert call(served, "GET", f"/images/{name}").status == 404, name
    assert call(served, "GET", "/api/images").json == {"images": [], "more": False}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404), ("GET", "//etc/passwd", 404), ("GET", "/api/jobs/0/events", 404),
        ("POST", "/api/jobs/0/cancel", 404), ("GET", f"/api/pictures/{ID}", 404), ("GET", "/api/images?count=-1", 400),
        ("POST", "/api/images", 405), ("DELETE", "/images/0000.png", 405), ("GET", "/api/pictures", 405),
        ("OPTIONS", "/api/jobs", 405), ("BREW", "/", 501),
    ],
)  # fmt: skip
def test_routes_that_are_none(served: PageServer, method: str, path: str, status: int) -> None:
    assert call(served, method, path).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example:7860"}, 403),
        ({"Host": "[evil"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Length": "x"}, 400),
        ({"Content-Length": "", "Transfer-Encoding": "chunked"}, 411),
        ({"Host": "localhost:1234", "Origin": "http://localhost:1234"}, 400),  # through a tunnel; {} has no prompt
        ({"Host": "[::1]:1234"}, 400),
    ],
)
def test_who_may_ask(served: PageServer, headers: dict[str, str], status: int) -> None:
    assert call(served, "POST", "/api/jobs", {}, **headers).status == status


def test_bodies_have_limits(served: PageServer) -> None:
    assert call(served, "POST", "/api/jobs", b" " * (256 << 10) + b"{}").status == 413
    picture = {"Content-Type": "application/octet-stream"}
    answer = call(served, "POST", "/api/pictures", bytes((32 << 20) + 1), **picture)
    assert (answer.status, answer.json["error"]) == (413, "too large: expected at most 32 MB")
    assert (
        call(
            served, "POST", "/api/pictures", b"", Content_Type=picture["Content-Type"], Content_Length=str(10**17)
        ).status
        == 413
    )
    assert "not a picture" in call(served, "POST", "/api/pictures", b"<svg/>", **picture).json["error"]


def test_the_page_allows_nothing_from_elsewhere(served: PageServer) -> None:
    answer = call(served, "GET", "/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", answer.body)


def test_what_should_not_happen_is_told_without_its_traceback(
    served: PageServer, cascade: Cascade, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(cascade, "encode_prompt", broken)
        job = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK}).json["id"]
        name, data = events(served, job)[-1]
        assert (name, data["message"]) == (
            "error",
            "an unexpected error (KeyError); see the terminal",
        )
        patch.setattr("cascadekit.runtime.ui.routes.describe", broken)
        answer = call(served, "GET", "/api/info")
        assert (answer.status, "secret" in answer.json["error"]) == (500, False)
    assert capfd.readouterr().err.count("KeyError: 'secret'") == 2
    job = call(served, "POST", "/api/jobs", {"prompt": "x", **QUICK}).json["id"]  # and it goes on
    assert events(served, job)[-1][0] == "done"


def test_image_prompts_controls_and_loras(cascade: Cascade, tmp_path: Path) -> None:
    """Pictures and LoRAs are in the metadata as the command line would have put them there, LoRAs as they were merged
    when the page was started; and the image is the library's."""
    pictures = [picture(60, 40), picture(40, 60, seed=1)]
    with serving(cascade, tmp_path / "images", loras=[("style.safetensors", 0.8)]) as server:
        ids = []
        for number, each in enumerate(pictures):
            each.save(tmp_path / f"{number}.png")
            content = (tmp_path / f"{number}.png").read_bytes()
            ids.append(
                call(server, "POST", "/api/pictures", content, Content_Type="application/octet-stream").json["id"]
            )
            assert ids[-1] == sha256(content).hexdigest()
        control = {"name": "edges", "picture": ids[0], "strength": "0.5"}
        request = {"prompt": "x", "seed": 5, "image_prompts": ids, "controls": [control], **QUICK}
        told = events(server, call(server, "POST", "/api/jobs", request).json["id"])
    assert told[-1][0] == "done", told
    kept = [{"path": str(tmp_path / "images" / "pictures" / each), "sha256": each} for each in ids]
    settings = read_settings(tmp_path / "images" / "0000.png")
    assert settings is not None
    assert settings["image_prompts"] == kept
    assert settings["controls"] == [{**kept[0], "name": "edges", "strength": 0.5}]
    assert settings["loras"] == [{"name": "style.safetensors", "strength": 0.8}]
    shown = told[-1][1]["images"][0]["settings"]
    assert shown["controls"] == [{"name": "edges", "strength": 0.5, "picture": ids[0], "file": ids[0]}]
    drawn = cascade.generate(
        "x", seed=5, image_prompts=pictures, controls=[ControlPicture("edges", pictures[0], 0.5)], **QUICK
    )
    assert Image.open(tmp_path / "images" / "0000.png").tobytes() == drawn.images[0].tobytes()


def test_cancelling_a_job_that_runs_and_one_that_waits(served: PageServer, gate: Gate, tmp_path: Path) -> None:
    first, second, third = (
        call(served, "POST", "/api/jobs", {"prompt": name, "previews": ["prior"], **QUICK}).json["id"] for name in "abc"
    )
    assert gate.reached.wait(30)
    assert [job["id"] for job in call(served, "GET", "/api/jobs").json["jobs"]] == [first, second, third]
    assert call(served, "POST", f"/api/jobs/{second}/cancel", {}).status == 200
    assert events(served, second) == [("queued", {"ahead": 1}), ("cancelled", {"images": []})]
    call(served, "POST", f"/api/jobs/{first}/cancel", {})
    gate.opened.set()
    told = events(served, first)
    assert told[-1] == ("cancelled", {"images": []})
    assert dict(told)["step"]["index"] == 1
    assert events(served, third)[-1][0] == "done"
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--port", "{taken}"], "give another --port"), (["-o", "{file}", "--port", "0"], "expected a folder")],
)
def test_the_command_refuses(served: PageServer, tiny: Path, tmp_path: Path, options: list[str], words: str) -> None:
    (tmp_path / "file").touch()
    known = {"taken": str(served.server_address[1]), "file": str(tmp_path / "file")}
    arguments = ["ui", str(tiny / "bundle"), *(option.format(**known) for option in options)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 2
    assert words in result.output


def test_the_command_without_torch_and_onnx_ends_on_a_signal(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'diffusers', 'transformers']));"
        "from cascadekit.cli import main; main()"
    )
    arguments = ["ui", str(tiny / "bundle"), "--port", "0", "-o", str(tmp_path), "--engine", "onnxruntime"]
    program = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    with program:
        url = program.stdout.readline().split()[0]
        info = json.load(urllib.request.urlopen(f"{url}/api/info"))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 0
    assert info["features"] == {
        "image_prompts": False, "init_image": False, "mask": False, "controls": [], "previews": ["decoder"],
    }  # fmt: skip


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


Visit = Callable[..., Any]


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
        page.wait_for_selector("#draw:enabled")
        hosts.discard(urlsplit(server.url).netloc)
        return page

    yield open_page
    hosts_seen = {host for host in hosts if not host.startswith("127.0.0.1:")} - {""}  # "": data URLs
    for context in contexts:
        context.close()
    assert not hosts_seen
    # Chromium reports a refused request in its own words.
    assert [text for text in complaints if "status of 400" not in text] == []


def fill(page: Any, **fields: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def wait_for_text(page: Any, where: str, text: str) -> None:
    page.locator(where, has_text=text).wait_for()


def too_wide(page: Any) -> list[str]:
    """What reaches beyond the right edge of the window; nothing does when the page cannot be scrolled sideways."""
    return page.evaluate("""() => {
        const {scrollWidth, clientWidth} = document.documentElement;
        const wide = [...document.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > clientWidth);
        return scrollWidth > clientWidth ? wide.map(element => element.outerHTML.slice(0, 200)) : [];
    }""")


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_drawing(
    served: PageServer,
    visit: Visit,
    gate: Gate,
    cascade: Cascade,
    tmp_path: Path,
    size: tuple[int, int],
    scheme: str,
) -> None:
    page = visit(served, size, color_scheme=scheme)
    assert page.is_visible("#nothing")
    fill(page, prompt="a <b>cat</b>", seed=2**64 - 1, **QUICK)
    page.keyboard.press("Control+Enter")
    wait_for_text(page, "#steps", "prior 1 of 3 · decoder 0 of 2")
    assert page.get_attribute("#track", "aria-valuenow") == "1"
    assert page.inner_text("#draw-name") == "Add to the queue"
    assert page.title() == "1/5 · cascadekit"
    gate.opened.set()
    page.wait_for_selector("#shown button img")
    page.wait_for_selector("#grid button")
    assert page.inner_text("#phase").startswith("Drawn in 0:")
    assert page.evaluate("document.querySelector('#shown img').naturalWidth") == 64
    assert too_wide(page) == []
    path = tmp_path / "images" / "0000.png"
    settings = read_settings(path)
    assert settings is not None
    assert settings.items() >= {"prompt": "a <b>cat</b>", "seed": 2**64 - 1, **QUICK}.items()
    if size == DESKTOP:
        bundle = cascade.engine.bundle.root  # type: ignore[attr-defined]
        arguments = ["generate", bundle, "--like", path, "-o", tmp_path / "again.png", "--engine", "onnxruntime"]
        redrawn = CliRunner().invoke(main, [*map(str, arguments), "--threads", "1"])
        assert redrawn.exit_code == 0, redrawn.output
        assert Image.open(path).tobytes() == Image.open(tmp_path / "again.png").tobytes()


def test_previews_cancel_and_queue(served: PageServer, visit: Visit, gate: Gate, tmp_path: Path) -> None:
    page = visit(served)
    fill(page, prompt="first", **QUICK)
    page.click("#draw")
    assert gate.reached.wait(30)
    fill(page, prompt="second")
    page.click("#draw")
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
    assert page.inner_text("#draw-name") == "Draw"
    assert not (tmp_path / "images").exists()
    gate.opened.clear()
    gate.previews_before = 1
    page.click("#draw")
    page.wait_for_selector("#shown .draft")
    assert page.inner_text("#steps") == "prior 2 of 3 · decoder 0 of 2"
    assert page.get_attribute("#shown .draft", "src").startswith("data:image/jpeg;base64,")
    gate.opened.set()
    page.wait_for_selector("#shown button")
    assert page.locator("#shown .draft").count() == 0


def test_errors_in_words(served: PageServer, visit: Visit) -> None:
    page = visit(served, PHONE)
    fill(page, prompt="x", **{**QUICK, "height": 100})
    page.click("#draw")
    wait_for_text(page, "#error", "Height 100: expected a multiple of 8, at least 64; the nearest is 96")
    assert page.get_attribute("#height", "aria-invalid") == "true"
    assert page.get_attribute("#width", "aria-invalid") is None
    assert too_wide(page) == []
    fill(page, **QUICK, prior_timesteps="0.5, 0.7")  # found out while drawing
    page.click("#draw")
    wait_for_text(page, "#error", "Timesteps 0.5, 0.7: expected two or more that fall")
    fill(page, prior_timesteps="")
    page.click("#draw")
    page.wait_for_selector("#shown button")
    assert page.is_hidden("#error")


def test_settings_come_back_from_the_gallery(
    served: PageServer, visit: Visit, cascade: Cascade, tmp_path: Path
) -> None:
    """An image that the command line drew, third of a batch, with settings unlike the defaults."""
    folder, settings = tmp_path / "images", {
        "prior_guidance": 3.5, "decoder_guidance": 1.25, "sampler": "gdf", "prior_shift": 1.75, "rescale": 0.6,
        "decoder_timesteps": (1.0, 0.3, 0.0), "weighted": True, **{**QUICK, "width": 72},
    }  # fmt: skip
    result = cascade.generate("a (cat:1.3)", negative="dogs", num_images=3, seed=7, **settings)
    for number, image in enumerate(result.images):
        save_png(folder / f"{number:04d}.png", image, result.settings[number])
    page = visit(served)
    page.wait_for_selector("#grid button >> nth=2")  # the gallery is asked for after the page has loaded
    assert page.locator("#grid button").count() == 3
    page.click("#grid button >> nth=0")
    assert page.inner_text("#viewer-name") == "0002.png"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-name") == "0001.png"
    page.keyboard.press("ArrowLeft")
    assert "image 3 of 3" in page.inner_text("#viewer-settings")
    assert (page.get_attribute("#download", "download"), page.locator("#download").get_attribute("href")[:16]) == (
        "0002.png", "/images/0002.png",
    )  # fmt: skip
    page.click("#use")
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
    page.click("#draw")
    page.wait_for_selector("#shown button")
    drawn = read_settings(folder / "0003.png")
    assert drawn == read_settings(folder / "0002.png")
    assert np.abs(np.asarray(Image.open(folder / "0003.png"), int) - np.asarray(result.images[2])).max() <= 1
    page.click("#dice")  # another seed is no place in that batch
    assert page.is_hidden("#place")
    assert page.input_value("#seed").isdecimal()
    page.select_option("#sampler", "ddpm-wuerstchen")
    assert page.is_hidden("#prior_shift")
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.inner_text("#settings-count") == ""


def test_pictures(served: PageServer, visit: Visit, cascade: Cascade, tmp_path: Path) -> None:
    """A start picture and a mask: kept beside the image under their hashes, so that it can be drawn again."""
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
    page.click("#draw")
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
    page.click("#grid button >> nth=0")
    page.click("#use")
    page.wait_for_function("() => document.querySelectorAll('.items img').length === 2")
    assert page.input_value("#strength") == "0.6"
    page.click("#shown button")
    page.click("#vary")
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
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert seen >= {"negative", "width", "height", "shape", "seed", "dice", "images", "prior_steps", "sampler", "draw"}


def test_a_bundle_without_a_previewer_says_so(tiny: Path, visit: Visit, tmp_path: Path) -> None:
    with Cascade.open(tiny / "bundle", threads=1) as cascade, serving(cascade, tmp_path / "images") as server:
        page = visit(server)
        fill(page, prompt="word " * 90, **QUICK)
        assert page.is_disabled("#preview_prior")
        assert "no previewer" in page.inner_text("#groups")
        assert "follows words only" in page.inner_text("#zones")
        page.click("#draw")
        page.wait_for_selector("#shown button")
        assert "CLIP reads 77 tokens" in page.inner_text("#notes")
        answer = call(server, "POST", "/api/jobs", {"prompt": "x", "image_prompts": [ID]})
        assert answer.json["error"].startswith("image_prompts: the bundle lacks the stages for it")

"""The page among odd files and odd clients: the gallery lists what is sound, the server goes on answering."""

import http.client
import json
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from cascadekit.runtime.images.png import read_settings, save_png
from cascadekit.runtime.ui import http_server as server_module
from cascadekit.runtime.ui.gallery import Gallery
from cascadekit.runtime.ui.http_messages import Call, Reply, Route, json_reply
from cascadekit.runtime.ui.http_server import PageServer
from cascadekit.runtime.ui.routes import ROUTES
from cascadekit.runtime.ui.uploads import Uploads
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.limits import MAX_BODIES, MAX_HEAD, MAX_SETTINGS
from helpers.pngs import BEGINS, chunk, itxt, packed_itxt, plain, png, ztxt

SOUND = {"prompt": "a cat", "seed": 2**64 - 1, "width": 64, "height": 64, "prior_guidance": 4.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sound images, one of them as save_png writes it; odd ones come beside them."""
    images = tmp_path / "images"
    save_png(images / "0000.png", Image.new("RGB", (64, 48)), SOUND)
    (images / "0001.png").write_bytes(png(itxt(json.dumps(SOUND).encode())))
    return images


def listed(folder: Path) -> dict[str, Any]:
    """The gallery as a browser reads it, by name."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    images, more = Gallery(folder, Uploads(folder, folder / "kept")).newest(48)
    read = json.loads(json_reply({"images": images}).body, parse_constant=refuse)
    assert not more
    json.dumps(read, ensure_ascii=False).encode()  # no halves of surrogate pairs either
    return {image["name"]: image for image in read["images"]}


# --- Settings


@pytest.mark.parametrize(
    ("settings", "sound", "odd"),
    [
        (b'{"prior_guidance":NaN}', {}, ["prior_guidance"]),
        (b'{"prior_guidance":1e999,"prompt":"x"}', {"prompt": "x"}, ["prior_guidance"]),
        (b'{"init_image":' + b"[" * 900 + b"]" * 900 + b"}", {}, ["init_image"]),
        (b'{"width":1' + b"0" * 400 + b',"height":64}', {"height": 64}, ["width"]),
        (b'{"prompt":"\\ud800","negative":"\\udc00x"}', {}, ["prompt", "negative"]),
        (b'{"prompt":["x"],"seed":{},"loras":7,"controls":"x","weighted":"maybe"}', {},
         ["prompt", "seed", "loras", "controls", "weighted"]),
        (b'{"depth":{"of":["a","newer","version"]},"prompt":"x"}', {"prompt": "x"}, ["depth"]),
        (b'{"image_prompts":[{"path":"a.png"},null]}', {}, ["image_prompts"]),
        (b'{"vqgan_scale":-Infinity,"engine":[],"created_by":"\\ud800","key":1}', {},
         ["vqgan_scale", "engine", "created_by", "key"]),
        (b'{"seed":-5,"index":3,"batch":4}', {"seed": "-5", "index": 3, "batch": 4}, []),
        (b'{"' + b"x" * 100_000 + b'":1}', {}, ["x" * 60]),
        (b'{"\\ud800":1}', {}, ["?"]),
        (b'{"prompt":"' + b"x" * 100_000 + b'"}', {}, ["prompt"]),
        (json.dumps({f"new{n}": n for n in range(50_000)}).encode(), {},
         [*(f"new{n}" for n in range(20)), "and 49980 more"]),
    ],
)  # fmt: skip
def test_odd_settings_are_named_and_the_rest_is_shown(
    folder: Path, settings: bytes, sound: dict[str, Any], odd: list[str]
) -> None:
    (folder / "odd.png").write_bytes(png(itxt(settings)))
    found = listed(folder)
    assert found.keys() == {"0000.png", "0001.png", "odd.png"}
    assert found["odd.png"]["settings"] == sound
    assert found["odd.png"]["odd"] == odd
    assert found["0000.png"]["settings"] == {**SOUND, "seed": str(2**64 - 1)}
    assert found["0000.png"]["odd"] == []


BOMB = b'{"prompt":"' + b"x" * (40 << 20) + b'"}'
HOLE = png()[:33] + struct.pack(">I4s", 2**31 - 1, b"iTXt") + b"cascadekit\0\0\0\0\0"


@pytest.mark.parametrize(
    "content",
    [
        b"", BEGINS, b"no png", b"\xff\xd8\xff\xe0 JFIF",
        png(), png(itxt(b"")), png(itxt(b"[1]")), png(itxt(b"7")), png(itxt(b"{")), png(itxt(b"\xff")),
        png(itxt(b"[" * 100_000)), png(itxt(b'{"a":' * 100_000)), png(itxt(b'{"seed":' + b"9" * 5000 + b"}")),
        png(itxt(b"{}"), width=0), png(itxt(b"{}"), width=2**31 - 1, height=2**31 - 1),
        png(itxt(b"{}"))[:-1], png(itxt(b"{}"))[:60], png(itxt(b"{}")) + b"more",
        png(itxt(b"{}").replace(b"{}", b"[]")),
        png(chunk(b"iTXt", b"cascadekit\0")), png(chunk(b"zTXt", b"cascadekit\0")),
        png(chunk(b"iTXt", b"cascadekit\0\1\0\0\0no zlib")), BEGINS + chunk(b"IHDR", b"") + itxt(b"{}"),
        png(*[chunk(b"teSt", b"")] * 5000, itxt(b"{}")), HOLE,
    ],
    ids=range(25),
)  # fmt: skip
def test_what_is_no_image_of_ours_is_left_out(folder: Path, content: bytes) -> None:
    (folder / "odd.png").write_bytes(content)
    assert listed(folder).keys() == {"0000.png", "0001.png"}


@pytest.mark.parametrize("pack", [packed_itxt, ztxt])
def test_a_text_that_unpacks_to_far_more_than_a_prompt(folder: Path, pack: Callable[[bytes], bytes]) -> None:
    (folder / "odd.png").write_bytes(png(pack(BOMB)))
    tracemalloc.start()
    assert listed(folder).keys() == {"0000.png", "0001.png"}
    assert tracemalloc.get_traced_memory()[1] < 5 * MAX_SETTINGS
    tracemalloc.stop()


def test_a_chunk_of_two_gigabytes_that_is_a_hole(folder: Path) -> None:
    (folder / "odd.png").write_bytes(HOLE)
    os.truncate(folder / "odd.png", 2**31 + 100)
    tracemalloc.start()
    assert listed(folder).keys() == {"0000.png", "0001.png"}
    assert tracemalloc.get_traced_memory()[1] < 5 * MAX_SETTINGS
    tracemalloc.stop()


@pytest.mark.parametrize("pack", [itxt, packed_itxt, ztxt, plain])
def test_every_kind_of_text_is_read_as_pillow_reads_it(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """The last of several; other keywords and what comes after the pixels say nothing."""
    path, texts = tmp_path / "x.png", [json.dumps({"prompt": text}).encode() for text in "abc"]
    path.write_bytes(png(pack(texts[0]), pack(texts[1]), pack(texts[2], b"other")))
    with Image.open(path) as picture:
        assert read_settings(path) == json.loads(picture.info["cascadekit"]) == {"prompt": "b"}


# --- Names

NAMES = ["a b.png", "a#b.png", "a?b=c&d.png", "100%.png", "%41.png", "ümlaut 猫.png", 'a"<b>.png', "a\\b.png", 
         "a\nb.png", "a+b;c.png"]  # fmt: skip


@pytest.mark.parametrize("name", [*(os.fsencode(name) for name in NAMES), b"\xff\xfe.png", b"\xc3.png"])
def test_names_are_quoted_and_lead_to_their_image(folder: Path, name: bytes) -> None:
    path = Path(os.fsdecode(name))
    (folder / path).write_bytes(content := png(itxt(b'{"prompt":"it"}')))
    (image,) = (each for each in listed(folder).values() if each["settings"]["prompt"] == "it")
    assert image["name"] == name.decode("utf-8", "replace")
    target = urlsplit(image["url"])
    assert (target.fragment, unquote(target.path, errors="surrogateescape")) == ("", f"/images/{path}")
    with serving(*image_routes(folder)) as server:
        reply = get(server, image["url"])
        assert (reply.status, reply.read()) == (200, content)


def image_routes(folder: Path) -> tuple[list[Route], Any]:
    class Only:
        gallery = Gallery(folder, Uploads(folder, folder / "kept"))

    return [route for route in ROUTES if "images" in route.pattern], Only()


def test_what_vanishes_or_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")
    assert listed(folder).keys() == {"0000.png", "0001.png"}
    gallery = Gallery(folder, Uploads(folder, folder / "kept"))
    known = list(gallery._files())
    monkeypatch.setattr(gallery, "_files", lambda: iter([*known, ("gone.png", 7)]))
    assert len(gallery.newest(48)[0]) == 2
    (folder / "file").write_text("")
    broken = Gallery(folder / "later", Uploads(folder, folder))
    (folder / "later").write_text("no folder")
    with pytest.raises(UsageError, match="cannot be listed"):
        broken.newest(48)


# --- Clients


@contextmanager
def serving(routes: list[Route], app: Any = None) -> Iterator[PageServer]:
    with PageServer("127.0.0.1", 0, routes, app) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _echo(app: Any, call: Call) -> Reply:
    return json_reply({"bytes": len(call.body)})


@pytest.fixture
def served() -> Iterator[PageServer]:
    echo = Route("POST", r"/echo", _echo, MAX_BODIES, ("application/json",))
    with serving([Route("GET", r"/[^/]*", _echo), echo]) as server:
        yield server


def get(server: PageServer, target: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request("GET", target)
    return connection.getresponse()


def connected(server: PageServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30)


def answer(server: PageServer, request: bytes) -> tuple[int, Any]:
    """Status and JSON of the reply to what is sent as it is."""
    with connected(server) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        reply = http.client.HTTPResponse(client)
        reply.begin()
        return reply.status, json.loads(reply.read())


HOST = b"Host: localhost\r\n"
JSON = HOST + b"Content-Type: application/json\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + JSON


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET http://[::1 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET http://[x]:y/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        ("GET http://\u2100/ HTTP/1.1\r\n".encode() + HOST + b"\r\n", 200),  # bytes of Latin-1, to Python
        (b"GET /?" + b"&".join(b"a%d=1" % n for n in range(99)) + b" HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /%00%ff%zz HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: \xff\xfe\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 403),
        (b"GET /\r\n", 400),  # HTTP/0.9
        (b"GET /\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),  # TLS
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"GET / SPDY/1.1\r\n\r\n", 400),
        (b"G\xcbT / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + HOST + (b"X: " + b"y" * 10_000 + b"\r\n") * 50 + b"\r\n", 431),
        (POST + b"Content-Length: 2\r\n\r\n{}", 200),
        (POST + b"\r\n{}", 200),  # no length: no body
        (POST + b"Content-Length: -1\r\n\r\n{}", 400),
        (POST + b"Content-Length: +2\r\n\r\n{}", 400),
        (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400),
        (POST + b"Content-Length: \xb2\r\n\r\n{}", 400),
        (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
        (POST + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n{}", 400),
        (POST + b"Content-Length: " + b"9" * 18 + b"\r\n\r\n{}", 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
        (POST + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}", 411),
    ],
    ids=range(36),
)
def test_odd_requests_are_answered(
    served: PageServer, capfd: pytest.CaptureFixture[str], request_: bytes, status: int
) -> None:
    found, said = answer(served, request_)
    assert found == status
    assert set(said) == ({"bytes"} if status == 200 else {"error"})
    assert get(served, "/").status == 200
    assert capfd.readouterr().err == ""


def test_no_more_is_read_of_a_head_than_it_may_have(served: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line without end, and headers without one: refused while the client still sends."""
    monkeypatch.setattr(server_module, "LINGER", 0.1)
    for begins in (b"GET /", b"GET / HTTP/1.1\r\nX: "):
        with connected(served) as client:
            client.sendall(begins + b"x" * (MAX_HEAD + 2))
            assert client.recv(100).split()[1] in (b"414", b"431")


def test_two_hundred_callers_at_once(served: PageServer) -> None:
    """The server is held up for a moment, as by a step that is being computed; nobody is lost, nobody waits long."""
    gate, seconds = threading.Event(), []
    monkey, served.service_actions = served.service_actions, lambda: gate.wait(10) and None  # type: ignore[method-assign]

    def one() -> None:
        began = time.monotonic()
        if get(served, "/").status == 200:
            seconds.append(time.monotonic() - began)

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    gate.set()
    served.service_actions = monkey  # type: ignore[method-assign]
    for thread in threads:
        thread.join()
    assert len(seconds) == 200
    assert max(seconds) < 10


def test_slow_clients_keep_nobody_waiting_and_are_hung_up_on(
    served: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then resets no clock."""
    monkeypatch.setattr(server_module, "PATIENCE", 1.0)
    slow = [connected(served) for _ in range(20)]
    begun = (b"GET / HTTP/1.1\r\nX: ", POST + b"Content-Length: 100\r\n\r\n", b"", b"G")
    for number, client in enumerate(slow):
        client.sendall(begun[number % len(begun)])
    assert get(served, "/").status == 200
    until = time.monotonic() + 10
    left = set(slow)
    while left and time.monotonic() < until:
        time.sleep(0.1)
        for client in list(left):
            try:
                client.sendall(b" ")
                client.setblocking(False)
                if client.recv(1) == b"":
                    left.remove(client)
            except BlockingIOError:
                client.setblocking(True)
            except OSError:
                left.remove(client)
    assert not left
    for client in slow:
        client.close()


def test_connections_beyond_the_bound_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 3)
    with serving([Route("GET", r"/", _echo)]) as server:
        held = [connected(server) for _ in range(3)]
        for client in held:
            client.sendall(b"GET / HTTP/1.1\r\n")
        assert wait_for(lambda: answer(server, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 503)
        for client in held:
            client.close()
        assert wait_for(lambda: get(server, "/").status == 200)


def wait_for(fact: Callable[[], bool], seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while not (found := fact()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def test_bodies_together_have_a_bound(served: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_BODIES", 1000)
    with connected(served) as slow:
        slow.sendall(POST + b"Content-Length: 900\r\n\r\n")
        request = POST + b"Content-Length: 200\r\n\r\n" + b" " * 200
        assert wait_for(lambda: answer(served, request)[0] == 503)
    assert wait_for(lambda: answer(served, request) == (200, {"bytes": 200}))


def test_an_image_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(itxt(b"{}")))
    os.truncate(tmp_path / "x.png", 1 << 26)
    routes, app = image_routes(tmp_path)
    tracemalloc.start()
    with serving(routes, app) as server:
        reply, length = get(server, "/images/x.png"), 0
        assert reply.headers["Content-Length"] == str(1 << 26)
        while piece := reply.read(1 << 16):
            length += len(piece)
    assert length == 1 << 26
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_pictures_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    pictures = Uploads(tmp_path / "scratch", tmp_path / "kept")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    found = pictures.add((tmp_path / "x.png").read_bytes())
    at_once, most = [0], [0]

    def slow(path: Path) -> Image.Image:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        at_once[0] -= 1
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("cascadekit.runtime.ui.uploads.open_picture", slow)
    threads = [threading.Thread(target=pictures.shown, args=(found,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_reply_that_no_browser_could_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_reply({"guidance": float("nan")})

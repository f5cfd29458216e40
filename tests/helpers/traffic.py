"""Mixed calls of the images API over plain sockets: good, slow, malformed, oversized, and left in the middle.

Every call checks its own answer. The answer to a good call must be the file of a run without the server, byte for byte.
"""

import base64
import contextlib
import http.client
import io
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cascadekit import Cascade
from cascadekit.runtime.images.png import image_bytes
from cascadekit.runtime.serve.guard import MOST_BODY, MOST_JSON
from cascadekit.runtime.serve.images_api import EDITS, GENERATIONS

PROMPTS = ("a red circle", "ein Fuchs, flächig", "a blue star")
SEEDS = (5, 1 << 40)  # of the first image of a call; each call has up to two
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
PATIENCE = 120  # seconds for an answer: the machine may have better things to do
EDIT = {"prompt": "a green star", "seed": 9, "size": "64x64", "prior_steps": 2, "decoder_steps": 1}
BOUNDARY = "b0undary"


@dataclass(frozen=True)
class Wanted:
    """A call, and the files of its images by format."""

    fields: Mapping[str, Any]
    files: Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class Expected:
    """The files that a run without the server generates."""

    calls: Sequence[Wanted]
    picture: bytes  # that edits upload
    edited: np.ndarray[Any, Any]  # the pixels of the call EDIT


def expected(cascade: Cascade) -> Expected:
    """Generate the images of all good calls, each image alone."""
    calls = []
    for prompt in PROMPTS:
        for width, height in ((64, 64), (96, 64)):
            for seed in SEEDS:
                size = {"width": width, "height": height, "prior_steps": 2, "decoder_steps": 1}
                results = [cascade.generate(prompt, seed=seed + n, **size) for n in range(2)]
                fields = {"prompt": prompt, "seed": seed, "size": f"{width}x{height}"}
                files = {
                    kind: [_file(suffix, each.images[0], each.settings[0]) for each in results]
                    for kind, suffix in SUFFIXES.items()
                }
                calls.append(Wanted({**fields, "prior_steps": 2, "decoder_steps": 1}, files))
    picture = Image.new("RGB", (64, 64), "green")
    more = {"seed": 9, "width": 64, "height": 64, "prior_steps": 2, "decoder_steps": 1}
    edited = cascade.generate("a green star", init_image=picture, **more).images[0]
    return Expected(calls, _file(".png", picture, {}), np.asarray(edited))


def _file(suffix: str, image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    return image_bytes(Path(f"image{suffix}"), image, settings)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def message(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> bytes:
    """A request as bytes; an empty header is left out."""
    names = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body))}
    names |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in names.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def form(fields: Mapping[str, Any], files: Sequence[tuple[str, bytes]]) -> bytes:
    """A body of multipart/form-data."""
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts += [f'name="{name}"; filename="{name}.png"\r\n\r\n'.encode() + data for name, data in files]
    begin = f"--{BOUNDARY}\r\nContent-Disposition: form-data; ".encode()
    return b"".join(begin + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


@dataclass
class Traffic:
    """Calls of the server at `port`. `done` counts the good ones by kind; `failures` describes the others."""

    port: int
    expected: Expected
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    images: int = 0  # that good calls received
    refused: int = 0  # good calls that came when the queue was full, and came back
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, count: int, seed: int, *, callers: int = 12, until: float | None = None) -> None:
        """Make `count` calls, or fewer until the time `until`, with `callers` at a time."""
        chosen = random.Random(seed).choices(list(KINDS), list(KINDS.values()), k=count)
        first = list(KINDS) if count >= len(KINDS) else []  # each kind at least once
        with ThreadPoolExecutor(callers) as pool:
            for _ in pool.map(self._one, enumerate([*first, *chosen[len(first) :]], start=seed << 32), [until] * count):
                pass

    def _one(self, numbered: tuple[int, Callable[["Traffic", random.Random], None]], until: float | None) -> None:
        number, kind = numbered
        if until is not None and time.monotonic() > until:
            return
        try:
            kind(self, random.Random(number))
        except Exception as error:
            self.failures.append(f"{kind.__name__}, number {number}: {type(error).__name__}: {error}")
        else:
            with self._lock:
                self.done[kind.__name__] += 1

    @contextlib.contextmanager
    def connected(self, receive_buffer: int = 0) -> Iterator[socket.socket]:
        with socket.socket() as connection:
            if receive_buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(PATIENCE)
            connection.connect(("127.0.0.1", self.port))
            yield connection

    def ask(self, sent: bytes) -> Reply:
        with self.connected() as connection:
            connection.sendall(sent)
            return reply_of(connection)

    def ask_until_room(self, ask: Callable[[], Reply]) -> Reply:
        """The answer of a good call, which comes back when the queue is full, as clients do."""
        until = time.monotonic() + PATIENCE
        while (reply := ask()).status == 429:
            assert int(reply.headers["retry-after"]) >= 1
            assert time.monotonic() < until
            with self._lock:
                self.refused += 1
            time.sleep(1)
        assert reply.status == 200, reply
        return reply

    def check_images(self, found: Sequence[bytes], wanted: Sequence[bytes]) -> None:
        for number, (got, file) in enumerate(zip(found, wanted, strict=False)):
            assert got == file, f"image {number}: {len(got)} bytes, expected {len(file)}; {_difference(got, file)}"
        with self._lock:
            self.images += len(found)


def _difference(got: bytes, file: bytes) -> str:
    try:
        first, second = (np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in (got, file))
    except OSError:
        return f"no picture: {got[:200]!r}"
    return f"pixels differ by {abs(first - second).max()}" if first.shape == second.shape else f"size {first.shape}"


def reply_of(connection: socket.socket) -> Reply:
    with contextlib.closing(http.client.HTTPResponse(connection)) as answer:
        answer.begin()
        reply = Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    assert b"Traceback" not in reply.body
    return reply


def refused_with(reply: Reply, status: int, sent: object) -> None:
    assert reply.status == status, (sent, reply.status, reply.body[:200])
    assert reply.json["error"]["type"] == "invalid_request_error"


def decoded(reply: Reply) -> list[bytes]:
    return [base64.b64decode(entry["b64_json"]) for entry in reply.json["data"]]


def completed(stream: bytes) -> list[bytes]:
    """The images of a stream, in their order."""
    events = [json.loads(data) for data in re.findall(rb"^data: (.*)$", stream, re.M)]
    found = {each["image_index"]: each["b64_json"] for each in events if each["type"].endswith("completed")}
    return [base64.b64decode(found[index]) for index in sorted(found)]


def reset(connection: socket.socket) -> None:
    """Make `close` send RST in place of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def generation(wanted: Wanted, **more: Any) -> bytes:
    return message(GENERATIONS, json.dumps({**wanted.fields, **more}).encode())


def upload(expected: Expected, **more: Any) -> bytes:
    body = form({**EDIT, **more}, [("image", expected.picture)])
    return message(EDITS, body, Content_Type=f"multipart/form-data; boundary={BOUNDARY}")


# Good calls


def plain(traffic: Traffic, random: random.Random) -> None:
    wanted, count = random.choice(traffic.expected.calls), random.randint(1, 2)
    reply = traffic.ask_until_room(lambda: traffic.ask(generation(wanted, n=count)))
    assert len(reply.json["data"]) == count
    traffic.check_images(decoded(reply), wanted.files["png"])


def as_url(traffic: Traffic, random: random.Random) -> None:
    wanted, kind = random.choice(traffic.expected.calls), random.choice(list(SUFFIXES))
    more = {"response_format": "url", "output_format": kind}
    reply = traffic.ask_until_room(lambda: traffic.ask(generation(wanted, **more)))
    file = traffic.ask(message("/v1/files/" + reply.json["data"][0]["url"].rpartition("/")[2], method="GET"))
    assert (file.status, file.headers["content-type"]) == (200, f"image/{kind}")
    traffic.check_images([file.body], wanted.files[kind])


def streamed(traffic: Traffic, random: random.Random) -> None:
    wanted, count = random.choice(traffic.expected.calls), random.randint(1, 2)
    more = {"stream": True, "partial_images": random.randint(0, 2), "n": count}
    found = completed(traffic.ask_until_room(lambda: traffic.ask(generation(wanted, **more))).body)
    assert len(found) == count
    traffic.check_images(found, wanted.files["png"])


def edited(traffic: Traffic, random: random.Random) -> None:
    reply = traffic.ask_until_room(lambda: traffic.ask(upload(traffic.expected)))
    with Image.open(io.BytesIO(decoded(reply)[0])) as picture:
        assert np.array_equal(np.asarray(picture), traffic.expected.edited)
    traffic.check_images([b""], [b""])


def two_in_a_row(traffic: Traffic, random: random.Random) -> None:
    """Two calls on one connection; the second is sent before the first is answered."""
    calls = random.sample(traffic.expected.calls, 2)
    with traffic.connected() as connection:
        connection.sendall(b"".join(generation(each).replace(b"Connection: close\r\n", b"") for each in calls))
        replies = [reply_of(connection) for _ in calls]
    for wanted, reply in zip(calls, replies, strict=True):
        assert reply.status in (200, 429), reply
        if reply.status == 200:
            traffic.check_images(decoded(reply), wanted.files["png"])


def looked(traffic: Traffic, random: random.Random) -> None:
    path = random.choice(("/health", "/v1/models", "/metrics", "/v1/models/example"))
    assert traffic.ask(message(path, method="GET")).status == 200


# Slow calls


def slowly_sent(traffic: Traffic, random: random.Random) -> None:
    wanted = random.choice(traffic.expected.calls)

    def ask() -> Reply:
        with traffic.connected() as connection:
            sent = generation(wanted)
            connection.sendall(sent[:-40])
            for place in range(len(sent) - 40, len(sent)):
                time.sleep(0.02)
                connection.sendall(sent[place : place + 1])
            return reply_of(connection)

    traffic.check_images(decoded(traffic.ask_until_room(ask)), wanted.files["png"])


def slowly_read(traffic: Traffic, random: random.Random) -> None:
    wanted = random.choice(traffic.expected.calls)

    def ask() -> Reply:
        with traffic.connected(receive_buffer=2048) as connection:
            connection.sendall(generation(wanted, n=2))
            content = b""
            while part := connection.recv(1024):
                content += part
                time.sleep(0.02)
        head, _, body = content.partition(b"\r\n\r\n")
        found = dict(re.findall(r"^(\S+): (.*)\r$", head.decode() + "\r", re.M))
        assert len(body) == int(found["content-length"])
        return Reply(int(head.split()[1]), found, body)

    traffic.check_images(decoded(traffic.ask_until_room(ask)), wanted.files["png"])


# Malformed calls

MALFORMED: Sequence[tuple[bytes, int]] = (
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b'{"prompt": 7}', 400),
    (b'{"prompt": "a", "n": 0}', 400),
    (b'{"prompt": "a", "size": "63x64"}', 400),
    (b'{"prompt": "a", "seed": 18446744073709551616}', 400),
    (b'{"prompt": "a", "seed": 1e999}', 400),
    (b'{"prompt": "a", "prior_steps": "many"}', 400),
    (b'{"prompt": "a", "mask": "/etc/passwd"}', 400),
    (b'{"prompt": "a", "colour": "red"}', 400),
    (b'{"prompt": "a", "prompt": "b"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b"\xff\xfe\x00", 400),
    (b"[" * 100_000, 400),
    (b'{"prompt": "a", "model": "dall-e-3"}', 404),
)


def malformed(traffic: Traffic, random: random.Random) -> None:
    body, status = random.choice(MALFORMED)
    reply = traffic.ask(message(GENERATIONS, body))
    refused_with(reply, status, body[:80])


def malformed_form(traffic: Traffic, random: random.Random) -> None:
    picture = traffic.expected.picture
    body, boundary = random.choice(
        (
            (form(EDIT, []), BOUNDARY),
            (form(EDIT, [("image", b"no picture")]), BOUNDARY),
            (form(EDIT, [("image", picture[:40])]), BOUNDARY),
            (form(EDIT, [("image", picture)] * 18), BOUNDARY),
            (form({f"field{number}": 1 for number in range(65)}, []), BOUNDARY),
            (form(EDIT, [("image", picture)])[:-30], BOUNDARY),
            (form(EDIT, [("image", picture)]), "another"),
            (b"\r\n" * 100, ""),
        )
    )
    reply = traffic.ask(message(EDITS, body, Content_Type=f"multipart/form-data; boundary={boundary}"))
    refused_with(reply, 400, (boundary, body[:200]))


def no_http(traffic: Traffic, random: random.Random) -> None:
    sent = random.choice(
        (
            random.randbytes(300) + b"\r\n\r\n",
            b"GET /health\r\n\r\n",
            message(GENERATIONS, b"{}", Content_Length="-5"),
            message(GENERATIONS, b"{}", Content_Length="1e3"),
            message(GENERATIONS, b"{}", Content_Length=str(10**30)),
            message(GENERATIONS, b"zz\r\n{}", Content_Length="", Transfer_Encoding="chunked"),
            message("/health", method="GET", X_Long="a" * 600_000),
            b"POST /v1/images/edits HTTP/1.1\r\nHost: a\r\nHost : b\r\n\r\n",
        )
    )
    with traffic.connected() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        found = connection.recv(1 << 16)
        assert re.match(rb"HTTP/1.1 (400|431) ", found), (sent[:100], found[:300])


def elsewhere(traffic: Traffic, random: random.Random) -> None:
    """Requests to other paths, with other methods, for other hosts and from other sites."""
    sent, status = random.choice(
        (
            (message("/", method="GET"), 404),
            (message("/v1/images/variations"), 404),
            (message("/v1/files/../../etc/passwd", method="GET"), 404),
            (message("/v1/models/other", method="GET"), 404),
            (message(GENERATIONS, method="GET"), 405),
            (message("/health", b"{}", method="DELETE"), 405),
            (message(GENERATIONS, b"{}", Host="evil.example"), 403),
            (message(GENERATIONS, b"{}", Host=""), 400),
            (message(GENERATIONS, b"{}", Origin="http://evil.example"), 403),
            (message(GENERATIONS, b"{}", Origin="null"), 403),
        )
    )
    reply = traffic.ask(sent)
    assert reply.status == status, (sent[:80], reply)


# Calls that are left


def left(traffic: Traffic, random: random.Random) -> None:
    """Leave while the request is sent, while it waits, or while the stream of its answer comes."""
    wanted = random.choice(traffic.expected.calls)
    sent = random.choice((generation(wanted), generation(wanted, stream=True, n=2), upload(traffic.expected)))
    with traffic.connected() as connection:
        if random.random() < 0.5:
            reset(connection)
        connection.sendall(sent[: random.choice((10, len(sent) // 2, len(sent), len(sent), len(sent)))])
        time.sleep(random.choice((0, 0.05, 0.3)))
        if b'"stream": true' in sent and random.random() < 0.5:
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                connection.recv(100)


# Oversized calls


def oversized(traffic: Traffic, random: random.Random) -> None:
    path = random.choice((GENERATIONS, EDITS))
    length = random.choice((MOST_BODY + 1, 10**15))
    refused_with(traffic.ask(message(path, b"{}", Content_Length=str(length))), 413, length)


def oversized_in_chunks(traffic: Traffic, random: random.Random) -> None:
    """A body without a length; the server answers before it has all arrived."""
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    begin = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'.encode()
    path, most = random.choice(((GENERATIONS, MOST_JSON), (GENERATIONS, MOST_JSON), (EDITS, MOST_BODY)))
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    with traffic.connected() as connection:
        connection.sendall(message(path, Content_Length="", Transfer_Encoding="chunked", Content_Type=kind))
        connection.sendall(b"%x\r\n" % len(begin) + begin + b"\r\n")
        for _ in range((most >> 20) + 2):
            connection.sendall(chunk)
        assert reply_of(connection).status == 413


KINDS: Mapping[Callable[[Traffic, random.Random], None], float] = {
    plain: 20,
    as_url: 8,
    streamed: 10,
    edited: 4,
    two_in_a_row: 4,
    looked: 10,
    slowly_sent: 4,
    slowly_read: 4,
    malformed: 12,
    malformed_form: 6,
    no_http: 6,
    elsewhere: 8,
    left: 12,
    oversized: 4,
    oversized_in_chunks: 1,
}

"""The server against clients that keep it waiting, and its answers when something goes wrong in the middle."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascadekit import Cascade

pytest.importorskip("openai")
pytest.importorskip("starlette")
from cascadekit.runtime.serve import api_server, guard, images_api
from cascadekit.runtime.serve.images_api import GENERATIONS
from helpers.serve import Served, serving, wait_for
from helpers.traffic import message, reply_of

PATIENCE = 0.4  # seconds in place of a minute
CALL = {"prompt": "a red circle", "size": "64x64", "prior_steps": 1, "decoder_steps": 1, "seed": 5}


@pytest.fixture(scope="module")
def cascade(example: Path) -> Iterator[Cascade]:
    with Cascade.open(example, threads=1, rows=1) as opened:
        yield opened


@pytest.fixture
def impatient(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(guard, "PATIENCE", PATIENCE)
    monkeypatch.setattr(api_server, "PATIENCE", PATIENCE)
    with serving(cascade) as served:
        yield served


def connect(served: Served, receive_buffer: int = 1 << 16) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", served.port))
    return connection


def open_connections(served: Served) -> int:
    return len(served.server.server_state.connections)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localh",
        message("/health", method="GET", Connection="") + b"GET /health HT",
        message("/health", b"a" * 100, method="GET", Connection="")[:-50],  # answered before its body has arrived
    ],
    ids=["nothing", "half a head", "half a second head", "a body that nobody asked for"],
)
def test_clients_that_send_nothing_more_lose_their_connection(impatient: Served, sent: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        while True:
            try:
                if not connection.recv(1 << 16):
                    break
            except ConnectionResetError:
                break
        assert time.monotonic() - began >= PATIENCE
    wait_for(lambda: open_connections(impatient) == 0)


def test_a_body_that_never_ends_is_refused(impatient: Served) -> None:
    with connect(impatient) as connection:
        connection.sendall(message(GENERATIONS, json.dumps(CALL).encode())[:-10])
        reply = reply_of(connection)
    assert (reply.status, "did not arrive" in reply.json["error"]["message"]) == (408, True)


def test_a_client_that_reads_nothing_loses_its_connection(impatient: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    large = bytes(24 << 20)  # more than the system keeps for a socket
    monkeypatch.setattr(images_api, "_encoded", lambda *given: large)
    for more in ({}, {"stream": True}):
        with connect(impatient, receive_buffer=4096) as connection:
            connection.sendall(message(GENERATIONS, json.dumps({**CALL, **more}).encode()))
            wait_for(lambda: open_connections(impatient) == 1)
            wait_for(lambda: open_connections(impatient) == 0)
    monkeypatch.undo()
    assert impatient.ask("GET", "/health")[0] == 200


def test_clients_that_wait_or_read_slowly_are_not_cut_off(
    impatient: Served, cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, large = cascade.generate, bytes(8 << 20)

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(3 * PATIENCE)
        return generate(*arguments, **options)

    monkeypatch.setattr(cascade, "generate", slowly)
    monkeypatch.setattr(images_api, "_encoded", lambda *given: large)
    with connect(impatient, receive_buffer=1 << 18) as connection:
        connection.sendall(message(GENERATIONS, json.dumps(CALL).encode()))
        found, began = 0, time.monotonic()
        while part := connection.recv(1 << 18):
            found += len(part)
            time.sleep(PATIENCE / 15)
    assert found > len(large) * 4 / 3
    assert time.monotonic() - began > 5 * PATIENCE


def test_an_error_in_the_middle_of_a_stream_reaches_the_terminal(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any) -> bytes:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(images_api, "_encoded", broken)
    with serving(cascade) as served, connect(served) as connection:
        connection.sendall(message(GENERATIONS, json.dumps({**CALL, "stream": True}).encode()))
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert not answer.endswith(b"0\r\n\r\n")  # cut short, which clients see
        status, body, _ = served.ask("POST", GENERATIONS, json.dumps(CALL).encode())
        assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert capfd.readouterr().err.count("ZeroDivisionError: in the middle") == 2  # once for each call


def test_metrics_are_open_where_that_was_chosen(cascade: Cascade) -> None:
    with serving(cascade, key="schlüssel", open_metrics=True) as served:
        assert served.ask("GET", "/metrics")[0] == 200
        assert served.ask("GET", "/v1/models")[0] == 401
        sent = message("/v1/models", method="GET", Authorization="Bearer schlüssel")
        with connect(served) as connection:
            connection.sendall(sent)  # in UTF-8
            assert reply_of(connection).status == 200


def test_bodies_of_json_are_small_and_forms_large(impatient: Served) -> None:
    status, body, _ = impatient.ask("POST", GENERATIONS, Content_Length=str(guard.MOST_JSON + 1))
    assert (status, "at most 1 MB" in json.loads(body)["error"]["message"]) == (413, True)
    status, body, _ = impatient.ask("POST", "/v1/images/edits", Content_Length=str(guard.MOST_BODY + 1))
    assert (status, "at most 64 MB" in json.loads(body)["error"]["message"]) == (413, True)

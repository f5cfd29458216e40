"""Starts the images API in a thread, and asks it."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from cascadekit import Cascade
from cascadekit.runtime.serve.api_server import ApiServer, ServeOptions, api_server


@dataclass
class Served:
    server: ApiServer
    log: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0, timeout=60)

    def metrics(self) -> str:
        return self.ask("GET", "/metrics")[1].decode()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        found = reply.status, reply.read(), dict(reply.getheaders())
        connection.close()
        assert b"Traceback" not in found[1]
        return found


@contextmanager
def serving(cascade: Cascade, **options: Any) -> Iterator[Served]:
    log: list[str] = []
    with api_server(cascade, "example", ServeOptions(port=0, **options), log.append) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield Served(server, log)
        finally:
            server.should_exit = True
            thread.join(60)
        assert not thread.is_alive()


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)

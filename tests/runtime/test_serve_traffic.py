"""`cascadekit serve` under mixed calls: every good one gets its image, byte for byte, and the process does not grow."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cascadekit import Cascade

pytest.importorskip("starlette")
from helpers.traffic import GENERATIONS, KINDS, Expected, Traffic, expected, message, reply_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
GROWTH = 1.02  # of the memory after the first calls
# The server keeps 64 files, and each of its threads some memory: both are full after some hundred calls.
WARM_UP = 700
HELD = 90  # seconds until the server has ended connections that wait for their clients


@pytest.fixture(scope="module")
def alone(example: Path) -> Expected:
    with Cascade.open(example, threads=1, rows=1) as cascade:
        return expected(cascade)


@dataclass(frozen=True)
class Process:
    """A running `cascadekit serve`, its output, and its folder for temporary files."""

    process: "subprocess.Popen[bytes]"
    log: Path
    scratch: Path
    port: int

    def kilobytes(self) -> int:
        """The memory that the process occupies."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def served(example: Path, folder: Path) -> Iterator[Process]:
    log, scratch = folder / "log", folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "cascadekit", "serve", str(example), "--port", "0", "--threads", "1"]
    command += ["--engine", "onnxruntime", "--queue", "12"]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(scratch)}
        ) as process,
    ):
        try:
            wait_for(lambda: "Ctrl+C ends" in log.read_text() or process.poll() is not None, 120)
            port = int(re.search(r":(\d+)/v1", log.read_text())[1])  # type: ignore[index]
            yield Process(process, log, scratch, port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    assert process.returncode == 0


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def check_ended_well(server: Process, traffic: Traffic) -> None:
    """No wrong or lost answer, no traceback, and nothing that was left open."""
    assert traffic.failures == []
    assert "Traceback" not in server.log.read_text()
    wait_for(lambda: server.files() <= 12, HELD)
    assert list(server.scratch.iterdir()) == []
    metrics = traffic.ask(message("/metrics", method="GET")).body.decode()
    images = dict(re.findall(r'^cascadekit_images_total{result="(\w+)"} (\S+)$', metrics, re.M))
    assert images.keys() <= {"done", "cancelled"}  # none failed
    assert float(images["done"]) >= traffic.images
    assert "cascadekit_waiting_images 0.0" in metrics


def test_mixed_calls(example: Path, alone: Expected, tmp_path: Path) -> None:
    with served(example, tmp_path) as server:
        traffic = Traffic(server.port, alone)
        traffic.run(45, seed=1, callers=8)
        assert set(traffic.done) == {kind.__name__ for kind in KINDS}
        check_ended_well(server, traffic)


@pytest.mark.slow
def test_a_thousand_mixed_calls(example: Path, alone: Expected, tmp_path: Path) -> None:
    with served(example, tmp_path) as server:
        traffic = Traffic(server.port, alone)
        held = [traffic.connected() for _ in range(3)]
        with held[0] as body, held[1] as head, held[2] as answer:
            body.sendall(message(GENERATIONS, b"{}")[:-1])
            head.sendall(message(GENERATIONS, b"{}")[:20])
            answer.sendall(message("/v1/models", method="GET", Connection=""))
            traffic.run(WARM_UP, seed=2, callers=16)
            before = settled(server)
            traffic.run(1000, seed=3, callers=16)
            assert reply_of(body).status == 408
            assert head.recv(1) == b""
            assert reply_of(answer).status == 200
        after = settled(server)
        assert traffic.done.total() == WARM_UP + 1000
        print(
            f"\n{dict(traffic.done)}, {traffic.images} images, {traffic.refused} calls came back; {before} {after} kB"
        )
        check_ended_well(server, traffic)
        assert after <= GROWTH * before


def settled(server: Process) -> int:
    """The memory once connections and threads of earlier calls have ended."""
    time.sleep(10)
    return server.kilobytes()


@pytest.mark.soak
def test_ten_minutes_of_mixed_calls(example: Path, alone: Expected, tmp_path: Path) -> None:
    until = time.monotonic() + 600
    with served(example, tmp_path) as server:
        traffic, found, seed = Traffic(server.port, alone), [], 100
        while time.monotonic() < until:
            traffic.run(WARM_UP if not found else 200, seed, callers=16, until=until)
            found.append(settled(server))
            seed += 1
        print(f"\n{traffic.done.total()} calls, {traffic.images} images, {traffic.refused} came back; {found} kB")
        check_ended_well(server, traffic)
        assert found[-1] <= GROWTH * found[0]

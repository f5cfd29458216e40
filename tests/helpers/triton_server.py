"""The server of the nvidia-pytriton wheel, in the environment of its own that `make .venv-triton/stamp` makes."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-triton"
PYTHON = VENV / "bin" / "python"
CALLS, ALONE = (Path(__file__).with_name(f"triton_{name}.py") for name in ("calls", "alone"))
START, END = 120, 20  # seconds that the server may take on a busy machine


def run_calls(name: str, http: str, grpc: str, folder: Path) -> dict[str, Any]:
    """Run a function of triton_calls.py in the environment."""
    words = [str(PYTHON), str(CALLS), name, http, grpc, str(folder)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@dataclass
class Served:
    """A running server. `call` asks it through a function of triton_calls.py."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path

    def call(self, name: str, folder: Path) -> dict[str, Any]:
        return run_calls(name, self.http, self.grpc, folder)

    def processes(self) -> list[int]:
        """The processes of the server's Python models."""
        words = ["ps", "-o", "pid=", "--ppid", str(self.process.pid)]
        return [int(pid) for pid in subprocess.run(words, capture_output=True, text=True).stdout.split()]


def is_running(pid: int) -> bool:
    """False for a process that has ended, also where nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server of the repository in `folder`, which also takes its log and its backend."""
    ports = [_free_port(), _free_port()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(folder, ports), env=_variables(), stdout=log, stderr=log, start_new_session=True
        )
    server = Served(process, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", folder / "log")
    try:
        _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(folder: Path, ports: list[int]) -> list[str]:
    """Lay out the backend, which the wheel has in parts, and return the command of the server."""
    package = _package() / "tritonserver"
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    version = ".".join(sysconfig.get_python_version().split(".")[:2])
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (*(package / "backends" / "python").iterdir(), stub):
        if file.is_file():
            (backend / file.name).symlink_to(file)
    flags = {"http": ports[0], "grpc": ports[1]}
    return [
        str(package / "bin" / "tritonserver"),
        f"--model-repository={folder / 'repository'}",
        f"--backend-directory={backend.parent}",
        *(f"--{name}-address=127.0.0.1" for name in flags),
        *(f"--{name}-port={port}" for name, port in flags.items()),
        "--allow-metrics=false",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={END // 2}",
    ]


def pytriton() -> str:
    """The version of the wheel."""
    (found,) = distributions(name="nvidia-pytriton", path=[str(_package().parent)])
    return found.version


def _package() -> Path:
    return next((VENV / "lib").glob("python*/site-packages/pytriton"))


def _variables() -> dict[str, str]:
    """The Python of the stub is isolated: it finds its packages through the first python3 of the path."""
    libraries = (_package().with_name("nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR"))
    return {
        **os.environ,
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
    }


def _wait_until_ready(server: Served) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        if "Started HTTPService" in server.log.read_text():
            return
        time.sleep(0.2)
    raise AssertionError(server.log.read_text()[-4000:])


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port

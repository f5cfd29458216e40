"""SIGTERM, SIGHUP and Ctrl-C end every command in one way: cleaned up, one line, the exit code that shells expect."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cascadekit.cli import main
from cascadekit.converters.checkpoints import convert as checkpoint
from cascadekit.converters.checkpoints import inspect_checkpoint
from cascadekit.converters.export import validate
from cascadekit.converters.hub.hub_errors import explaining
from cascadekit.converters.hub.source import HubSource
from cascadekit.converters.tensorrt.backend import find_backend
from cascadekit.runtime.engines.onnxruntime import import_onnxruntime
from cascadekit.runtime.engines.openvino import import_openvino
from cascadekit.runtime.engines.tensorrt.cuda import import_cuda_runtime
from cascadekit.runtime.engines.tensorrt.host import import_tensorrt
from cascadekit.runtime.examine_machine import examine
from cascadekit.schemas.errors import reraise_interrupt
from cascadekit.storage.pickles import read_pickle

ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
INTERRUPTED = "interrupted; no half-written output is left"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def raising(number: int, times: int = 1) -> Callable[..., None]:
    """A function that sends a signal to this program, in place of the work."""

    def send(*arguments: object, **options: object) -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)
        time.sleep(5)  # which a signal ends

    return send


COMMANDS = {
    "inspect": (["{tiny}/original"], "converters.checkpoints.find_weights", "read_weights"),
    "convert": (["{tiny}/original", "-o", "{out}", "--to", "diffusers"], checkpoint, "_write_weights"),
    "export": (["{tiny}/model", "-o", "{out}", "--weights", "copy"], "converters.export.export_stage", "add_weights"),
    "validate": (["{tiny}/bundle"], validate, "check_graph"),
    "build": (
        ["{tiny}/bundle", "-o", "{out}", "--arch", "sm89"],
        "converters.tensorrt.export_for_build",
        "require_targets",
    ),
    "generate": (
        ["{tiny}/bundle", "x", "-o", "{out}.png", "--engine", "onnxruntime"],
        "runtime.cascade",
        "Noise",
    ),
    "verify": (["{tiny}/model", "--against", "{tiny}/original"], "parity.checkpoints.compare_tensors", "_differences"),
    "demo": (["-o", "{out}"], "converters.checkpoints.convert", "_write_other_files"),
    "lora": (
        ["merge", "{tiny}/original/stage_c.safetensors", "l", "-o", "{out}"],
        "converters.lora.merge_checkpoint",
        "open_model",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("number", "code"), ENDINGS)
def test_every_command(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, number: int, code: int
) -> None:
    arguments, module, name = COMMANDS[command]
    module = import_module(f"cascadekit.{module}") if isinstance(module, str) else module
    monkeypatch.setattr(module, name, raising(number))
    handlers = [signal.getsignal(each) for each, _ in ENDINGS]
    result = call(command, *(argument.format(tiny=tiny, out=tmp_path / "out") for argument in arguments))
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines()[-1] == INTERRUPTED
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(each) for each, _ in ENDINGS] == handlers


def test_from_outside(tiny: Path, tmp_path: Path) -> None:
    """As service managers end a program: SIGTERM, and SIGHUP behind it."""
    slow = (
        "import time; from cascadekit.converters.checkpoints import convert as c; real = c._write_weights\n"
        "def late(*given, **more):\n    print('writing', flush=True); time.sleep(5); return real(*given, **more)\n"
        "c._write_weights = late; from cascadekit.cli import main; main()"
    )
    command = [sys.executable, "-c", slow, "convert", tiny / "original", "-o", tmp_path / "m", "--to", "diffusers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout
        assert program.stdout.readline() == "writing\n"
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            program.send_signal(number)
        _, said = program.communicate(timeout=30)
    assert program.returncode in (143, 129)  # Python looks at those that came together in the order of their numbers
    assert said.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_what_was_ignored_stays_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup has SIGHUP ignored."""
    real = checkpoint._write_weights

    def write(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "_write_weights", write)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = call("convert", tiny / "original", "-o", tmp_path / "m", "--to", "diffusers")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.exit_code == 0, result.output


def test_other_threads_may_run_commands(tiny: Path) -> None:
    """Python lets only the main thread handle signals."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call, "inspect", tiny / "original").result().exit_code == 0


# Ctrl-C during an import.


class Interrupting:
    """Finds the modules of `packages` and is interrupted while it loads them: as extension modules tell it."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in self.packages:
            raise ImportError("initialization failed") from KeyboardInterrupt()


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(*packages: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Interrupting(*packages), *sys.meta_path])

    return install


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("onnxruntime", lambda: import_onnxruntime("cpu")),
        ("openvino", import_openvino),
        ("cuda", import_cuda_runtime),
        ("tensorrt", lambda: import_tensorrt("tensorrt")),
        ("tensorrt_rtx", lambda: find_backend("tensorrt-rtx")),
        ("torch", lambda: read_pickle(Path("x.pt"))),
        ("huggingface_hub", lambda: explaining(HubSource("a/b", "main", "")).__enter__()),
        ("onnxruntime", examine),
    ],
)
def test_is_no_lack_of_a_package(interrupting: Callable[..., None], package: str, use: Callable[[], object]) -> None:
    interrupting(package)
    with pytest.raises(KeyboardInterrupt):
        use()


def test_ends_the_command(tiny: Path, tmp_path: Path, interrupting: Callable[..., None]) -> None:
    interrupting("onnxruntime")
    for command in (
        ["generate", tiny / "bundle", "x", "-o", tmp_path / "x.png", "--engine", "onnxruntime"],
        ["doctor"],
    ):
        result = call(*command)
        assert result.exit_code == 130, result.output
        assert result.stderr.splitlines()[-1] == INTERRUPTED
        assert "pip install" not in result.output


def test_of_another_error_altogether(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that drops what it was interrupted by: the signal is remembered."""

    def load(*arguments: object, **options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            pass
        raise RuntimeError("module could not be initialised")

    monkeypatch.setattr(inspect_checkpoint, "open_model", load)
    result = call("inspect", "x")
    assert (result.exit_code, result.stderr.strip()) == (143, INTERRUPTED)


def test_of_the_command_line_itself() -> None:
    """The program as installed: from its first line on."""
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'cascadekit.cli.boundary':\n"
        "            raise ImportError('initialization failed') from KeyboardInterrupt()\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from cascadekit.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_chains_may_be_circles() -> None:
    one, other = ValueError(), ImportError()
    one.__cause__, other.__cause__ = other, one
    reraise_interrupt(one)
    reraise_interrupt(None)

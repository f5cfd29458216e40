"""Locks between processes: one holder at a time, whatever happens to the file or folder meanwhile."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cascadekit.schemas.errors import UsageError
from cascadekit.storage import locks
from cascadekit.storage.atomic_output import BUILDING, staged_output
from cascadekit.storage.locks import locked


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_holder_at_a_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"

    def prepare() -> None:
        path.touch() if kind == "file" else path.mkdir(exist_ok=True)

    with locked(path, prepare), pytest.raises(BlockingIOError), locked(path, prepare):
        pass
    with locked(path, prepare):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from cascadekit.storage.locks import locked\n"
        "with locked(Path(sys.argv[1]), lambda: None): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with locked(tmp_path, lambda: None):
        pass


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    made: list[int] = []

    def prepare() -> None:
        path.mkdir(exist_ok=True)
        made.append(path.stat().st_ino)

    def wait() -> None:
        with locked(path, prepare, wait=True):
            done.append(path.stat().st_ino)

    done: list[int] = []
    with locked(path, prepare):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(timeout=0.3)
        assert waiting.is_alive()
        path.rename(tmp_path / "gone")
    waiting.join(timeout=60)
    assert len(made) == 3
    assert done == [made[-1]] != [made[0]]


def test_a_link_is_never_locked(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    calls: list[int] = []

    def prepare() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise FileExistsError(os.strerror(17))

    with pytest.raises(FileExistsError), locked(tmp_path / "link", prepare):
        pass


HOLD = (
    "import sys; from pathlib import Path; from cascadekit.storage.locks import locked\n"
    "with locked(Path(sys.argv[1]), lambda: None): print('held', flush=True); sys.stdin.read()"
)


@contextmanager
def held_elsewhere(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has the lock of `path` until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_who_waits_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, with the output and the process; not at all when the lock is free."""
    monkeypatch.setattr(locks, "QUIET_SECONDS", 0.1)
    said: list[str] = []
    with held_elsewhere(tmp_path) as process:

        def let_go(text: str) -> None:
            said.append(text)
            process.communicate()

        before = locks.say_waiting.set(let_go)
        try:
            with locked(tmp_path, lambda: None, wait=True, output=Path("bundle")):
                assert process.returncode == 0
            with locked(tmp_path, lambda: None, wait=True):
                pass
        finally:
            locks.say_waiting.reset(before)
    assert said == [f"waiting for another cascadekit that writes to bundle (pid {process.pid})"]


def test_an_output_over_a_bundle_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `lora apply` does; but it refuses at once while engines are built, and without force."""
    monkeypatch.setattr(locks, "QUIET_SECONDS", 0.1)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "cascade.json").write_text('{"format": "cascadekit bundle"}')

    def write() -> None:
        with staged_output(bundle, force=True, files=["cascade.json"]) as staged:
            staged.mkdir()
            (staged / "cascade.json").write_text("new")

    said: list[str] = []
    with held_elsewhere(bundle) as process:
        with pytest.raises(UsageError, match="exists already"), staged_output(bundle, files=["cascade.json"]):
            pass
        before = locks.say_waiting.set(lambda text: said.append(text) or process.communicate())
        try:
            write()
        finally:
            locks.say_waiting.reset(before)
    assert said == [f"waiting for another cascadekit that writes to {bundle} (pid {process.pid})"]
    assert (bundle / "cascade.json").read_text() == "new"
    (bundle / BUILDING).mkdir()
    with held_elsewhere(bundle / BUILDING) as process:
        with pytest.raises(UsageError, match=rf"another process is writing it \(pid {process.pid}\)"):
            write()
        process.communicate()

"""Locks between processes: one holder at a time, whatever happens to the file or folder meanwhile."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

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

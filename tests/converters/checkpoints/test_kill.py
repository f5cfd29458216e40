"""Killed at any moment, a conversion leaves the old output, the new one or none, and the next run makes it whole.

Each kill is a SIGKILL of a process that runs the command line. The processes are forked off a server that has
imported everything, so that many of them take seconds; their copies are slowed down, so that kills land in the middle.
Nothing is flushed to disk here: what a process wrote survives it in the page cache.
"""

import os
import random
import shutil
import signal
import time
from hashlib import sha256
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cascadekit.cli import main
from cascadekit.converters.checkpoints.tiny_cascade import write_tiny_cascade

# Kills of a run. The marker `slow` has more of them, at other moments.
FEW, MANY = 3, pytest.param(25, marks=pytest.mark.slow)
BEFORE_THE_THIRD_RENAME = "event == 'os.rename' and seen[event] == 3"
NEVER = "False"

# Copies slowly, counts what Python does to the file system, and kills itself when `when` comes true.
CHILD = """
import os, signal, sys, time
from collections import Counter
from cascadekit.cli import main
from cascadekit.storage import file_ranges as copying

def slowly(copy):
    def wait_and_copy(*arguments):
        time.sleep(0.001)
        return copy(*arguments)
    return wait_and_copy

copiers = copying._copiers
copying._copiers = lambda: [slowly(copy) for copy in copiers()]
copying.COPY_BLOCK = 1 << 16
os.fsync = lambda descriptor: None
sys.dont_write_bytecode = True  # its files would be counted
seen = Counter()

def count(event, arguments):
    if event == "open" or event.startswith(("os.", "shutil.", "ctypes.dlsym")):
        seen[event] += 1
        if {when}:
            os.kill(os.getpid(), signal.SIGKILL)

sys.stdout = sys.stderr = open(os.devnull, "w")
sys.addaudithook(count)
try:
    main({arguments!r})
finally:
    open({counted!r}, "w").write(str(seen.total()))
"""

Snapshot = dict[str, str]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source/ and what it becomes, new/; old/ is the output of an earlier conversion of other weights."""
    root = tmp_path_factory.mktemp("kill")
    for seed, name in enumerate(("source", "before")):
        write_tiny_cascade(root / name, seed)
    converted(root / "source", root / "new")
    converted(root / "before", root / "old")
    assert snapshot(root / "old") != snapshot(root / "new")
    return root


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    return ["convert", str(source), "-o", str(output), "--to", "diffusers", *more]


def converted(source: Path, output: Path, *more: str) -> None:
    result = CliRunner().invoke(main, arguments(source, output, *more))
    assert result.exit_code == 0, result.output


def snapshot(folder: Path) -> Snapshot | None:
    """The digest of every file below `folder`; None when there is no such folder."""
    if not folder.exists():
        return None
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def start(
    server: ForkServerContext, command: list[str], when: str = NEVER, counted: str = os.devnull
) -> ForkServerProcess:
    code = CHILD.format(arguments=command, when=when, counted=counted)
    process = server.Process(target=exec, args=(code, {"__name__": "child"}))
    process.start()
    return process


def wait_for(path: Path, process: ForkServerProcess) -> None:
    while not path.exists() and process.is_alive():
        time.sleep(0.001)


@pytest.fixture(params=["fresh", "force"])
def place(request: pytest.FixtureRequest, outputs: Path, tmp_path: Path) -> "Place":
    return Place(tmp_path, outputs, force=request.param == "force")


class Place:
    """Folders to convert into, with an old output in them or without."""

    def __init__(self, root: Path, outputs: Path, *, force: bool) -> None:
        self.root, self.outputs, self.force = root, outputs, force
        self.new = snapshot(outputs / "new")
        self.before = snapshot(outputs / "old") if force else None

    def prepare(self, number: int) -> Path:
        """The output of a run to be killed."""
        folder = self.root / str(number)
        folder.mkdir()
        if self.force:
            shutil.copytree(self.outputs / "old", folder / "out")
        return folder / "out"

    def command(self, output: Path) -> list[str]:
        return arguments(self.outputs / "source", output, *(["--force"] if self.force else []))

    def check(self, output: Path) -> None:
        """Old, new or none after the kill; new after the next run, and nothing beside it."""
        assert snapshot(output) in (self.before, self.new)
        assert all(path == output or ".partial" in path.name for path in output.parent.iterdir())
        converted(self.outputs / "source", output, "--force")
        assert snapshot(output) == self.new
        assert list(output.parent.iterdir()) == [output]
        shutil.rmtree(output.parent)


@pytest.mark.parametrize("kills", [FEW, MANY])
def test_killed_at_any_time(server: ForkServerContext, place: Place, kills: int) -> None:
    clock = random.Random(kills)
    longest = 0.0
    landed = 0
    for number in range(kills + 1):
        output = place.prepare(number)
        process = start(server, place.command(output))
        wait_for(output.parent / ".out.partial", process)
        if number == 0:  # one run that nobody kills says how long they take
            began = time.perf_counter()
            process.join()
            longest = time.perf_counter() - began
        else:
            time.sleep(clock.uniform(0, longest))
            process.kill()
            process.join()
            landed += process.exitcode == -signal.SIGKILL
        place.check(output)
    assert landed > 0


@pytest.mark.parametrize("kills", [FEW, MANY])
def test_killed_before_anything_it_does_to_files(
    server: ForkServerContext, place: Place, tmp_path: Path, kills: int
) -> None:
    """Kills by count instead of by clock: between any two steps, however quick they follow each other.

    Over the whole run, and as many in its last quarter."""
    output = place.prepare(0)
    start(server, place.command(output), counted=str(tmp_path / "count")).join()
    total = int((tmp_path / "count").read_text())
    place.check(output)
    dice = random.Random(kills)
    last = range(total - total // 4, total)  # where the outputs change places, and what is left is cleared away
    for number in sorted({*dice.sample(range(1, total), kills), *dice.sample(last, kills)}):
        output = place.prepare(number)
        process = start(server, place.command(output), f"seen.total() == {number}")
        process.join()
        assert process.exitcode == -signal.SIGKILL
        place.check(output)


def test_killed_just_after_old_and_new_changed_places(server: ForkServerContext, outputs: Path, tmp_path: Path) -> None:
    """The scratch folder then holds the old output, not work to go on with."""
    place = Place(tmp_path, outputs, force=True)
    output = place.prepare(0)
    start(server, place.command(output), "event == 'shutil.rmtree' and 'ctypes.dlsym' in seen").join()
    assert snapshot(output) == place.new
    place.check(output)


def test_the_next_run_keeps_what_was_complete(server: ForkServerContext, outputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    start(server, arguments(outputs / "source", output), BEFORE_THE_THIRD_RENAME).join()
    complete = identities(tmp_path / ".out.partial")
    assert len(complete) == 2
    converted(outputs / "source", output)
    assert complete < identities(output)
    assert snapshot(output) == snapshot(outputs / "new")


@pytest.mark.parametrize("change", ["source", "option"])
def test_the_next_run_keeps_nothing_of_other_work(
    server: ForkServerContext, outputs: Path, tmp_path: Path, change: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(outputs / "source", source)
    start(server, arguments(source, tmp_path / "out"), BEFORE_THE_THIRD_RENAME).join()
    left = identities(tmp_path / ".out.partial")
    assert len(left) == 2
    if change == "source":
        for path in source.glob("*.safetensors"):
            os.utime(path)
    converted(source, tmp_path / "out", *(["--dtype", "bf16"] if change == "option" else []))
    assert not left & identities(tmp_path / "out")


def identities(folder: Path) -> set[tuple[int, int]]:
    """The identities of the weights below `folder`, which no copy has; a number alone is soon given to another file."""
    found = (path.stat() for path in folder.rglob("*.safetensors"))
    return {(status.st_ino, status.st_mtime_ns) for status in found}


def test_what_a_killed_run_was_allowed_is_not_allowed_to_the_next(
    server: ForkServerContext, outputs: Path, tmp_path: Path
) -> None:
    """The killed run made infinities with leave; the next one has none and must not hand them on."""
    source = tmp_path / "source"
    shutil.copytree(outputs / "source", source)
    for name in ("stage_b", "stage_c"):  # the two that are written first
        tensors = load_file(source / f"{name}.safetensors")
        save_file({key: tensor * np.float32(1e6) for key, tensor in tensors.items()}, source / f"{name}.safetensors")
    command = arguments(source, tmp_path / "out", "--dtype", "fp16")
    start(server, [*command, "--allow-overflow"], BEFORE_THE_THIRD_RENAME).join()
    assert len(identities(tmp_path / ".out.partial")) == 2
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    assert "finite values become infinite" in result.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_the_next_run_tells_of_infinities_the_killed_one_made(
    server: ForkServerContext, outputs: Path, tmp_path: Path
) -> None:
    source = tmp_path / "stage_c.safetensors"
    tensors = load_file(outputs / "source" / source.name)
    save_file({name: tensor * np.float32(1e6) for name, tensor in tensors.items()}, source)
    command = arguments(source, tmp_path / "out", "--dtype", "fp16", "--allow-overflow")
    start(server, command, "event == 'os.rename' and seen[event] == 2").join()
    assert len(identities(tmp_path / ".out.partial")) == 1
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "became infinite" in result.stderr


@pytest.mark.parametrize("name", ["fingerprint", "out"])
@pytest.mark.parametrize("what", ["bytes", "folder", "link", "loop"])
def test_whatever_lies_where_a_killed_run_left_its_work(outputs: Path, tmp_path: Path, name: str, what: str) -> None:
    """Nothing there stops a run, or is followed out of there."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    left = tmp_path / ".out.partial" / name
    left.parent.mkdir()
    match what:
        case "bytes":
            left.write_bytes(b"\xff\x00")
        case "folder":
            (left / "inner").mkdir(parents=True)
        case "link":
            left.symlink_to(tmp_path / "mine")
        case "loop":
            left.symlink_to(left)
    converted(outputs / "source", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(outputs / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert (tmp_path / "mine" / "file").exists()

"""Outputs go beside the files that a folder has; nothing of others or of the sources is ever lost."""

import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cascadekit.schemas.errors import ConversionError, UsageError
from cascadekit.storage import atomic_moves as merging
from cascadekit.storage import atomic_output as outputs
from cascadekit.storage.atomic_moves import JOURNAL
from cascadekit.storage.atomic_output import staged_output

NEW = {"a.txt": "new a", "sub/b.txt": "new b", "sub/c.txt": "new c"}
OLD = {"a.txt": "old a", "sub/b.txt": "old b", "thesis.txt": "precious"}
Content = dict[str, str]


def fill(folder: Path, content: Content) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> Content:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(target: Path, content: Content = NEW, **how: Any) -> list[str]:
    said: list[str] = []
    with staged_output(target, say=said.append, **how) as staged:
        fill(staged, content)
    return said


def test_files_go_beside_what_is_there(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", {"thesis.txt": "precious", "sub/mine.txt": "mine"})
    assert write(out) == []
    assert read(out) == {**NEW, "thesis.txt": "precious", "sub/mine.txt": "mine"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_no_obstacle_and_stays_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    before = (tmp_path / "out").stat()
    write(tmp_path / "out")
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert read(tmp_path / "out") == NEW


@pytest.mark.parametrize("files", [None, ["a.txt"]])
def test_files_of_the_same_names_take_force_and_are_listed(tmp_path: Path, files: list[str] | None) -> None:
    out = fill(tmp_path / "out", OLD)
    with pytest.raises(UsageError, match=r"exists already, with a\.txt(, sub/b\.txt)?; .*force=True to replace"):
        write(out, files=files)
    assert read(out) == OLD
    assert write(out, files=files, force=True) == [f"{out}: replaced a.txt, sub/b.txt"]
    assert read(out) == {**OLD, **NEW}
    assert os.listdir(tmp_path) == ["out"]


def test_many_names_are_counted(tmp_path: Path) -> None:
    many = {f"{number}.txt": "" for number in range(10)}
    out = fill(tmp_path / "out", many)
    with pytest.raises(UsageError, match=r"with 0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt, 5\.txt and 4 more;"):
        write(out, many)


SOURCES: dict[str, Callable[[Path], Path]] = {
    "the folder of the source": lambda root: root / "models",
    "above it": lambda root: root,
    "by way of ..": lambda root: root / "models" / "deep" / ".." / ".." / "models",
    "by way of a link": lambda root: root / "link",
    "inside a source folder": lambda root: root / "given" / "out",
    "the source folder": lambda root: root / "given",
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", SOURCES)
def test_no_output_is_contains_or_lies_inside_a_source(tmp_path: Path, case: str, force: bool) -> None:
    fill(tmp_path, {"models/c.safetensors": "weights", "models/deep/x": "", "given/b.safetensors": "weights"})
    (tmp_path / "link").symlink_to(tmp_path / "models")
    before = read(tmp_path)
    with pytest.raises(UsageError, match="the source"):
        write(SOURCES[case](tmp_path), force=force, sources=[tmp_path / "models/c.safetensors", tmp_path / "given"])
    assert read(tmp_path) == before


@pytest.mark.parametrize("how", ["itself", "hard link", "link", "source is a link"])
def test_no_file_replaces_its_source(tmp_path: Path, how: str) -> None:
    source = fill(tmp_path, {"c.safetensors": "weights"}) / "c.safetensors"
    target = tmp_path / "m.safetensors"
    match how:
        case "itself":
            target = source
        case "hard link":
            os.link(source, target)
        case "link":
            target.symlink_to(source)
        case "source is a link":
            target.symlink_to(source)
            source, target = target, source
    with (
        pytest.raises(UsageError, match="is the source"),
        staged_output(target, force=True, sources=[source]) as staged,
    ):
        staged.write_text("new")
    assert source.read_text() == "weights"


def test_a_file_beside_its_source_is_fine(tmp_path: Path) -> None:
    source = fill(tmp_path, {"c.safetensors": "weights"}) / "c.safetensors"
    with staged_output(tmp_path / "m.safetensors", sources=[source], files=()) as staged:
        staged.write_text("new")
    assert read(tmp_path) == {"c.safetensors": "weights", "m.safetensors": "new"}


@pytest.mark.parametrize("force", [False, True])
def test_neither_file_nor_folder_takes_the_place_of_the_other(tmp_path: Path, force: bool) -> None:
    fill(tmp_path, {"file": "mine", "folder/file": "mine", "other/a.txt/deep": "mine", "third/sub": "mine"})
    (tmp_path / "fourth").mkdir()
    (tmp_path / "fourth" / "sub").symlink_to(tmp_path / "folder")
    before = read(tmp_path)
    for name in ("file", "other", "third", "fourth"):
        with pytest.raises(UsageError, match=r"is a (file|folder|link)"):
            write(tmp_path / name, force=force, files=[*NEW])
    with pytest.raises(UsageError, match="is a folder"), staged_output(tmp_path / "folder", force=force, files=()):
        pass
    with pytest.raises(UsageError, match="is a folder"), staged_output(tmp_path / "folder", force=force) as staged:
        staged.write_text("a file")
    assert read(tmp_path) == before


def test_odd_names_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fill(tmp_path / "home", {"mine/x": "x"})
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(home / "mine")
    write(Path(".."), {"up": ""})
    write(home / "mine" / "..", {"up and down": ""})
    write(Path("."), {"here": ""})
    write(Path(f"{tmp_path}/link/"), {"linked": ""})
    write(Path("fingerprint"), {"reserved": ""})
    assert set(read(home)) == {
        "mine/x", "up", "up and down", "mine/here", "linked", "mine/fingerprint/reserved",
    }  # fmt: skip
    with pytest.raises(UsageError, match="a link that leads nowhere"):
        write(tmp_path / "broken", force=True)
    assert sorted(os.listdir(tmp_path)) == ["broken", "home", "link"]


def test_a_long_name_is_as_good_as_any(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255))
    assert read(tmp_path / ("n" * 255)) == NEW


@pytest.mark.parametrize("what", ["link", "broken link", "file", "folder of others"])
def test_whatever_has_the_name_of_the_scratch_folder(tmp_path: Path, what: str) -> None:
    victim = fill(tmp_path / "victim", {"thesis.txt": "precious"})
    scratch = tmp_path / ".out.partial"
    match what:
        case "link":
            scratch.symlink_to(victim)
        case "broken link":
            scratch.symlink_to(tmp_path / "nowhere")
        case "file":
            scratch.write_text("precious")
        case "folder of others":
            fill(scratch, {"thesis.txt": "precious"})
    before = read(tmp_path)
    with pytest.raises(UsageError, match="is needed for unfinished work"):
        write(tmp_path / "out", force=True)
    assert read(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()


def test_a_failure_between_two_renames_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = fill(tmp_path / "out", OLD)
    rename, count = merging.rename_new, iter(range(100))

    def failing(path: Path, to: Path) -> None:
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        rename(path, to)

    monkeypatch.setattr(merging, "rename_new", failing)
    with pytest.raises(ConversionError, match="No space left"):
        write(out, force=True)
    assert read(out) == OLD
    assert not (out / "sub" / "c.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_message_names_the_output_and_not_the_place_where_it_is_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    advice = "cannot be written: No space left on device; make room, or choose another disk"
    for fail in (
        lambda path: OSError(28, "No space left on device", "source", None, str(path)),
        lambda path: ConversionError(f"{path}: {advice}"),
    ):
        with pytest.raises(ConversionError) as raised, staged_output(out, files=["a"]) as staged:
            raise fail(staged / "a")
        assert str(raised.value) == f"{out / 'a'}: {advice}"
        assert not [*tmp_path.iterdir()]


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", {"thesis.txt": "precious"})
    with pytest.raises(UsageError, match="exists already"), staged_output(out) as staged:
        fill(fill(staged, NEW) and out, {"a.txt": "of another process"})
    assert read(out) == {"thesis.txt": "precious", "a.txt": "of another process"}
    with pytest.raises(UsageError, match="exists already"), staged_output(tmp_path / "file") as staged:
        (tmp_path / "file").write_text(str(staged.write_text("new")))
    assert (tmp_path / "file").read_text() == "3"


def killed_at(step: int, out: Path, force: bool) -> bool:
    """Whether a process that writes NEW to `out` was killed before its `step`-th rename, of those in the folder."""
    if not (child := os.fork()):
        rename, count = merging.rename_new, iter(range(100))

        def dying(path: Path, to: Path) -> None:
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(path, to)

        merging.rename_new = dying
        if step < 0:
            merging.finish = outputs.finish = lambda scratch: os.kill(os.getpid(), signal.SIGKILL)
        write(out, force=force, fingerprint="work")
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, -1])
def test_killed_between_two_renames(tmp_path: Path, step: int, force: bool) -> None:
    """The next run undoes what was moved, even if it is refused itself, and then does its own work."""
    old = OLD if force else {"thesis.txt": "precious"}
    out = fill(tmp_path / "out", old)
    killed = killed_at(step, out, force)
    assert killed == (step < 5 if force else step < 3)
    assert (out / "thesis.txt").read_text() == "precious"
    if killed:
        with pytest.raises(ConversionError, match="stop here"), staged_output(out, force=True):
            raise ConversionError("stop here")
        assert read(out) == old
        assert (out / "sub").exists() == force
        write(out, force=force)
    assert read(out) == {**old, **NEW}
    assert os.listdir(tmp_path) == ["out"]


def test_the_same_work_goes_on_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", OLD)
    assert killed_at(3, out, force=True)
    with staged_output(out, force=True, fingerprint="work") as staged:
        assert read(staged) == NEW
        assert read(out) == OLD
    assert read(out) == {**OLD, **NEW}


def test_what_was_changed_after_a_kill_is_not_lost(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", OLD)
    assert killed_at(4, out, force=True)
    fill(out, {"a.txt": "written since"})
    with pytest.raises(ConversionError, match=r"a\.txt: was changed after a run was killed"):
        write(out, force=True)
    assert (out / "a.txt").read_text() == "written since"
    assert (tmp_path / ".out.partial" / "replaced" / "a.txt").read_text() == "old a"


@pytest.mark.parametrize("name", ["../victim", "/etc/hostname", "sub/../../victim"])
def test_a_journal_of_others_moves_nothing(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {"victim": "precious"})
    status = (tmp_path / "victim").stat()
    moves = {"files": {name: [status.st_size, status.st_mtime_ns]}, "gone": [name], "folders": [name]}
    fill(tmp_path / ".out.partial", {JOURNAL: json.dumps(moves)})
    out = fill(tmp_path / "out", {})
    out.mkdir()
    write(out)
    assert (tmp_path / "victim").read_text() == "precious"
    assert read(out) == NEW


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 1, "gone": 2, "folders": 3}', "[" * 100_000, "\udcff"])
def test_a_journal_that_is_none(tmp_path: Path, text: str) -> None:
    scratch = tmp_path / ".out.partial"
    scratch.mkdir()
    (scratch / JOURNAL).write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert read(tmp_path / "out") == NEW


def test_where_nothing_can_be_renamed_from_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted volume: the work is done inside it."""
    monkeypatch.setattr(outputs, "_is_mount", lambda place: True)
    out = fill(tmp_path / "out", {"thesis.txt": "precious"})
    with staged_output(out) as staged:
        assert staged.is_relative_to(out)
        fill(staged, NEW)
    assert read(out) == {**NEW, "thesis.txt": "precious"}


def test_a_file_system_that_cannot_exchange_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_rename", lambda path, to, how: False)
    out = fill(tmp_path / "out", OLD)
    write(out, force=True, complete=True)
    assert read(out) == NEW
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: rename(path, to) if "new" not in path.parts else 1 / 0)
    (tmp_path / "new").mkdir()
    with pytest.raises(ZeroDivisionError):
        merging.exchange(tmp_path / "new", out)
    assert read(out) == NEW


def test_a_lock_on_a_folder_that_its_owner_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the scratch folder just before it went waits for the lock on the one that is there now."""
    out, gate, opened = tmp_path / "out", threading.Event(), threading.Event()
    real = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if threading.current_thread() is not threading.main_thread() and not gate.is_set():
            opened.set()
            gate.wait(10)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    errors: list[UsageError] = []

    def second() -> None:
        try:
            write(out, {"who": "second"}, force=True)
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    with staged_output(out, force=True) as staged:
        fill(staged, {"who": "first"})
        thread.start()
        opened.wait(10)
    with staged_output(out, force=True) as staged:
        gate.set()
        thread.join()
        fill(staged, {"who": "third"})
    assert "another process is writing it" in str(errors[0])
    assert read(out) == {"who": "third"}


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = threading.active_count()  # test runners have some of their own
    yield
    assert threading.active_count() == before

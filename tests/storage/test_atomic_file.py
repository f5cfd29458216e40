"""Files in the making: what killed processes leave goes, what live ones write stays, and names are taken once."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
from PIL import Image

from cascadekit.runtime.images.png import (
    image_paths,
    preview_path,
    remove_preview,
    require_free_previews,
    save_numbered,
    save_png,
    save_preview,
)
from cascadekit.schemas.errors import UsageError
from cascadekit.storage import atomic_file as module
from cascadekit.storage.atomic_file import claim, unplaced_file, whole_file
from cascadekit.storage.output_rules import require_none_is

PICTURE = Image.new("RGB", (8, 8))
PROCESSES, IMAGES = 4, 5


def leave_unfinished(path: Path) -> None:
    """Let a process end while it writes `path`."""
    before = set(os.listdir(path.parent))
    if not (child := os.fork()):
        with unplaced_file(path):
            os._exit(9)
    os.waitpid(child, 0)
    assert len(set(os.listdir(path.parent)) - before) == 1


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".x.png.backup").touch()
    leave_unfinished(tmp_path / "x.png")
    (tmp_path / "x.png").touch()
    image_paths(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == [".x.png.backup", "x.png"]
    leave_unfinished(tmp_path / "report.json")
    with whole_file(tmp_path / "report.json") as file:
        file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == [".x.png.backup", "report.json", "x.png"]


def test_what_a_live_process_writes_stays(tmp_path: Path) -> None:
    with whole_file(tmp_path / "x.png") as file:
        image_paths(tmp_path, 1)
        image_paths(tmp_path / "x.png", 1)
        save_png(tmp_path / "x.png", PICTURE, {})
        file.write(b"whole")
    assert (tmp_path / "x.png").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_link_with_the_name_of_a_leftover_is_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    (tmp_path / ".x.png.abcdefgh.partial").symlink_to(victim)
    image_paths(tmp_path / "x.png", 1)
    assert victim.exists()


def draw_some(folder: Path) -> None:
    for path in image_paths(folder, IMAGES):
        save_numbered(path, PICTURE, {})


def test_processes_never_take_the_same_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=draw_some, args=(tmp_path,)) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(os.listdir(tmp_path)) == [f"{number:04d}.png" for number in range(PROCESSES * IMAGES)]


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_one_of_two_gets_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None) -> None:
    """Also on file systems without hard links."""
    if error is not None:

        def link(*paths: Path) -> None:
            raise OSError(error, "no links")

        monkeypatch.setattr(os, "link", link)
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
    assert claim(tmp_path / "first", tmp_path / "x")
    assert not claim(tmp_path / "second", tmp_path / "x")
    assert (tmp_path / "x").read_text() == "first"


def test_an_image_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    (path,) = image_paths(tmp_path / "x.png", 1)
    path.write_text("of another process")
    with pytest.raises(UsageError, match="another process has just written it"):
        save_png(path, PICTURE, {}, force=False)
    assert path.read_text() == "of another process"


def test_images_replace_no_source(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.touch()
    (tmp_path / "link.png").symlink_to(photo)
    for name in ("photo.png", "link.png"):
        with pytest.raises(UsageError, match="is the source"):
            image_paths(tmp_path / name, 1, force=True, sources=[photo])
        with pytest.raises(UsageError, match="is the source"):
            require_none_is([tmp_path / "new.png", tmp_path / name], [photo])
    with pytest.raises(UsageError, match="is inside the source"):
        image_paths(tmp_path / "images", 1, sources=[tmp_path])
    assert image_paths(tmp_path, 1, sources=[photo]) == [tmp_path / "0000.png"]


def test_previews_replace_and_remove_previews_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_preview(path, PICTURE)
    save_preview(path, PICTURE)
    require_free_previews([path])
    remove_preview(path)
    assert os.listdir(tmp_path) == []
    save_png(preview_path(path), PICTURE, {})
    remove_preview(path)
    assert os.listdir(tmp_path) == ["x.preview.png"]
    with pytest.raises(UsageError, match=r"x\.preview\.png: exists and is no preview"):
        require_free_previews([path])


def test_names_too_long_for_more(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".png")
    save_png(path, PICTURE, {})
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_a_cleaner_took_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making a file and locking it, it looks like a leftover."""
    taken: list[str] = []
    flock = module.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(os.listdir(tmp_path))
            (tmp_path / taken[0]).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with whole_file(tmp_path / "x") as file:
        file.write(b"whole")
    assert len(taken) == 1
    assert (tmp_path / "x").read_bytes() == b"whole"

"""Updates of a bundle's manifest by several processes and threads: none is lost, and none is half written."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cascadekit.schemas.errors import ConversionError, UsageError
from cascadekit.schemas.manifest import MANIFEST_NAME, Manifest, to_text
from cascadekit.storage.bundle import open_bundle, update_manifest
from cascadekit.storage.bundle_lock import locked_bundle

WRITER = """
import sys
from pathlib import Path
from cascadekit.storage.bundle import update_manifest
for number in range(20):
    name = f"{sys.argv[2]}{number}"
    update_manifest(Path(sys.argv[1]), lambda old: old.model_copy(update={"engines": (*old.engines, name)}))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    root.mkdir()
    manifest = Manifest(created_by="x", default_size=(64, 64), vqgan_scale=None, tokenizer=None, stages={}, engines=())
    (root / MANIFEST_NAME).write_text(to_text(manifest))
    return root


def with_engine(name: str, manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"engines": (*manifest.engines, name)})


def engines(root: Path) -> tuple[str, ...]:
    return open_bundle(root).manifest.engines


def test_two_processes_lose_nothing(bundle: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(bundle), name]) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert sorted(engines(bundle)) == sorted(f"{name}{number}" for name in "ab" for number in range(20))
    assert [path.name for path in bundle.iterdir()] == [MANIFEST_NAME]


def test_the_second_writer_waits_and_reads_what_the_first_wrote(bundle: Path) -> None:
    second = threading.Thread(target=update_manifest, args=(bundle, lambda old: with_engine("second", old)))

    def first(old: Manifest) -> Manifest:
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive()
        return with_engine("first", old)

    update_manifest(bundle, first)
    second.join(timeout=60)
    assert engines(bundle) == ("first", "second")


def test_a_folder_that_takes_the_bundles_place_is_the_one_that_is_updated(bundle: Path) -> None:
    """As merging LoRAs does it: the new folder takes the place of the old one under the lock."""
    writer = threading.Thread(target=update_manifest, args=(bundle, lambda old: with_engine("late", old)))
    with locked_bundle(bundle):
        writer.start()
        writer.join(timeout=0.3)
        assert writer.is_alive()
        bundle.rename(bundle.with_name("old"))
        bundle.mkdir()
        (bundle / MANIFEST_NAME).write_text(to_text(with_engine("new", open_bundle(bundle.with_name("old")).manifest)))
    writer.join(timeout=60)
    assert engines(bundle) == ("new", "late")
    assert engines(bundle.with_name("old")) == ()


def test_a_change_that_fails_or_cannot_be_written_leaves_the_manifest(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / MANIFEST_NAME).read_bytes()

    def fail(old: Manifest) -> Manifest:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        update_manifest(bundle, fail)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConversionError, match=r"cascade\.json: cannot be written: No space left on device"):
        update_manifest(bundle, lambda old: with_engine("x", old))
    monkeypatch.undo()
    assert (bundle / MANIFEST_NAME).read_bytes() == before
    update_manifest(bundle, lambda old: with_engine("again", old))  # the lock is free
    assert engines(bundle) == ("again",)


def test_an_equal_manifest_is_not_written(bundle: Path) -> None:
    before = (bundle / MANIFEST_NAME).stat()
    update_manifest(bundle, lambda old: old)
    assert (bundle / MANIFEST_NAME).stat().st_ino == before.st_ino


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a bundle, it has no cascade\.json; make one with"):
        update_manifest(tmp_path, lambda old: old)


def test_the_bundle_that_was_meant_is_named(bundle: Path) -> None:
    (bundle / "prior").mkdir()
    for root, said in (
        (bundle.with_name("absent"), "nothing is there; check the path"),
        (bundle.parent, f"it has no {MANIFEST_NAME}; give {bundle}"),
        (bundle / "prior", f"but a part of one; give {bundle}"),
        (bundle / MANIFEST_NAME, f"but a part of one; give {bundle}"),
        (Path(__file__), "it is a file; give the folder"),
    ):
        with pytest.raises(UsageError, match=re.escape(f"{root}: not a bundle, {said}")):
            update_manifest(root, lambda old: old)

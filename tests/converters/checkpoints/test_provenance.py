"""Licences and cards: which files count, where they are looked for, how they are copied."""

import os
from pathlib import Path

import pytest

from cascadekit.converters.checkpoints.provenance import (
    MAX_BYTES,
    copy_provenance,
    is_provenance_name,
    licence_fields,
    provenance_files,
)
from cascadekit.schemas.errors import ConversionError


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with a licence and a card at its root and another licence in a component's folder."""
    folder = tmp_path / "model"
    for name in ("prior", "decoder", "controlnet"):
        write(folder / name / "model.safetensors", "weights")
    write(folder / "LICENSE", "the licence")
    write(folder / "README.md", "the card")
    write(folder / "text_encoder" / "license.txt", "another licence")
    return folder


def names(files: tuple[Path, ...]) -> set[str]:
    return {path.name for path in files}


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "license.md",
        "LICENCE.txt",
        "LICENSE-2.0",
        "LICENSE_stability.md",
        "COPYING",
        "NOTICE",
        "Notice.txt",
        "README.md",
        "readme",
        "MODEL_CARD.md",
        "my-model-card.md",
        "stability-ai-nc-community-license.md",
        "USE_POLICY.md",
    ],
)
def test_names_that_count(name: str) -> None:
    assert is_provenance_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "license.safetensors",
        "LICENSE.py",
        "license.json",
        "readme.png",
        "notes.md",
        "config.json",
        "noticeboard.md",
        "unlicensed",
        "README.md.safetensors",
    ],
)
def test_names_that_do_not_count(name: str) -> None:
    assert not is_provenance_name(name)


def test_beside_a_folder(model: Path) -> None:
    assert names(provenance_files([model])) == {"LICENSE", "README.md"}


def test_above_a_component(model: Path) -> None:
    want = {"LICENSE", "README.md"}
    assert names(provenance_files([model / "prior"])) == want
    assert names(provenance_files([model / "prior" / "model.safetensors"])) == want
    assert names(provenance_files([model / "controlnet" / "model.safetensors"])) == want
    assert names(provenance_files([model / "text_encoder"])) == want | {"license.txt"}


def test_above_a_component_of_a_component(model: Path) -> None:
    write(model / "controlnet" / "canny" / "model.safetensors")
    assert names(provenance_files([model / "controlnet" / "canny"])) == {"LICENSE", "README.md"}


def test_not_above_any_folder(model: Path) -> None:
    write(model / "checkpoints" / "stage_c.safetensors")
    assert provenance_files([model / "checkpoints", model / "checkpoints" / "stage_c.safetensors"]) == ()


def test_each_file_once(model: Path) -> None:
    files = provenance_files([model, model / "prior", model / "prior" / "model.safetensors", model])
    assert len(files) == 2


def test_relative_paths(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model / "prior")
    assert names(provenance_files([Path(), Path("model.safetensors")])) == {"LICENSE", "README.md"}


def test_a_programs_licence_is_not_the_weights(model: Path) -> None:
    write(model / "pyproject.toml")
    assert provenance_files([model]) == ()


def test_nothing_there(tmp_path: Path) -> None:
    assert provenance_files([tmp_path / "missing", tmp_path / "no" / "file.safetensors"]) == ()


def test_large_files_and_folders_are_left_out(model: Path) -> None:
    os.truncate(model / "LICENSE", MAX_BYTES + 1)
    (model / "NOTICE").mkdir()
    os.mkfifo(model / "COPYING")
    assert names(provenance_files([model])) == {"README.md"}


def test_links_stay_inside(model: Path, tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", "private")
    (model / "NOTICE").symlink_to(secret)
    (model / "COPYING").symlink_to(model / "COPYING")
    (model / "license.md").symlink_to("text_encoder/license.txt")
    files = provenance_files([model])
    assert names(files) == {"LICENSE", "README.md", "license.md"}


def test_a_folder_that_is_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert names(provenance_files([tmp_path / "link"])) == {"LICENSE", "README.md"}


def hub_snapshot(cache: Path, repository: str, files: dict[str, str]) -> Path:
    """A repository in the Hub's cache: links in a snapshot, contents among the blobs."""
    storage = cache / f"models--{repository.replace('/', '--')}"
    snapshot = storage / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, (name, text) in enumerate(files.items()):
        blob = write(storage / "blobs" / str(number), text)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, "a/b", {"LICENSE": "x", "prior/model.safetensors": "weights"})
    (snapshot / "README.md").symlink_to(write(tmp_path / "secret"))
    (shared,) = provenance_files([snapshot / "prior"])
    assert shared == snapshot / "LICENSE"


def test_all_of_a_hub_repository_belongs_together(tmp_path: Path) -> None:
    files = {"LICENSE": "x", "a/README.md": "y", "a/b/stage_c.safetensors": "weights", "c/README.md": "z"}
    snapshot = hub_snapshot(tmp_path, "a/b", files)
    write(tmp_path / "README.md")
    found = provenance_files([snapshot / "a" / "b" / "stage_c.safetensors", snapshot / "a"])
    assert set(found) == {snapshot / "LICENSE", snapshot / "a" / "README.md"}


def test_copies_are_files_with_the_same_bytes(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, "a/b", {"LICENSE": "x"})
    (tmp_path / "out").mkdir()
    (copy,) = copy_provenance(provenance_files([snapshot]), tmp_path / "out")
    assert copy == tmp_path / "out" / "LICENSE"
    assert not copy.is_symlink()
    assert copy.read_text() == "x"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out / "README.md", "ours")
    first = hub_snapshot(tmp_path / "1", "owner/first", {"README.md": "first", "LICENSE": "same"})
    second = hub_snapshot(tmp_path / "2", "owner/second", {"README.md": "second", "LICENSE": "same"})
    third = write(tmp_path / "third" / "LICENSE", "different").parent
    copies = copy_provenance(provenance_files([first, second, third]), out)
    assert {path.name: path.read_text() for path in sorted(out.iterdir())} == {
        "README.md": "ours",
        "README-owner--first.md": "first",
        "README-owner--second.md": "second",
        "LICENSE": "same",
        "LICENSE-third": "different",
    }
    assert len(copies) == 5


def test_the_same_folder_name_twice(tmp_path: Path) -> None:
    sources = [write(tmp_path / str(n) / "model" / "README.md", f"card {n}").parent for n in range(4)]
    out = tmp_path / "out"
    out.mkdir()
    copy_provenance(provenance_files(sources), out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "README.md": "card 0",
        "README-model.md": "card 1",
        "README-model-2.md": "card 2",
        "README-model-3.md": "card 3",
    }


def test_copying_twice_changes_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    files = provenance_files([model])
    assert copy_provenance(files, out) == copy_provenance(files, out)
    assert len(list(out.iterdir())) == 2


def test_a_link_in_the_way_is_not_written_through(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    victim = tmp_path / "victim"
    (out / "LICENSE").symlink_to(victim)
    copy_provenance(provenance_files([model]), out)
    assert not victim.exists()
    assert (out / "LICENSE-model").read_text() == "the licence"


def test_no_folder_to_copy_to(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"LICENSE: cannot be copied to .*missing"):
        copy_provenance(provenance_files([model]), tmp_path / "missing")


def test_licence_fields() -> None:
    metadata = {
        "format": "pt",
        "modelspec.license": "SAI NC community",
        "modelspec.author": "somebody",
        "modelspec.title": "Stable Cascade",
        "modelspec.merged_from": "a, b",
        "modelspec.thumbnail": "data:...",
        "license": "other",
        "license_link": "https://example.org/licence",
        "Licence": "the other spelling",
        "copyright": " ",
        "licensee": "nobody",
        "ss_authority": "x",
    }
    assert licence_fields(metadata).keys() == {
        "modelspec.license",
        "modelspec.author",
        "modelspec.merged_from",
        "license",
        "license_link",
        "Licence",
    }
    assert licence_fields({}) == {}

"""Tokenizer files that would abort, never end or take all memory are refused before the library sees them."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascadekit import convert, export
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.runtime.text.tokenizer_file import MAX_TOKENIZER_BYTES, save_tokenizer_folder
from cascadekit.schemas.errors import CheckpointError

Json = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Json:
    folder = tmp_path_factory.mktemp("plain") / "tokenizer"
    save_tokenizer_folder(folder)
    content: Json = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return content


def split(pattern: Json) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def model(**changes: Any) -> Callable[[Json], Json]:
    return lambda content: {"model": {**content["model"], **changes}}


def pre(*parts: Json) -> Callable[[Json], Json]:
    return lambda content: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}


def token(**changes: Any) -> Callable[[Json], Json]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    new = {"id": 49408, "content": "<x>", **usual, **changes}
    return lambda content: {"added_tokens": [*content["added_tokens"], new]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
HOSTILE: dict[str, Callable[[Json], Json]] = {
    "panics": lambda content: {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "pieces of no length": lambda content: pre(content["pre_tokenizer"], {"type": "FixedLength", "length": 0})(content),
    "an exponential pattern": pre(split({"Regex": "(a*)*(a*)*(a*)*b"}), BYTES),
    "an empty pattern": pre(split({"String": ""}), BYTES),
    "a replacement that grows": lambda content: {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4,
        }
    },
    "a prefix": lambda content: {"normalizer": {"type": "Prepend", "prepend": "x" * 100}},
    "no normalizer": lambda content: {"normalizer": None},
    "dropout": model(dropout=0.5),
    "another model": model(type="WordLevel"),
    "another ending": model(end_of_word_suffix=""),
    "ids twice": lambda content: model(vocab={**content["model"]["vocab"], "cat</w>": 5})(content),
    "ids far away": lambda content: model(vocab={**content["model"]["vocab"], "cat</w>": 4_000_000_000})(content),
    "more merges than there can be": lambda content: model(merges=content["model"]["merges"] * 2)(content),
    "another surrounding": lambda content: {
        "post_processor": {"type": "BertProcessing", "sep": ["a", 0], "cls": ["a", 0]}
    },
    "another id": token(id=49409),
    "a negative id": token(id=-1),
    "an id of another": token(id=5),
    "no text": token(content=""),
    "text that is none": token(content=7),
    "flags that are none": token(special="yes"),
    "listed as no list": lambda content: {"added_tokens": {}},
    "a token that is none": lambda content: {"added_tokens": [7]},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_not_clips_is_refused(plain: Json, tmp_path: Path, change: Callable[[Json], Json]) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**plain, **change(plain)}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected CLIP's tokenizer .*, found: ") as caught:
        ClipTokenizer.open(file)
    assert "\n" not in str(caught.value)


TEXTS = {
    "nested": "[" * 200_000,
    "a key twice": '{"model": 1, "model": 2}',
    "no number": '{"model": NaN}',
    "a huge number": '{"version": ' + "9" * 6000 + "}",
    "half a pair": '{"\\ud83d": 1}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="expected CLIP's tokenizer"):
        ClipTokenizer.open(tmp_path)


def test_large_and_special_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    with file.open("wb") as out:
        out.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"which is more than {MAX_TOKENIZER_BYTES}"):
        ClipTokenizer.open(file)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        file.unlink()
        make(file)
        with pytest.raises(CheckpointError, match="not a regular file"):
            ClipTokenizer.open(tmp_path)


def test_a_panic_is_an_error(plain: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should something get past the checks: a panic is no Exception, and would end the program."""
    panic = type("PanicException", (BaseException,), {})
    tokenizer = ClipTokenizer.open()

    class Panicking:
        def encode(self, text: str) -> None:
            raise panic("at the disco")

    monkeypatch.setattr(tokenizer, "_tokenizer", Panicking())
    with pytest.raises(CheckpointError, match="the tokenizers library failed: at the disco"):
        tokenizer(["a"])


# The folder beside a model.


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny / "model/vqgan", tmp_path / "model/vqgan")
    shutil.copytree(tiny / "model/tokenizer", tmp_path / "model/tokenizer")
    return tmp_path / "model"


def test_only_a_tokenizers_files_are_copied_and_others_noted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("hunter2-Xyzzy")
    (source / "tokenizer/notes.txt").symlink_to(tmp_path / "private.txt")
    (source / "tokenizer/zeros.bin").symlink_to("/dev/zero")
    (source / "tokenizer/inner").mkdir()
    os.mkfifo(source / "tokenizer/pipe.json")
    said: list[str] = []
    done = convert([source], tmp_path / "out", "diffusers")
    export(source, tmp_path / "bundle", say=said.append)
    for notes in (done.notes, said):
        assert any("left out: inner, notes.txt, pipe.json, zeros.bin" in text for text in notes)
    names = {"merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert {path.name for path in (tmp_path / "out/tokenizer").iterdir()} == names
    assert [path.name for path in (tmp_path / "bundle/tokenizer").iterdir()] == ["tokenizer.json"]
    assert not any("hunter2-Xyzzy" in p.read_text() for p in (tmp_path / "out/tokenizer").iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "merges.txt"])
def test_links_out_of_the_folder_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    (source / "tokenizer" / name).rename(tmp_path / "elsewhere")
    (source / "tokenizer" / name).symlink_to(tmp_path / "elsewhere")
    for write in (lambda: export(source, tmp_path / "out"), lambda: convert([source], tmp_path / "out", "diffusers")):
        with pytest.raises(CheckpointError, match=rf"{name}: expected a file in this folder, found a link"):
            write()
        assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--it/snapshots/abc"
    blobs = tmp_path / "models--me--it/blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    for path in (snapshot / "tokenizer").iterdir():
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, path.parent))
    convert([snapshot], tmp_path / "out", "diffusers")
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == (blobs / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/tokenizer/tokenizer.json").is_symlink()


def test_memory_and_time_of_a_hostile_file_are_bounded(plain: Json, tmp_path: Path) -> None:
    """In a process that may take a gigabyte and twenty seconds; the plain one needs a fifth of it."""
    change = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1_000_000}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**plain, "normalizer": {"type": "Sequence", "normalizers": [change] * 3}}))
    code = "import sys; from pathlib import Path; from cascadekit.runtime.text.tokenizer import ClipTokenizer\n"
    code += "ClipTokenizer.open(Path(sys.argv[1]))(['a cat'])"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (20, 20)),
    )
    assert "CheckpointError" in ended.stderr
    assert "another normalizer" in ended.stderr

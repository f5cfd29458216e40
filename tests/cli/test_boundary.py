"""The command line's last net: whatever a file holds and wherever the program runs, one line and an exit code."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from cascadekit.cli import main
from cascadekit.cli.escape import visible, visible_line
from cascadekit.converters.checkpoints import inspect_checkpoint
from cascadekit.runtime.batch.batch_log import read_log
from cascadekit.runtime.images.png import read_settings
from cascadekit.schemas.json_models import LoraEntry

PROGRAM = [sys.executable, "-m", "cascadekit"]
QUICK = "--size 64x64 --prior-steps 1 --decoder-steps 1 --seed 0 --engine onnxruntime --threads 1".split()
LONG = "a" * 300
BAD = os.fsdecode(b"bad\xff")  # a name that is not UTF-8


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *words: str) -> None:
    """Ended with an error that has `words`, on one line."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.lower().startswith("error: "), result.stderr
    assert all(word in last for word in words), last


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `inspect` fail with any error, while it is at a file."""

    def fail(error: BaseException) -> None:
        def opened(paths: list[Path], **options: object) -> None:
            file = paths[0]
            assert file
            raise error

        monkeypatch.setattr(inspect_checkpoint, "open_model", opened)

    return fail


def panic() -> BaseException:
    """A panic in a library written in Rust, as Python sees it: a class made at run time, below BaseException alone."""
    return type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("index out of bounds")


class TestKindsOfErrors:
    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OSError(errno.EIO, "Input/output error", "x.bin"), ("x.bin: Input/output error", "check it")),
            (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), ("a -> b: Invalid",)),
            (OSError(errno.ENOSPC, "No space left on device"), ("No space left", "here/f", "make room")),
            (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ("encoding", "here/f")),
            (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), ("encoding", "here/f")),
            (RecursionError("maximum recursion depth exceeded"), ("nested too deep", "here/f")),
            (OverflowError("int too large to convert to float"), ("too large", "here/f")),
            (MemoryError("Unable to allocate 8 GiB"), ("memory", "8 GiB", "here/f")),
            (ValueError("embedded null byte"), ("null character", "here/f")),
            (panic(), ("a library gave up: index out of bounds", "here/f")),
            (KeyError("weights"), ("this is a bug of cascadekit", "KeyError: 'weights'", "--debug", "here/f")),
            (RuntimeError("first\nsecond"), ("bug", "RuntimeError: first")),
        ],
    )
    def test_one_line(self, failing: Callable[[BaseException], None], error: BaseException, words: tuple[str]) -> None:
        failing(error)
        refused(call("inspect", "here/f"), 1, *words)
        with pytest.raises(type(error)):
            CliRunner().invoke(main, ["--debug", "inspect", "here/f"], catch_exceptions=False)

    def test_what_is_no_error_passes(self, failing: Callable[[BaseException], None]) -> None:
        class Alarm(BaseException):
            """Such as test frameworks raise."""

        failing(Alarm())
        with pytest.raises(Alarm):
            call("inspect", "f")

    def test_the_traceback_is_escaped(self, tmp_path: Path) -> None:
        ended = subprocess.run(
            [*PROGRAM, "--debug", "inspect", "\x1b[2J"], capture_output=True, text=True, cwd=tmp_path
        )
        assert ended.returncode == 1
        assert "Traceback" in ended.stderr
        assert "\\u001b[2J: no such file" in ended.stderr
        assert "\x1b" not in ended.stderr


class TestPlaces:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["inspect", LONG],
            ["convert", "{tiny}/original", "-o", LONG, "--to", "diffusers"],
            ["validate", LONG],
            ["generate", "{tiny}/bundle", "x", "-o", LONG + ".png"],
            ["generate", "{tiny}/bundle", "x", "--lora", LONG],
            ["generate", "{tiny}/bundle", "x", "--from", "prior=" + LONG],
            ["lora", "inspect", LONG],
            ["export", "{tiny}/model", "-o", LONG],
            ["verify", LONG, "--against", LONG],
            ["build", LONG, "--arch", "sm89"],
            ["ui", LONG],
        ],
    )
    def test_names_too_long(self, tiny: Path, arguments: list[str]) -> None:
        refused(call(*(argument.format(tiny=tiny) for argument in arguments)), 1, LONG, "File name too long")

    def test_no_temporary_folder(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null/x"])
        refused(call("validate", tiny / "bundle"), 1, "/dev/null/x", "TMPDIR")

    @pytest.mark.parametrize("arguments", [["inspect", "{tiny}/original"], ["inspect", "--help"], ["--version"]])
    def test_a_full_disk_behind_standard_output(self, tiny: Path, arguments: list[str]) -> None:
        with open("/dev/full", "w") as full:
            ended = subprocess.run(
                [*PROGRAM, *(argument.format(tiny=tiny) for argument in arguments)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1), ended.stderr
        assert ended.stderr.startswith("error: ")
        assert "No space left on device" in ended.stderr

    def test_nowhere_to_complain_is_no_reason_to_stop(self, tiny: Path, tmp_path: Path) -> None:
        command = [*PROGRAM, "convert", tiny / "original", "-o", tmp_path / "m", "--to", "diffusers"]
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
        assert ended.returncode in (0, 120)  # 120 is Python's own, for standard error that it cannot flush
        assert "wrote" in ended.stdout
        assert (tmp_path / "m" / "model_index.json").is_file()

    def test_a_reader_that_goes_away(self, tiny: Path) -> None:
        """As `| head` does. Shells say 141 of a program that SIGPIPE ended."""
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(
            [*PROGRAM, "inspect", tiny / "original"], stdout=writing, stderr=subprocess.PIPE, text=True
        )
        os.close(writing)
        assert (ended.returncode, ended.stderr) == (141, "")

    def test_no_standard_streams_at_all(self, tiny: Path) -> None:
        command = f'exec "$0" -m cascadekit inspect "{tiny}/original" <&- >&- 2>&-'
        assert subprocess.run(["sh", "-c", command, sys.executable]).returncode == 0

    def test_prompts_from_closed_standard_input(self, tiny: Path, tmp_path: Path) -> None:
        command = f'exec "$0" -m cascadekit generate "{tiny}/bundle" --prompts - -o "{tmp_path}/o" <&-'
        ended = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True)
        assert ended.returncode == 2
        assert "standard input is closed" in ended.stderr


class TestNamesThatAreNotUtf8:
    def test_written_and_shown(self, tiny: Path, tmp_path: Path) -> None:
        """With standard output as strict as under en_US.UTF-8."""
        shutil.copy(tiny / "original" / "stage_a.safetensors", tmp_path / f"{BAD}.safetensors")
        ended = subprocess.run(
            [*PROGRAM, "inspect", tmp_path / f"{BAD}.safetensors"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        )
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert b"bad\\udcff.safetensors" in ended.stdout
        assert call("convert", tiny / "original", "-o", tmp_path / BAD, "--to", "diffusers").exit_code == 0
        assert (tmp_path / BAD / "model_index.json").is_file()

    def test_in_journals_and_images(self, tiny: Path, tmp_path: Path) -> None:
        prompts, out = tmp_path / f"{BAD}.txt", tmp_path / BAD
        prompts.write_text("a cat\n")
        result = call("generate", tiny / "bundle", "--prompts", prompts, "-o", out, *QUICK)
        assert result.exit_code == 0, result.output
        started = next(read_log(out / "log.jsonl"))
        assert started["prompts"] == str(prompts)
        (out / "log.jsonl").read_text(encoding="utf-8", errors="strict")
        assert (read_settings(out / "0000.png") or {})["prompt"] == "a cat"

    def test_in_manifests(self) -> None:
        entry = LoraEntry(name=f"{BAD}.safetensors", fingerprint="0" * 64, strength=1, text_encoder_strength=1)
        assert LoraEntry.model_validate_json(entry.model_dump_json()).name == "bad\\udcff.safetensors"

    def test_of_weights_are_refused_by_name(self, tiny: Path, tmp_path: Path) -> None:
        """A graph names the file of its weights, and names in protobuf are UTF-8."""
        shutil.copytree(tiny / "original", tmp_path / "m")
        (tmp_path / "m" / "stage_a.safetensors").rename(tmp_path / "m" / f"{BAD}.safetensors")
        refused(call("export", tmp_path / "m", "-o", tmp_path / "b", "--stage", "vqgan"), 2, "bad\\udcff.safe", "UTF-8")

    def test_of_bundles_are_refused_by_name(self, tiny: Path, tmp_path: Path) -> None:
        """Neither onnx nor ONNX Runtime nor tokenizers take such a path."""
        refused(call("export", tiny / "model", "-o", tmp_path / BAD), 2, "bad\\udcff", "not UTF-8")
        assert not (tmp_path / BAD).exists()
        shutil.copytree(tiny / "bundle", tmp_path / BAD)
        refused(call("generate", tmp_path / BAD, "x", "-o", tmp_path / "x.png"), 2, "bad\\udcff", "not UTF-8")


class TestNumbersAndNesting:
    @pytest.mark.parametrize("digits", [400, 5000])
    @pytest.mark.parametrize(
        "arguments",
        [
            ["generate", "{tiny}/bundle", "x", "--size", "1{zeros}x64"],
            ["export", "{tiny}/model", "-o", "{out}", "--fp16-safe", "1{zeros}"],
            ["convert", "{tiny}/original", "-o", "{out}", "--to", "diffusers", "--shard-size", "1{zeros}GB"],
            ["build", "{tiny}/bundle", "--static", "1{zeros}x64", "--arch", "sm89"],
            ["generate", "{tiny}/bundle", "x", "--threads", "1{zeros}"],
            ["generate", "{tiny}/bundle", "x", "--memory", "1{zeros}GB"],
        ],
    )
    def test_options(self, tiny: Path, tmp_path: Path, arguments: list[str], digits: int) -> None:
        known = {"tiny": tiny, "out": tmp_path / "o", "zeros": "0" * digits}
        refused(call(*(argument.format(**known) for argument in arguments)), 2)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("line", ['{"images": "9%s"}' % ("9" * 5000), "[" * 5000, '{"width": 1%s}' % ("0" * 400)])
    def test_lines_of_prompts(self, tiny: Path, tmp_path: Path, line: str) -> None:
        (tmp_path / "p.jsonl").write_text(line)
        result = call("generate", tiny / "bundle", "x", "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "o")
        assert result.exit_code == 2, result.output
        assert "p.jsonl:1: " in result.stderr

    def test_settings_in_images(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(png(b"[" * 5000))
        refused(call("generate", tiny / "bundle", "--like", tmp_path / "x.png"), 2, "x.png", "nested too deep")
        (tmp_path / "p.txt").write_text("a cat\n")
        (tmp_path / "x.png").rename(tmp_path / "0000.png")
        result = call("generate", tiny / "bundle", "--prompts", tmp_path / "p.txt", "-o", tmp_path, *QUICK)
        assert isinstance(result.exception, SystemExit | None)
        assert "bug" not in result.output


def png(settings: bytes) -> bytes:
    """One grey pixel with a text chunk of cascadekit."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head, pixel = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\0\0")
    chunks = chunk(b"IHDR", head), chunk(b"iTXt", b"cascadekit\0\0\0\0\0" + settings), chunk(b"IDAT", pixel)
    return b"".join((b"\x89PNG\r\n\x1a\n", *chunks, chunk(b"IEND", b"")))


HOSTILE = "MIT\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\ud800\r[red]x[/] :warning:\nerror: gone"


class TestTextOfFiles:
    def test_what_becomes_visible(self) -> None:
        shown = visible(HOSTILE)
        assert shown == (
            r"MIT\u001b]0;owned\u0007\u001b[2J\u009b31m\u202eevil\u2066\ud800\u000d[red]x[/] :warning:"
            "\n  error: gone"
        )
        assert visible_line("a\nb\tc\x7f") == "a\\u000ab\tc\\u007f"
        for plain in ("über 画像 👩‍👧 \u200fא", 'C:\\new "x"', "first:\n  second\n    third"):
            assert visible(plain) == plain
        assert visible(json.dumps({"a": [1, "\x7f"]}, indent=2)) == json.dumps({"a": [1, "\x7f"]}, indent=2).replace(
            "\x7f", "\\u007f"
        )  # still JSON

    def test_metadata_and_names(self, original: Path, tmp_path: Path) -> None:
        tensors = load_file(original / "stage_a.safetensors")
        save_file(tensors, tmp_path / "a.safetensors")
        hostile = HOSTILE.replace("\ud800", "")  # which the library's own reader refuses in a header
        with_metadata(tmp_path / "a.safetensors", {"modelspec.license": hostile})
        for arguments in (["inspect", tmp_path / "a.safetensors"], ["lora", "inspect", tmp_path / "a.safetensors"]):
            harmless(call(*arguments))
        licence = call("inspect", tmp_path / "a.safetensors").stdout
        assert "[red]x[/] :warning:" in licence  # neither markup nor emoji
        assert json.loads(call("inspect", tmp_path / "a.safetensors", "--json").stdout)[0]["metadata"] == {
            "modelspec.license": hostile
        }
        with_metadata(tmp_path / "a.safetensors", {"modelspec.license": HOSTILE})
        refused = call("inspect", tmp_path / "a.safetensors")
        assert refused.exit_code == 1
        harmless(refused)
        save_file({hostile: tensors.popitem()[1]}, tmp_path / "b.safetensors")
        result = call("inspect", tmp_path / "b.safetensors")
        assert result.exit_code == 1
        harmless(result)

    def test_tables_and_names_of_files(self, original: Path, tmp_path: Path) -> None:
        shutil.copy(original / "stage_a.safetensors", tmp_path / "[red]\x1b[2J\nerror: x.safetensors")
        result = call("inspect", tmp_path / "[red]\x1b[2J\nerror: x.safetensors")
        assert result.exit_code == 0
        assert "[red]\\u001b[2J\\u000aerror: x.safetensors" in result.stdout
        harmless(result)

    def test_wrong_usage(self) -> None:
        harmless(call("\x1b[2J"))
        harmless(call("generate", "b", "x", "--size", "\x1b[2J\nerror: gone"))


def harmless(result: Result) -> None:
    """Nothing that a terminal obeys, and no line that a file made up."""
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\r"} & set(result.output)
    assert not [line for line in result.output.splitlines() if line.startswith("error: gone")]


def with_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Put `metadata` into a safetensors file; its own library refuses half a surrogate pair."""
    raw = path.read_bytes()
    length = int(struct.unpack("<Q", raw[:8])[0])
    header = json.dumps({**json.loads(raw[8 : 8 + length]), "__metadata__": metadata}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def test_the_real_panic_has_the_module_that_is_looked_for() -> None:
    shipped = Path(sys.modules[main.__module__].__file__ or "").parent.parent / "runtime/text/data/clip_tokenizer"
    content = json.loads((shipped / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    with pytest.raises(BaseException) as caught:
        Tokenizer.from_str(json.dumps(content)).encode("a cat")
    if not isinstance(caught.value, Exception):
        assert type(caught.value).__module__ == "pyo3_runtime"


def test_the_group_is_clicks_own_otherwise() -> None:
    assert isinstance(main, click.Group)
    assert main.main(["--version"], standalone_mode=False, prog_name="cascadekit") in (0, None)

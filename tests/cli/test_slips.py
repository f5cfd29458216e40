"""Slips on the command line of `generate` are answered, not taken in silence; and images in other formats than PNG."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import ExifTags, Image

from cascadekit.cli import main
from cascadekit.converters.contents import contents_of
from cascadekit.runtime.images.png import require_settings, save_png
from cascadekit.runtime.text.prompt_weights import unbalanced_brackets
from cascadekit.schemas.errors import CascadeError, UsageError
from helpers.exif import user_comment

QUICK = ["--size", "64x64", "--prior-steps", "1", "--decoder-steps", "1", "--engine", "onnxruntime"]


def generate(tiny: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", str(tiny / "bundle"), *map(str, arguments), *QUICK])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "cat", "on", "a", "mat"], 'put one prompt in quotes, as in "a cat on a mat"'),
        (["x", "--strength", "0.5"], "--strength: says how much of --init-image changes; give that picture, too."),
        (["x", "-o", "x.gif"], "x.gif: images are not written in this format; give a folder, or a name ending in .png"),
        (["x", "y", "-o", "x.jpg"], "x.jpg: one file for 2 images; give a folder"),
        (["x", "y", "--prompts", "-"], "--prompts: give one PROMPT and one --seed at most"),
        (["--prompts", "-", "-o", "x.webp"], "x.webp: expected a folder for the images"),
        (["x", "--mask", "m.png"], "the mask needs a picture; give --init-image"),
        (["x", "--like", "x.txt"], "x.txt: cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = generate(tiny, *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert [*tmp_path.iterdir()] == []


def test_jpeg_and_webp_lead_to_the_same_image(tiny: Path, tmp_path: Path) -> None:
    """The settings of each file generate the next; the pixels are those of the PNG."""
    png, jpeg, webp = (tmp_path / f"x.{kind}" for kind in ("png", "jpg", "webp"))
    assert generate(tiny, "ein Käfer \U0001f41e", "--seed", 3, "-o", png).exit_code == 0
    for source, target in ((png, jpeg), (jpeg, webp)):
        result = generate(tiny, "--like", source, "-o", target)
        assert result.exit_code == 0, result.output
        assert "pixels may differ" not in result.stderr
        assert require_settings(target) == require_settings(png)
    with Image.open(png) as first, Image.open(jpeg) as second, Image.open(webp) as third:
        assert (first.format, second.format, third.format) == ("PNG", "JPEG", "WEBP")
        assert first.tobytes() == third.convert("RGB").tobytes()
        comments = [each.getexif().get_ifd(ExifTags.IFD.Exif)[0x9286] for each in (second, third)]
    assert comments == [user_comment(path.read_bytes()) for path in (jpeg, webp)]
    for path, comment in zip((jpeg, webp), comments, strict=True):
        settings = json.loads(comment.removeprefix(b"ASCII\0\0\0cascadekit "))
        assert settings["prompt"] == "ein Käfer \U0001f41e"
        shown = CliRunner().invoke(main, ["inspect", str(path), "--json"])
        found = {"path": str(path), "width": 64, "height": 64, "settings": settings, "c2pa": None}
        assert (shown.exit_code, json.loads(shown.stdout)) == (0, found)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_odd_files_are_refused_in_words(tmp_path: Path, kind: str) -> None:
    path, odd = tmp_path / f"x.{kind}", tmp_path / f"odd.{kind}"
    save_png(path, Image.new("RGB", (8, 8)), {"prompt": "a" * 100})
    content, rng = path.read_bytes(), Random(0)
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(min(len(changed), 200))] = rng.randrange(256)
        odd.write_bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed))))])
        with suppress(UsageError):
            require_settings(odd)
        with suppress(CascadeError):
            contents_of(odd)
    Image.new("RGB", (8, 8)).save(odd)
    with pytest.raises(UsageError, match="has no settings of cascadekit"):
        require_settings(odd)


def test_settings_too_long_for_a_jpeg(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.jpg: its settings take \d+ bytes, and JPEG holds 65000; give"):
        save_png(tmp_path / "x.jpg", Image.new("RGB", (8, 8)), {"prompt": "a" * 70_000})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("a (b:1.2) [c] ((d))", ""),
        ("a (b", "("),
        ("a b:1.2)", ")"),
        ("[a (b]", "("),
        ("[[a]", "["),
        (r"\(a\] b", ""),
        (")(", ")("),
    ],
)
def test_brackets_without_a_partner(text: str, alone: str) -> None:
    assert unbalanced_brackets(text) == alone


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("a (cat:1.2", ["--weighted"], "( has no partner"),
        ("a (cat:1.2)", [], "--weighted reads them as emphasis"),
        ("a (cat:1.2)", ["--weighted"], None),
        ("a cat (1990) at 10:30", [], None),
    ],
)
def test_notes_on_brackets(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, options: list[str], words: str | None
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise UsageError("opened")

    monkeypatch.setattr("cascadekit.runtime.cascade.Cascade.open", stop)
    said = generate(tiny, prompt, "-o", tmp_path / "x", *options).stderr
    assert "opened" in said
    assert ("note:" in said) == (words is not None)
    assert words is None or words in " ".join(said.split())


def test_a_strength_that_is_no_number(tiny: Path, tmp_path: Path) -> None:
    """The whole text was taken for a path, which is not there."""
    (tmp_path / "style.safetensors").touch()
    result = generate(tiny, "x", "--lora", f"{tmp_path / 'style.safetensors'}:O.8")
    assert result.exit_code == 2
    assert "style.safetensors:O.8': expected a number after the colon, such as 0.8" in result.stderr


@pytest.mark.parametrize(
    "words", ["inspect ''", "convert x --to split -o ''", "export '' -o x", "generate x y --prompts ''", "demo -o ''"]
)
def test_an_empty_path_is_refused(words: str) -> None:
    """That of a variable that is not set: it stood for the current folder, which an output was then written to."""
    result = CliRunner().invoke(main, shlex.split(words))
    assert result.exit_code == 2
    assert "expected a path, found an empty text; the current folder is ." in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "prompt", "words"),
    [
        ("p.txt", "a fox\n", ["a dog"], "--prompts: each line is a prompt; leave PROMPT out."),
        ("p.csv", "prompt,seed\na fox,x\n", [], "p.csv:2: request: seed: Input should be a valid integer"),
        ("p.csv", "prompt,seed\na fox,x\n", [], ", found 'x'"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}\n', [], ", found 1.5"),
    ],
)
def test_slips_in_files_of_prompts(
    tiny: Path, tmp_path: Path, name: str, text: str, prompt: list[str], words: str
) -> None:
    (tmp_path / name).write_text(text)
    result = generate(tiny, *prompt, "--prompts", tmp_path / name, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("stabilityai/stable-cascade", "check the path, or hf://stabilityai/stable-cascade if it is on the Hub"),
        ("a/b/c.safetensors", "c.safetensors: no such file or folder; check the path\n"),
        ("https://huggingface.co/stabilityai/stable-cascade", "a web address; give hf://stabilityai/stable-cascade\n"),
        (
            "https://huggingface.co/a/b/resolve/main/c/stage_a.safetensors?download=true",
            "a web address; give hf://a/b/c/stage_a.safetensors\n",
        ),
        ("https://huggingface.co/a/b/blob/v2/x.safetensors", "give hf://a/b@v2/x.safetensors\n"),
        ("https://example.org/x.safetensors", "web addresses are not read; download the file, and give its path"),
    ],
)
def test_the_source_on_the_hub_is_named(tmp_path: Path, source: str, words: str) -> None:
    for command in (["convert", source, "--to", "split", "-o", str(tmp_path / "x")], ["lora", "inspect", source]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert words in result.stderr


@pytest.mark.parametrize("words", ["inspect -", "generate x y -o -", "convert - --to split -o x"])
def test_standard_input_and_output_are_no_paths(words: str) -> None:
    """Images went into a folder called -."""
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert "standard input and output are not taken here; write ./- for a file called -" in result.stderr

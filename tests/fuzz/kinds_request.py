"""Inputs that ask for images: settings in PNGs, files of prompts, command lines."""

import csv
import io
import json
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import click

from cascadekit.cli import main
from cascadekit.runtime.batch.file_names import DEFAULT_NAME, NameTemplate
from cascadekit.runtime.batch.image_jobs import BatchPlanner
from cascadekit.runtime.batch.prompt_files import read_prompt_file
from cascadekit.runtime.images.png import require_settings, save_png
from cascadekit.runtime.ui.gallery import Gallery
from cascadekit.runtime.ui.http_messages import json_reply
from cascadekit.runtime.ui.uploads import Uploads
from cascadekit.schemas.errors import CascadeError, UsageError
from cascadekit.schemas.request import loras_of, parse_request
from cascadekit.storage.bundle import open_bundle

from .calls import Call, Kind, WrongError, command
from .corpus import Corpus
from .mutate import odd_bytes, odd_json
from .odd_json import ODD

SIZE = (64, 64)
SETTINGS: dict[str, Any] = {
    "prompt": "a cat", "negative": "", "seed": 2**63, "index": 1, "batch": 2, "width": 64, "height": 64,
    "prior_steps": 1, "prior_guidance": 4.0, "decoder_steps": 1, "decoder_guidance": 0.0, "size_policy": "exact",
    "sampler": "gdf", "prior_shift": 2.0, "decoder_shift": 1.0, "rescale": 0.7, "prior_timesteps": [1.0, 0.5, 0.0],
    "strength": 0.8, "weighted": False, "long_prompts": True, "vqgan_scale": 0.43, "engine": "onnxruntime",
    "image_prompts": [{"path": "a.png", "sha256": "0" * 64}], "mask": {"path": "b.png"}, "created_by": "cascadekit 0",
    "controls": [{"path": "c.png", "name": "canny", "strength": 0.5}], "loras": [{"name": "l", "strength": 1.0}],
}  # fmt: skip


def png(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """For --like and the gallery, which must stay JSON, and show the image beside it."""
    save_png(folder / "sound.png", corpus.picture, SETTINGS)
    save_png(folder / "odd.png", corpus.picture, {"here": "it comes"})
    whole = (folder / "odd.png").read_bytes()
    text = odd_json(SETTINGS, rng)
    content = odd_bytes(whole, rng) if rng.random() < 0.2 else _with_text(whole, text)
    (folder / "odd.png").write_bytes(content)
    gallery = Gallery(folder, Uploads(folder, folder / "kept"))

    def call() -> None:
        images, _ = gallery.newest(48)
        found = json.loads(json_reply({"images": images}).body, parse_constant=_no_number)["images"]
        if "sound.png" not in [image["name"] for image in found]:
            raise WrongError("the sound image is gone from the gallery")
        settings = require_settings(folder / "odd.png")
        loras_of(settings)
        parse_request(settings, SIZE)

    return call


def _no_number(name: str) -> None:
    raise WrongError(f"{name} in the gallery's JSON")


def _with_text(content: bytes, text: bytes) -> bytes:
    """The text in place of that of the picture's chunk "cascadekit"."""
    from helpers.pngs import BEGINS, itxt

    header_ends = len(BEGINS) + 25
    pixels = content.index(b"IDAT") - 4
    return content[:header_ends] + itxt(text) + content[pixels:]


def prompts(rng: Random, corpus: Corpus, folder: Path) -> Call:
    entry = {
        **{name: SETTINGS[name] for name in rng.sample(sorted(SETTINGS), rng.randint(0, 6))},
        "prompt": "a (cat:1.2)",
    }
    kind = rng.choice((".txt", ".jsonl", ".csv"))
    content = _WRITERS[kind](entry, rng)
    source = folder / f"prompts{kind}"
    source.write_bytes(odd_bytes(content, rng) if rng.random() < 0.4 else content)
    manifest = open_bundle(corpus.root / "bundle").manifest
    name = rng.choice((DEFAULT_NAME, "{prompt:.30}", "{seed}-{key}", "{number:04d}"))

    def call() -> None:
        plan = BatchPlanner(manifest, folder / "out", NameTemplate.parse(name), 7).plan(read_prompt_file(source))
        if plan.problems:
            raise UsageError("\n".join(plan.problems))

    return call


def _txt(entry: dict[str, Any], rng: Random) -> bytes:
    lines = [rng.choice((*ODD, "a cat", "# no", "(((a:9", "[x:1e999]", "", "\x0c", "\ufeff")) for _ in range(5)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _jsonl(entry: dict[str, Any], rng: Random) -> bytes:
    return b"\n".join([odd_json(entry, rng), json.dumps(entry).encode(), rng.choice(ODD).encode()])


def _csv(entry: dict[str, Any], rng: Random) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(entry)
    for _ in range(3):
        cells = [value if rng.random() < 0.6 else rng.choice(ODD) for value in entry.values()]
        writer.writerow(cells[: rng.choice((len(cells), len(cells) - 1))])
    return file.getvalue().encode("utf-8", "surrogatepass")


_WRITERS = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}

# Arguments with which each command would do something; none of them reaches out of the folder, or to the network.
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("inspect",): ("{model}",),
    ("convert",): ("{original}", "-o", "out", "--to", "diffusers"),
    ("lora", "inspect"): ("{original}",),
    ("validate",): ("{bundle}",),
    ("generate",): ("{bundle}", "a cat", "-o", "out", "--engine", "onnxruntime", "--threads", "1"),
    ("ui",): ("{bundle}", "--port", "0", "-o", "out", "--engine", "onnxruntime", "--threads", "1"),
    ("export",): ("{nothing}", "-o", "out"),
    ("build",): ("{bundle}", "--backend", "tensorrt"),
    ("verify",): ("{nothing}", "--against", "{nothing}"),
}
NUMBERS = ("0", "1", "2", "-1", "64", "2.5", "nan", "inf", "-inf", "1e999", "1" + "0" * 400, str(2**31), str(2**64))
VALUES = (
    "", " ", "0", "1", "-1", "2.5", "nan", "inf", "-inf", "1e999", "1" + "0" * 400, "9" * 5000, "64x64", "0x0", "-8x64",
    "64x64x64", "1" + "0" * 400 + "x64", "٣", "²", "1,0.5,0", "1,nan,0", ",", "a=b", "prior=", "=x", "canny=x.png:nan",
    "x.png:1e999", "l.safetensors:nan", "\ud800", "\udcff", "ü" * 300, "x" * 5000, "a\0b", "[red]", "\x1b[31m",
    "{", "{seed",
    "{number:1000000000d}", "{prompt.__class__}", "resident", "1 GB", "-1GB", "nan GB", "file", "folder", "none", "-",
    "--help", "exact", "gdf", "true",
)  # fmt: skip


def options(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """A command's arguments with odd ones among them. Options that would generate or serve are left out."""
    path = rng.choice(sorted(COMMANDS))
    known = {
        "model": corpus.root / "model",
        "original": corpus.root / "original",
        "bundle": corpus.root / "bundle",
        "nothing": folder,
    }
    arguments = [argument.format(**known) for argument in COMMANDS[path]]
    (folder / "file").write_text("text")
    (folder / "folder").mkdir()
    for option in rng.choices(_options_of(path), k=rng.randint(1, 4)):
        arguments += [rng.choice(option.opts), *_values(option, rng)]
    if rng.random() < 0.2:
        arguments[rng.randrange(len(arguments))] = rng.choice(VALUES)
    call = command(*path, *arguments)

    def without_work() -> None:
        drawing = patch(
            "cascadekit.runtime.batch.generate_requests.generate_requests", side_effect=CascadeError("not drawn")
        )
        serving = patch("cascadekit.runtime.ui.http_server.PageServer.serve_forever")
        batch = patch("cascadekit.runtime.batch.batch_runner.BatchRunner.run", side_effect=CascadeError("not drawn"))
        with drawing, serving, batch, patch("signal.signal"):
            call()

    return without_work


def _values(option: click.Option, rng: Random) -> list[str]:
    """Values that the option mostly takes: one of its choices, a number, or any odd text."""
    if rng.random() < 0.1:
        return rng.choice(([], [rng.choice(VALUES)], [rng.choice(VALUES), rng.choice(VALUES)]))
    if option.is_flag:
        return []
    if isinstance(option.type, click.Choice):
        return [rng.choice(sorted(map(str, option.type.choices)))]
    if option.type.name.startswith(("int", "float")):
        return [rng.choice(NUMBERS)]
    return [rng.choice(VALUES)]


def _options_of(path: tuple[str, ...]) -> list[click.Option]:
    found: click.Command = main
    for name in path:
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), name)
        assert inner is not None
        found = inner
    return [param for param in found.params if isinstance(param, click.Option) and "--host" not in param.opts]


KINDS: dict[str, Kind] = {"png": png, "prompts": prompts, "options": options}

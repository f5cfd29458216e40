"""Bundles: their manifest, a graph's bytes, a tokenizer.json."""

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from cascadekit.runtime.bundle import open_bundle
from cascadekit.runtime.engines.table import make_engine
from cascadekit.runtime.integrity import sha256_of
from cascadekit.runtime.tokenizer import ClipTokenizer
from cascadekit.schemas.bundle import MANIFEST_NAME
from cascadekit.schemas.stages import Stage

from .calls import Call, Kind, command, several
from .corpus import Corpus, linked, read_json, replaced
from .mutate import odd_bytes, odd_json

PROMPTS = ["", "a cat", "ümläut 猫 \U0001f600", "x" * 3000, "<|endoftext|>", "\0", "a  b\n"]
SMALL = 300  # tokens of a vocabulary that is mostly left out, as parsing the whole one takes the longest


def manifest(rng: Random, corpus: Corpus, folder: Path) -> Call:
    bundle = linked(corpus.bundle, folder / "odd")
    replaced(bundle / MANIFEST_NAME, odd_json(read_json(bundle / MANIFEST_NAME), rng))
    return several(command("inspect", bundle, *rng.choice(([], ["--json"]))), command("validate", bundle))


def graph(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """Odd bytes that the manifest vouches for, so that they come as far as the checker and the engine."""
    bundle = linked(corpus.bundle, folder / "odd")
    document = read_json(bundle / MANIFEST_NAME)
    stage = rng.choice(sorted(document["stages"]))
    files = document["stages"][stage]["files"]
    graphs = {graph["path"]: graph for graph in document["stages"][stage]["graphs"].values()}
    entry = rng.choice([file for file in files if file["path"] in graphs])
    path = bundle / entry["path"]
    content = path.read_bytes()
    replaced(path, odd_bytes(content, rng, rng.choice((64, 1024, None))))
    _vouch(entry, path)
    replaced(bundle / MANIFEST_NAME, json.dumps(document).encode())
    return several(lambda: _load(bundle, Stage(stage)), command("validate", bundle))


def _vouch(entry: dict[str, Any], path: Path) -> None:
    entry["size"] = path.stat().st_size
    entry["sha256"] = sha256_of(path)


def _load(bundle: Path, stage: Stage) -> None:
    opened = open_bundle(bundle)
    engine = make_engine("onnxruntime", opened, threads=1)
    for name in opened.entry(stage).graphs:
        engine.load(stage, name).close()


def tokenizer(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """A tokenizer.json with a few tokens or all, and prompts through it if it opens."""
    source = folder / "tokenizer.json"
    if rng.random() < 0.9:
        source.write_bytes(odd_json(_small(corpus.tokenizer), rng))
    else:
        begins = corpus.tokenizer.index('"vocab"')
        source.write_bytes(odd_bytes(corpus.tokenizer.encode(), rng, rng.choice((begins, None))))

    def call() -> None:
        opened = ClipTokenizer.open(source)
        opened(PROMPTS)
        for prompt in PROMPTS:
            opened.split(prompt)

    return call


@lru_cache(maxsize=1)
def _small(text: str) -> Any:
    document = json.loads(text)
    model = document["model"]
    last = {name: number for name, number in model["vocab"].items() if number >= len(model["vocab"]) - 2}
    model["vocab"] = dict(list(model["vocab"].items())[:SMALL]) | last
    model["merges"] = []
    return document


KINDS: dict[str, Kind] = {"manifest": manifest, "graph": graph, "tokenizer": tokenizer}

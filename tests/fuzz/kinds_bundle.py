"""Bundles: their manifest, a graph's bytes, a tokenizer.json."""

import json
from pathlib import Path
from random import Random
from typing import Any

import onnx

from cascadekit.runtime.engines.engine_table import make_engine
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.manifest import MANIFEST_NAME
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from cascadekit.storage.file_hashes import describe_file, sha256_of

from .calls import Call, Kind, command, several
from .corpus import Corpus, linked, read_json, replaced
from .mutate import odd_bytes, odd_json

PROMPTS = ["", "a cat", "ümläut 猫 \U0001f600", "x" * 3000, "<|endoftext|>", "\0", "a  b\n"]
SMALL = {'"<vocab>"': '{"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}', '"<merges>"': "[]"}
NUMBERS = (-1, 0, 1, 2, 77, 2**31, 2**40, 2**63 - 1)


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
    odd = _odd_graph(content, rng) if rng.random() < 0.6 else odd_bytes(content, rng, rng.choice((64, 1024, None)))
    replaced(path, odd)
    _vouch(entry, path)
    replaced(bundle / MANIFEST_NAME, json.dumps(document).encode())
    return several(lambda: _load(bundle, Stage(stage)), command("validate", bundle))


def _odd_graph(content: bytes, rng: Random) -> bytes:
    """A graph that is one, with a few things in it that no exporter writes."""
    model = onnx.load_model_from_string(content)
    for _ in range(rng.randint(1, 3)):
        rng.choice(GRAPH_CHANGES)(model.graph, rng)
    found: bytes = model.SerializeToString()
    return found


def _number_in_node(graph: onnx.GraphProto, rng: Random) -> None:
    for attribute in rng.choice(graph.node).attribute:
        attribute.i = rng.choice(NUMBERS)
        attribute.ints[:] = [rng.choice(NUMBERS) for _ in attribute.ints]


def _node(graph: onnx.GraphProto, rng: Random) -> None:
    node = rng.choice(graph.node)
    node.op_type = rng.choice(("Reshape", "Gemm", "Loop", "NoSuch", "", "Conv", "Concat"))


def _edge(graph: onnx.GraphProto, rng: Random) -> None:
    node, other = rng.choice(graph.node), rng.choice(graph.node)
    if node.input and other.output:
        place, name = rng.randrange(len(node.input)), rng.choice((other.output[0], "", "nowhere"))
        node.input[place] = name


def _gone(graph: onnx.GraphProto, rng: Random) -> None:
    del graph.node[rng.randrange(len(graph.node))]


def _shape(graph: onnx.GraphProto, rng: Random) -> None:
    tensor = rng.choice(graph.initializer)
    tensor.dims[:] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 4))]


def _kind(graph: onnx.GraphProto, rng: Random) -> None:
    rng.choice(graph.initializer).data_type = rng.choice((0, 1, 7, 8, 16, 99))


def _place(graph: onnx.GraphProto, rng: Random) -> None:
    """Where weights outside the graph lie; never a file outside the input's own folder, but for devices."""
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    if outside:
        entry = rng.choice(rng.choice(outside).external_data)
        odd = ("", "../cascade.json", "/dev/zero", "/dev/null", ".", "a\0b", "model.onnx", "x" * 300)
        entry.value = rng.choice(odd) if entry.key == "location" else str(rng.choice((*NUMBERS, "nan", "")))


def _port(graph: onnx.GraphProto, rng: Random) -> None:
    port = rng.choice([*graph.input, *graph.output])
    port.type.tensor_type.elem_type = rng.choice((0, 1, 7, 8, 99))
    port.name = rng.choice((port.name, "", "x" * 300))


GRAPH_CHANGES = (_number_in_node, _node, _edge, _gone, _shape, _kind, _place, _port)


def _vouch(entry: dict[str, Any], path: Path) -> None:
    entry |= describe_file(path.parent, path, sha256_of(path)).model_dump(mode="json", exclude={"path"})


def _load(bundle: Path, stage: Stage) -> None:
    opened = open_bundle(bundle)
    engine = make_engine("onnxruntime", opened, threads=1)
    for name in opened.entry(stage).graphs:
        engine.load(stage, name).close()


def tokenizer(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """A tokenizer.json, seldom without most of its tokens, and prompts through it if it opens."""
    source = folder / "tokenizer.json"
    document, lists = corpus.tokenizer
    text = odd_json(document, rng)
    for mark, values in (lists if rng.random() < 0.6 else SMALL).items():
        text = text.replace(mark.encode(), values.encode())
    source.write_bytes(odd_bytes(text, rng) if rng.random() < 0.1 else text)

    def call() -> None:
        opened = ClipTokenizer.open(source)
        opened(PROMPTS)
        for prompt in PROMPTS:
            opened.split(prompt)

    return call


KINDS: dict[str, Kind] = {"manifest": manifest, "graph": graph, "tokenizer": tokenizer}

"""Weights and what describes them: safetensors, config.json, index.json, LoRAs, pickles."""

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

from .calls import Call, Kind, command, several
from .corpus import PEFT, Corpus, linked, read_json, replaced
from .mutate import odd_bytes, odd_json, safetensors, split_safetensors

LAYOUTS = ("diffusers", "original", "comfyui")
LENGTHS = (0, 1, 7, 8, 99, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
STAGES = ("prior", "decoder", "vqgan", "text_encoder")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
LORA_SUFFIXES = (
    "alpha", "lora_down.weight", "lora_up.weight", "dora_scale", "diff", "diff_b", "hada_w1_a", "lokr_w1", "lora_E",
    "lora_A.default.weight", "lora_embedding_A", "magnitude_vector", "oft_blocks", "reshape_weight", "w_norm",
)  # fmt: skip


PREFIXES = (
    "",
    "model.diffusion_model.",
    "vae.",
    "text_encoder.clip_g.",
    "generator.",
    "lora_",
    "_orig_mod.",
    "module.",
)
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F8_E4M3": 1, "F64": 8, "BOOL": 1, "U8": 1}
PLACES = ("1", "17", "999999", str(10**9), "9" * 400, "-1", "\u0663", "\u00b2")  # of blocks that are counted
SIDES = (0, 1, 2, 3, 8, 64, 77, 192)  # small: a conversion writes what it reads


def _other_tensors(header: dict[str, Any], rng: Random) -> dict[str, Any]:
    """A header that is sound as such: some tensors have other names, shapes and dtypes, or are gone."""
    found: dict[str, Any] = {}
    prefix, odd = rng.choice(PREFIXES), set(rng.sample(sorted(header), rng.randint(0, 3)))
    at = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, dtype = entry["shape"], entry["dtype"]
        if name in odd and rng.random() < 0.3:
            continue
        if name in odd:
            shape = [rng.choice(SIDES) for _ in range(rng.randint(0, 3))]
            dtype = rng.choice(sorted(SIZES))
            name = rng.choice((name, f"{name}.{rng.choice(PLACES)}.weight", name.replace("0", rng.choice(PLACES))))
        end = at + SIZES[dtype] * math.prod(shape)
        found[prefix + name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return found


def _write_hole(path: Path, header: dict[str, Any]) -> None:
    """Its data takes no space on the disk, however much it is."""
    path.write_bytes(safetensors(json.dumps(header).encode(), b""))
    os.truncate(path, path.stat().st_size + max((entry["data_offsets"][1] for entry in header.values()), default=0))


def _odd_file(header: dict[str, Any], data: bytes, rng: Random) -> bytes:
    """Its header odd, or its length, or any of its bytes."""
    if rng.random() < 0.75:
        return safetensors(odd_json({"__metadata__": {"format": "pt"}, **header}, rng), data)
    whole = safetensors(json.dumps(header).encode(), data, rng.choice(LENGTHS) if rng.random() < 0.4 else None)
    return odd_bytes(whole, rng, len(whole) - len(data))


def _inspect_and_convert(source: Path, rng: Random) -> Call:
    look = command("inspect", source, *rng.choice(([], ["--json"])))
    return several(look, command("convert", source, "-o", source.parent / "out", "--to", rng.choice(LAYOUTS)))


def weights(rng: Random, corpus: Corpus, folder: Path) -> Call:
    source = folder / "odd.safetensors"
    header, data = rng.choice(corpus.weights)
    if rng.random() < 0.4:
        _write_hole(source, _other_tensors(header, rng))
    else:
        source.write_bytes(_odd_file(header, data, rng))
    return _inspect_and_convert(source, rng)


def config(rng: Random, corpus: Corpus, folder: Path) -> Call:
    source = linked(corpus.sharded / rng.choice(STAGES), folder / "odd")
    replaced(source / "config.json", odd_json(read_json(source / "config.json"), rng))
    return _inspect_and_convert(source, rng)


def index(rng: Random, corpus: Corpus, folder: Path) -> Call:
    source = linked(corpus.sharded / "prior", folder / "odd")
    replaced(source / INDEX, odd_json(read_json(source / INDEX), rng))
    return _inspect_and_convert(source, rng)


def lora(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """A file of its own with odd names or an odd header, or a PEFT folder whose settings are odd."""
    header, data = corpus.lora
    source = folder / "odd"
    if rng.random() < 0.3:
        source.mkdir()
        (source / "adapter_config.json").write_bytes(odd_json(PEFT, rng))
        (source / "adapter_model.safetensors").write_bytes(safetensors(json.dumps(header).encode(), data))
    else:
        source = folder / "odd.safetensors"
        header = _renamed(header, rng) if rng.random() < 0.6 else header
        if rng.random() < 0.5:
            _write_hole(source, _other_tensors(header, rng))
        else:
            source.write_bytes(_odd_file(header, data, rng))
    against = ("--against", corpus.root / "model")
    look = command("lora", "inspect", source, *against, *rng.choice(([], ["--json"])))
    return several(
        look, command("lora", "convert", source, *against, "-o", folder / "out.safetensors", "--to", "comfyui")
    )


def _renamed(header: dict[str, Any], rng: Random) -> dict[str, Any]:
    """Some of the tensors called after other parts of other networks' files."""
    names = {name: name for name in header}
    for name in rng.sample(sorted(names), rng.randint(1, 4)):
        stem = name.partition(".lora_")[0]
        names[name] = (
            f"{rng.choice(('', 'lora_unet_', 'lora_prior_unet_', 'unet.', stem + '.'))}{rng.choice(LORA_SUFFIXES)}"
        )
    return {names[name]: entry for name, entry in header.items()}


def pickled(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """The bytes of the zip, or of the pickle inside, or another pickle, stored or deflated."""
    source = folder / rng.choice(("odd.ckpt", "odd.pt", "odd.bin", "odd.safetensors"))
    roll = rng.random()
    whole = corpus.pickled
    source.write_bytes(odd_bytes(whole, rng) if roll < 0.3 else _zipped(whole, rng, other=roll > 0.7))
    return _inspect_and_convert(source, rng)


def _zipped(content: bytes, rng: Random, other: bool) -> bytes:
    found = io.BytesIO()
    how = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(found, "w", how) as after:
        chosen = rng.choice(before.namelist())
        for name in before.namelist():
            data = before.read(name)
            if name.endswith("data.pkl") and other:
                data = _other_pickle(rng)
            elif name == chosen or name.endswith("data.pkl"):
                data = odd_bytes(data, rng)
            if rng.random() < 0.05:
                name = odd_bytes(name.encode(), rng).decode("latin-1")
                name = name if name.partition("\0")[0] else "x"  # zipfile cuts names at a null, and wants some
            after.writestr(name, data)
    return found.getvalue()


def _other_pickle(rng: Random) -> bytes:
    """Plain values, dictionaries that hold each other or themselves, and deep ones."""
    value: Any = rng.choice((None, 0, "x", b"x", 1.5, 10**400, [], {}, {1: 2}, {"a": None}, {"a": {"b": [1, "x"]}}))
    for _ in range(rng.choice((0, 1, 5, 30, 60))):
        value = rng.choice((lambda v: {"a": v, "b": v}, lambda v: [v, v], lambda v: {"k": v}, lambda v: (v,)))(value)
    if rng.random() < 0.2:
        value = {"inner": value}
        value["self"] = value
    return pickle.dumps(value, protocol=rng.choice((2, 2, 4)))


def gguf(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """Cut, with odd bytes in the header or its counts, or with odd bytes anywhere."""
    whole, header = rng.choice(corpus.gguf)
    roll = rng.random()
    if roll < 0.2:
        odd = whole[: rng.randrange(len(whole))]
    elif roll < 0.4:
        at = rng.choice((4, 8, 16, 24, 32))  # version, counts, and the first key's length
        odd = whole[:at] + rng.choice(LENGTHS).to_bytes(8, "little") + whole[at + 8 :]
    else:
        odd = odd_bytes(whole, rng, header if roll < 0.9 else None)
    source = folder / "odd.gguf"
    source.write_bytes(odd)
    look = command("inspect", source, *rng.choice(([], ["--json"])))
    to = rng.choice((*LAYOUTS[:2], "gguf"))
    return several(look, command("convert", source, "-o", folder / "out", "--to", to, "--dtype", "fp32"))


SDNQ_TABLES = {"modules_dtype_dict": {"uint4": ["clip"]}, "modules_quant_config": {"clip": {"group_size": 0}}}


def quantised(rng: Random, corpus: Corpus, folder: Path) -> Call:
    """Weights by another program, with something odd in a text that describes them: settings, metadata or tensors."""
    source = linked(rng.choice(corpus.quantised), folder / "odd")
    path = source / "diffusion_pytorch_model.safetensors"
    header, data = split_safetensors(path.read_bytes())
    config = read_json(source / "config.json") if (source / "config.json").exists() else {}
    metadata = header.pop("__metadata__", {})
    described = [key for key, text in metadata.items() if text[:1] in ("{", "[")]
    states = [name for name in header if "quant_state." in name or name.endswith(".comfy_quant")]
    if "quantization_config" in config and rng.random() < 0.8:
        settings = {key: config["quantization_config"].get(key) for key in ("quant_method", "weights_dtype")}
        odd = odd_json(settings | SDNQ_TABLES, rng).decode("utf-8", "replace")
        text = json.dumps(config | {"quantization_config": "<odd>"}).replace('"<odd>"', odd)
        replaced(source / "config.json", text.encode())
        return _inspect_and_convert(source, rng)
    if described and (not states or rng.random() < 0.5):
        key = rng.choice(described)
        metadata[key] = odd_json(json.loads(metadata[key]), rng).decode("utf-8", "replace")
    elif states:
        header, data = _with_odd_state(header, data, rng.choice(states), rng)
    replaced(path, safetensors(json.dumps({"__metadata__": metadata, **header}).encode(), data))
    return _inspect_and_convert(source, rng)


def _with_odd_state(header: dict[str, Any], data: bytes, name: str, rng: Random) -> tuple[dict[str, Any], bytes]:
    """A file in which the JSON in a tensor is odd, of whatever length."""
    pieces: list[bytes] = []
    found, at = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        piece = odd_json(json.loads(data[start:end]), rng) if key == name else data[start:end]
        shape = [len(piece)] if key == name else entry["shape"]
        found[key] = entry | {"shape": shape, "data_offsets": [at, at + len(piece)]}
        pieces.append(piece)
        at += len(piece)
    return found, b"".join(pieces)


KINDS: dict[str, Kind] = {
    "safetensors": weights,
    "config": config,
    "index": index,
    "lora": lora,
    "pickle": pickled,
    "gguf": gguf,
    "quantised": quantised,
}

"""Files that are damaged, odd or made to harm, through the command line: a message and an exit code, nothing else.

Whatever a header, a shard index or a config.json says: no traceback, no hang, little memory, no output left behind.
"""

import json
import os
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cascadekit.cli import main
from fuzz.odd_json import ODD, Place, doubled, places, renamed, with_odd, without
from helpers.peak_memory import reset_peak, status

MOST_SECONDS = 10  # for one command; they take milliseconds
MOST_BYTES = 256 << 20  # that the process may grow by, at the peak
ADDRESS_SPACE = 2 << 30  # beyond what is taken already, so that a runaway meets MemoryError and not the machine

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
odd_values = st.sampled_from(ODD) | any_json
layouts = st.sampled_from(("original", "diffusers", "split", "comfyui"))

# Each example runs three commands. tests/fuzz sends 60 more inputs of each kind of file, and `make fuzz` 1,800.
hostile = settings(max_examples=15, deadline=None, derandomize=True)


class Hang(BaseException):
    """Not an Exception, so that nobody takes it for one of the errors they expect."""


@contextmanager
def bounded() -> Iterator[None]:
    """An alarm clock, a limit to the address space, and a bound on the memory that is taken."""

    def ring(*arguments: object) -> None:
        raise Hang(f"no answer after {MOST_SECONDS} seconds")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ADDRESS_SPACE, limits[1]))
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        taken = reset_peak()
        yield
        assert status("VmHWM") - taken < MOST_BYTES
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def call(*arguments: object) -> Result:
    with bounded():
        return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answered(result: Result, source: Path) -> bool:
    """Whether a command did its work; if not, it said so, and named the source unless the call itself was wrong."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.output
    assert "this is a bug" not in result.output
    assert result.exit_code == 0 or result.output.strip()
    assert result.exit_code != 1 or source.name in result.output
    return result.exit_code == 0


def survives(source: Path, to: str) -> None:
    """inspect and convert either work or refuse; see the module."""
    answered(call("inspect", source), source)
    result = call("inspect", source, "--json")
    answered(result, source)
    if result.stdout:
        strict_json(result.stdout)
    beside = sorted(source.parent.iterdir())
    output = source.parent / "out"
    if answered(call("convert", source, "-o", output, "--to", to), source):
        for path in output.rglob("*.safetensors"):
            with safe_open(path, "np") as file:
                assert file.keys()
        for path in output.rglob("*.json"):
            strict_json(path.read_text(encoding="utf-8"))
    else:
        assert sorted(source.parent.iterdir()) == beside


def strict_json(text: str) -> None:
    """JSON that every reader takes: Python's own writes and reads NaN and Infinity too."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    json.loads(text, parse_constant=refuse)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one example; tmp_path is one for all of them."""
    with TemporaryDirectory() as name:
        yield Path(name)


# --- JSON with something odd in it


@dataclass(frozen=True)
class Damage:
    """One thing changed in a JSON document: a value, a key, an entry gone or there twice."""

    place: Place
    odd: str
    how: Literal["value", "key", "gone", "twice"] = "value"

    def done_to(self, document: Any) -> bytes:
        match self.how:
            case "value":
                text = with_odd(document, self.place, self.odd)
            case "key":
                text = renamed(document, self.place, self.odd)
            case "gone":
                text = without(document, self.place)
            case "twice":
                text = doubled(document, self.place)
        return text.encode("utf-8", "surrogatepass")


def damages(document: Any) -> st.SearchStrategy[Damage]:
    """Anything that can be done anywhere in the document, each field as likely as the next."""
    anywhere = st.sampled_from(list(places(document)))
    return st.builds(Damage, anywhere, odd_values, st.sampled_from(("value", "value", "key", "gone", "twice")))


def damaged_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some overwritten, cut off, or put in between."""
    position = st.integers(0, len(data))
    few = st.binary(min_size=1, max_size=8)
    return st.one_of(
        st.builds(lambda at, new: data[:at] + new + data[at + len(new) :], position, few),
        st.builds(lambda at, new: data[:at] + new + data[at:], position, few),
        st.builds(lambda at: data[:at], position),
        st.builds(lambda at, count: data[:at] + data[at + count :], position, st.integers(1, 100)),
    )


# --- Safetensors files


def split_file(path: Path) -> tuple[Any, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


FILES = ("stage_a", "stage_b", "stage_c", "text_encoder/model")


@pytest.mark.parametrize("name", FILES)
def test_header_fields(original: Path, name: str) -> None:
    header, data = split_file(original / f"{name}.safetensors")
    header.setdefault("__metadata__", {})["modelspec.title"] = "odd"

    @hostile
    @given(damages(header), layouts)
    def check(damage: Damage, to: str) -> None:
        with scratch() as folder:
            write_file(folder / "odd.safetensors", damage.done_to(header), data)
            survives(folder / "odd.safetensors", to)

    check()


@pytest.mark.parametrize("name", FILES)
def test_shapes(original: Path, name: str) -> None:
    """Headers that are sound as such: the tensors' sizes agree with the file, their shapes with no network."""
    header, _ = split_file(original / f"{name}.safetensors")
    names = [name for name in header if name != "__metadata__"]
    sizes = st.lists(st.sampled_from((0, 1, 2, 3, 8, 64, 192)), max_size=5)

    @hostile
    @given(st.dictionaries(st.sampled_from(names), sizes, min_size=1, max_size=3), layouts)
    def check(shapes: dict[str, list[int]], to: str) -> None:
        entries = {name: {"dtype": header[name]["dtype"], "shape": header[name]["shape"]} for name in names}
        for name, shape in shapes.items():
            entries[name]["shape"] = shape
        with scratch() as folder:
            write_hole(folder / "odd.safetensors", entries)
            survives(folder / "odd.safetensors", to)

    check()


def write_hole(path: Path, entries: dict[str, Any]) -> None:
    """A file with these dtypes and shapes whose data is a hole, as long as its disk can address it."""
    position = 0
    for entry in entries.values():
        nbytes = {"F32": 4, "I64": 8}[entry["dtype"]]
        for size in entry["shape"]:
            nbytes *= size
        entry["data_offsets"] = [position, position + nbytes]
        position += nbytes
    text = json.dumps(entries).encode()
    write_file(path, text, b"")
    os.truncate(path, 8 + len(text) + position)


# Names that make a program count further than there is anything to count.
NUMBERED = (
    "down_blocks.{}.0.depthwise.weight",
    "up_blocks.{}.0.depthwise.weight",
    "up_blocks.0.{}.channelwise.0.weight",
    "down_repeat_mappers.0.{}.weight",
    "projections.{}.0.weight",
    "blocks.{}.weight",
    "text_model.encoder.layers.{}.layer_norm1.weight",
)
PREFIXES = ("", "model.diffusion_model.", "vae.", "text_encoder.clip_g.", "generator.", "generator_ema.", "lora_")


@pytest.mark.parametrize("name", FILES)
def test_tensor_names(original: Path, name: str) -> None:
    """Tensors nobody expects beside, or behind prefixes, the ones that belong there."""
    header, _ = split_file(original / f"{name}.safetensors")
    header.pop("__metadata__", None)
    numbers = st.sampled_from((1, 17, 999, 99_999, 999_999, 10**9, 10**18, "1" * 400, "-1", "٣", "²"))
    numbered = st.builds(str.format, st.sampled_from(NUMBERED), numbers)
    names = st.text(max_size=8) | numbered | st.sampled_from(list(header))
    added = st.builds(str.__add__, st.sampled_from(PREFIXES), names)
    shapes = st.sampled_from(([], [0], [1], [64], [64, 64], [64, 1, 3, 3], [1, 1, 1, 256]))

    @hostile
    @given(st.dictionaries(added, shapes, max_size=3), st.sampled_from(PREFIXES), st.integers(0, 3), layouts)
    def check(more: dict[str, list[int]], prefix: str, less: int, to: str) -> None:
        entries = {prefix + name: {k: entry[k] for k in ("dtype", "shape")} for name, entry in header.items()}
        for gone in list(entries)[:less]:
            del entries[gone]
        entries |= {name: {"dtype": "F32", "shape": shape} for name, shape in more.items()}
        with scratch() as folder:
            write_hole(folder / "odd.safetensors", entries)
            survives(folder / "odd.safetensors", to)

    check()


@hostile
@given(content=st.data(), length=st.none() | st.sampled_from((0, 1, 2, 7, 8, 99, 10**8, 10**8 + 1, 2**63, 2**64 - 1)))
def test_bytes_of_a_header(original: Path, content: st.DataObject, length: int | None) -> None:
    header, data = split_file(original / "stage_c.safetensors")
    text = content.draw(damaged_bytes(json.dumps(header).encode()))
    with scratch() as folder:
        write_file(folder / "odd.safetensors", text, data, length)
        survives(folder / "odd.safetensors", "diffusers")


@hostile
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    with scratch() as folder:
        (folder / "odd.safetensors").write_bytes(content)
        survives(folder / "odd.safetensors", "original")


@hostile
@given(content=st.data())
def test_a_file_cut_anywhere(original: Path, content: st.DataObject) -> None:
    whole = (original / "stage_b.safetensors").read_bytes()
    with scratch() as folder:
        (folder / "odd.safetensors").write_bytes(whole[: content.draw(st.integers(0, len(whole)))])
        survives(folder / "odd.safetensors", "diffusers")


# --- Folders: config.json and the index of shards


@pytest.fixture(scope="module")
def sharded(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose components are cut into shards; read only."""
    output = tmp_path_factory.mktemp("sharded") / "model"
    result = call("convert", original, "-o", output, "--to", "diffusers", "--shard-size", "600KB")
    assert result.exit_code == 0, result.output
    return output


def linked(source: Path, folder: Path) -> Path:
    """A folder odd/ of links to the files of `source`, to be replaced and never written to."""
    target = folder / "odd"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    return target


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("stage", ["prior", "decoder", "vqgan", "text_encoder"])
def test_config_fields(sharded: Path, stage: str) -> None:
    config = json.loads((sharded / stage / "config.json").read_text())

    @hostile
    @given(damages(config), layouts)
    def check(damage: Damage, to: str) -> None:
        with scratch() as folder:
            source = linked(sharded / stage, folder)
            replaced(source / "config.json", damage.done_to(config))
            survives(source, to)

    check()


@pytest.mark.parametrize(
    ("stage", "place", "odd"),
    [
        ("prior", ("patch_size",), "[1]"),
        ("prior", ("in_channels",), "null"),
        ("prior", ("dropout", 1), "[" * 500 + "]" * 500),
        ("prior", ("dropout", 1), "NaN"),
        ("prior", ("down_num_layers_per_block", 1), '"x"'),
        ("prior", ("down_num_layers_per_block", 1), "1000000000"),
        ("prior", ("down_blocks_repeat_mappers", 0), "1000000000"),
        ("decoder", ("block_out_channels", 3), "{}"),
        ("decoder", ("timestep_conditioning_type",), "1e999"),
        ("decoder", ("up_blocks_repeat_mappers", 1), '"/"'),
        ("vqgan", ("levels",), '"3"'),
        ("vqgan", ("embed_dim",), "null"),
        ("vqgan", ("scale_factor",), "Infinity"),
        ("vqgan", ("bottleneck_blocks",), "1000000000"),
        ("vqgan", ("up_down_scale_factor",), "[-1]"),
        ("text_encoder", ("num_hidden_layers",), "[null]"),
        ("text_encoder", ("num_hidden_layers",), "1000000000"),
    ],
)
def test_settings_no_network_has(sharded: Path, tmp_path: Path, stage: str, place: Place, odd: str) -> None:
    source = linked(sharded / stage, tmp_path)
    config = json.loads((source / "config.json").read_text())
    replaced(source / "config.json", Damage(place, odd).done_to(config))
    survives(source, "diffusers")


@pytest.mark.parametrize("odd", ["{}", '{"clf.1.bias": "a\\u0000b"}', '{"clf.1.bias": "\\ud800"}'])
def test_weight_maps_of_no_folder(sharded: Path, tmp_path: Path, odd: str) -> None:
    source = linked(sharded / "prior", tmp_path)
    replaced(source / INDEX, Damage(("weight_map",), odd).done_to({"weight_map": {}}))
    survives(source, "diffusers")


@hostile
@given(content=st.data())
def test_bytes_of_a_config(sharded: Path, content: st.DataObject) -> None:
    whole = (sharded / "prior" / "config.json").read_bytes()
    with scratch() as folder:
        source = linked(sharded / "prior", folder)
        replaced(source / "config.json", content.draw(damaged_bytes(whole)))
        survives(source, "original")


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_index_fields(sharded: Path) -> None:
    index = json.loads((sharded / "prior" / INDEX).read_text())

    @hostile
    @given(damages(index), layouts)
    def check(damage: Damage, to: str) -> None:
        with scratch() as folder:
            source = linked(sharded / "prior", folder)
            replaced(source / INDEX, damage.done_to(index))
            survives(source, to)

    check()


@hostile
@given(content=st.data())
def test_bytes_of_an_index(sharded: Path, content: st.DataObject) -> None:
    whole = (sharded / "prior" / INDEX).read_bytes()
    with scratch() as folder:
        source = linked(sharded / "prior", folder)
        replaced(source / INDEX, content.draw(damaged_bytes(whole)))
        survives(source, "original")


@pytest.mark.parametrize("what", ["folder", "loop", "gone", "pipe", "unreadable"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "*-00001-of-*.safetensors"])
def test_what_is_no_file(sharded: Path, tmp_path: Path, what: str, name: str) -> None:
    source = linked(sharded / "prior", tmp_path)
    (path,) = source.glob(name)
    path.unlink()
    match what:
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "unreadable":
            path.write_bytes(b"{}")
            path.chmod(0)
    survives(source, "original")

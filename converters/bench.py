"""Measures conversions on the machine at hand, beside what the system itself does with the same bytes.

Every measurement is a process of its own, on a file of real size. What belongs together runs alternately, so that
whatever else the machine is doing meets both alike. Nothing here judges: a report says what was measured, and where.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from ..schemas.config_json import to_json
from ..schemas.errors import ConversionError, UsageError
from ..schemas.layouts import Layout, to_diffusers
from ..schemas.stages import PRESETS, NetworkConfig, Stage, UNetConfig, Variant
from ..schemas.tensors import expected_tensors
from .cast import Array
from .identify import Component
from .machine import describe_machine
from .model import open_model
from .safetensors_file import DTYPE_SIZES

NETWORKS: Mapping[str, tuple[Stage, Variant]] = {
    "prior": (Stage.PRIOR, Variant.FULL),
    "prior-lite": (Stage.PRIOR, Variant.LITE),
    "decoder": (Stage.DECODER, Variant.FULL),
    "decoder-lite": (Stage.DECODER, Variant.LITE),
    "tiny": (Stage.PRIOR, Variant.TINY),  # for tests; times of it say nothing
}
CAST_TO = {"F32": "BF16", "BF16": "F32"}
OPTIONS = {"F32": "fp32", "BF16": "bf16"}  # --dtype's spelling
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16"}

# Ratios are of these, first by second, within one round.
PAIRS = (
    ("convert", "cp"),
    ("convert_cold", "cp_cold"),
    ("cast", "cast_in_memory"),
    ("cast", "write"),
    ("inspect", "import"),
    ("peer", "convert"),
)

BLOCK = 1 << 24
CACHE_SAMPLES = 256
MEMORY_SPAN = 1 << 27  # bytes each thread of the cast in memory goes over again and again: more than any cache
CHUNK = 1 << 16

# A child counts as large as the process that started it was at that moment, so a small one starts each.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""
COPY = 'cp "$1" "$2" && sync "$2"'
WRITE = 'cat "$1" "$1" | head -c "$3" > "$2" && sync "$2"'
PEER = """
import os, sys
import torch
from diffusers import StableCascadeUNet
source, config, output, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
model = StableCascadeUNet.from_single_file(source, config=config, torch_dtype=dtype, local_files_only=True)
model.save_pretrained(output)
for entry in os.scandir(output):
    descriptor = os.open(entry.path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
"""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Case:
    """Something to measure: a command, the source bytes it goes through (None: only some), and whether the source's
    pages are dropped from the page cache first. With `own_clock` the command itself prints its seconds."""

    name: str
    what: str
    command: tuple[str, ...]
    nbytes: int | None = None
    cold: bool = False
    own_clock: bool = False


@dataclass(frozen=True)
class Run:
    """One measurement; `cached` is the share of the source found in the page cache just before."""

    seconds: float
    peak_rss: int
    cached: float | None


@dataclass(frozen=True)
class Report:
    """What was measured: the runs of every case in order, on which source and machine."""

    machine: dict[str, Any]
    source: dict[str, Any]
    cases: tuple[Case, ...]
    runs: dict[str, list[Run]]
    floor_rss: int  # what a process that does nothing counts as

    def ratios(self) -> dict[str, list[float]]:
        """Seconds of the first by those of the second, one for each round."""
        return {
            f"{first} / {second}": [
                a.seconds / b.seconds for a, b in zip(self.runs[first], self.runs[second], strict=True)
            ]
            for first, second in PAIRS
            if first in self.runs and second in self.runs
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        return {
            "machine": self.machine,
            "source": self.source,
            "floor_rss_bytes": self.floor_rss,
            "cases": {case.name: _summary(case, self.runs[case.name]) for case in self.cases},
            "ratios": {name: {"each": each, "median": median(each)} for name, each in self.ratios().items()},
        }


def _summary(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    middle = median(seconds)
    return {
        "what": case.what,
        "seconds": seconds,
        "median": middle,
        "min": min(seconds),
        "max": max(seconds),
        "megabytes_per_second": case.nbytes / middle / 1e6 if case.nbytes is not None else None,
        "peak_rss_bytes": max(run.peak_rss for run in runs),
        "cached": [run.cached for run in runs],
    }


def bench_convert(
    work: Path,
    *,
    network: str = "prior-lite",
    dtype: str = "BF16",
    source: Path | None = None,
    runs: int = 3,
    cold: bool = False,
    peer: bool = False,
    say: Say = lambda text: None,
) -> Report:
    """Measure conversions of `source`, or of a stand-in for `network` in `dtype`, in a folder below `work` that is
    removed at the end. `peer` measures diffusers too; `say` hears what is going on.

    Raises UsageError when the source, the work folder or the peer is none, ConversionError when a command fails."""
    if not work.is_dir():
        raise UsageError(f"{work}: not a folder; give one on the disk to measure")
    if peer and find_spec("diffusers") is None:
        raise UsageError("the peer is diffusers, which is not installed: pip install diffusers torch")
    with TemporaryDirectory(prefix="cascadekit-bench-", dir=work) as name:
        folder = Path(name).absolute()
        machine = describe_machine(folder, peer=peer)
        component, file = _source(folder, network, dtype, source, say)
        cases = _cases(component, file, folder, cold=cold, peer=peer)
        measured = _measure_all(cases, file, folder, runs, say)
        machine["load_average"]["after"] = os.getloadavg()[0]
        described = _described(component, file, generated=source is None)
        return Report(machine, described, cases, measured, _launch(("true",)).peak_rss)


def _source(folder: Path, network: str, dtype: str, given: Path | None, say: Say) -> tuple[Component, Path]:
    """The component to convert and its file; a stand-in is written where none is given."""
    if given is None:
        config = PRESETS[NETWORKS[network]]
        file = folder / "source.safetensors"
        nbytes = sum(map(math.prod, expected_tensors(config).values())) * DTYPE_SIZES[dtype]
        _require_space(folder, 3 * nbytes if dtype == "BF16" else 2 * nbytes)
        say(f"writing a stand-in for {network}: {nbytes / 1e9:.2f} GB of {dtype}")
        write_stand_in(file, config, dtype)
    else:
        file = given.absolute()
        _require_space(folder, 2 * file.stat().st_size if file.is_file() else 0)
    components = list(open_model([file]).components.values())
    if not file.is_file() or len(components) != 1 or not _dtype(components[0]):
        raise UsageError(f"{file}: expected a file of one component in {' or '.join(CAST_TO)}")
    return components[0].require_sound(), file


def _dtype(component: Component) -> str | None:
    """The dtype of most tensors, if the benchmark can cast it."""
    ((dtype, _),) = component.dtypes.most_common(1) or [("", 0)]
    return dtype if dtype in CAST_TO else None


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(f"{folder.parent}: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; see --work")


def write_stand_in(path: Path, config: NetworkConfig, dtype: str) -> None:
    """Write an original-layout file of the network's names and shapes, in F32 or BF16, flushed to disk.

    Its values are random bits but for one of the exponent, which keeps them finite and below 2. Holes would be
    quicker to make, and quicker to read than any disk is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, made in to_diffusers(config.stage, Layout.ORIGINAL).inverse.apply(expected_tensors(config)).items():
        nbytes = math.prod(made.shape) * DTYPE_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(made.shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in _random_blocks(position, dtype):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _random_blocks(nbytes: int, dtype: str) -> Iterator[memoryview]:
    random = np.random.Generator(np.random.SFC64(0))
    finite = np.uint64(0xBFFF_FFFF_BFFF_FFFF if dtype == "F32" else 0xBFFF_BFFF_BFFF_BFFF)
    for start in range(0, nbytes, BLOCK):
        block = random.integers(0, 1 << 64, BLOCK // 8, np.uint64)
        block &= finite
        yield block.view(np.uint8).data[: nbytes - start]


def _cases(component: Component, file: Path, folder: Path, *, cold: bool, peer: bool) -> tuple[Case, ...]:
    """Everything to measure, in the order of a round."""
    dtype = _dtype(component)
    assert dtype is not None
    size, output = file.stat().st_size, str(folder / "output")
    package = (sys.executable, "-c", "from cascadekit.cli import main; main()")
    convert = (*package, "convert", str(file), "-o", output, "--to", "diffusers")
    copy = ("sh", "-c", COPY, "sh", str(file), output)
    cast = (*convert, "--dtype", OPTIONS[CAST_TO[dtype]])
    written = size // DTYPE_SIZES[dtype] * DTYPE_SIZES[CAST_TO[dtype]]
    write = ("sh", "-c", WRITE, "sh", str(file), output, str(written))
    in_memory = f"from cascadekit.converters.bench import main; main({dtype!r}, {size})"
    cases = [
        Case("convert", "cascadekit convert --to diffusers", convert, size),
        Case("cp", "cp FILE COPY && sync COPY", copy, size),
        Case("cast", f"cascadekit convert --dtype {cast[-1]}", cast, size),
        Case(
            "cast_in_memory", "two threads of numpy, no file", (sys.executable, "-c", in_memory), size, own_clock=True
        ),
        Case("write", "as many bytes as the cast gives, written as they come && sync", write, size),
        Case("inspect", "cascadekit inspect", (*package, "inspect", str(file))),
        Case("import", "python -c 'import cascadekit'", (sys.executable, "-c", "import cascadekit")),
    ]
    if cold:
        cases[2:2] = [
            Case("convert_cold", "the same, source not in the page cache", convert, size, cold=True),
            Case("cp_cold", "the same, source not in the page cache", copy, size, cold=True),
        ]
    if peer:
        cases.insert(0, _peer(component, file, folder, dtype))
    return tuple(cases)


def _peer(component: Component, file: Path, folder: Path, dtype: str) -> Case:
    """diffusers doing the same, with a config at hand so that it asks no network."""
    if not isinstance(component.config, UNetConfig) or component.layout is not Layout.ORIGINAL:
        raise UsageError(f"{file}: the peer reads the prior and the decoder in the original layout alone")
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(to_json(component.config)), encoding="utf-8")
    command = (sys.executable, "-c", PEER, str(file), str(config), str(folder / "output"), TORCH_NAMES[dtype])
    return Case("peer", "diffusers from_single_file, save_pretrained, fsync", command, component.path.stat().st_size)


def _measure_all(cases: Sequence[Case], file: Path, folder: Path, runs: int, say: Say) -> dict[str, list[Run]]:
    measured: dict[str, list[Run]] = {case.name: [] for case in cases}
    for case in cases:
        if case.nbytes is None:
            _launch(case.command)  # programs and libraries come from the page cache in every round
    for number in range(1, runs + 1):
        for case in cases:
            run = _measure(case, file, folder / "output")
            say(f"round {number} of {runs}: {case.name} {run.seconds:.3f} s")
            measured[case.name].append(run)
    return measured


def _measure(case: Case, file: Path, output: Path) -> Run:
    drop_from_cache(file) if case.cold else _bring_into_cache(file)
    cached = cached_share(file)
    if case.cold:
        drop_from_cache(file)  # looking made the kernel read ahead
    try:
        run = _launch(case.command, own_clock=case.own_clock)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
    return Run(run.seconds, run.peak_rss, cached)


def _launch(command: Sequence[str], *, own_clock: bool = False) -> Run:
    """Run a command to its end. Raises ConversionError when it fails."""
    launcher = (sys.executable, "-I", "-S", "-c", LAUNCHER, *command)
    ended = subprocess.run(launcher, capture_output=True, text=True, check=False)
    *printed, last = ended.stdout.splitlines() or [""]
    seconds, kilobytes, code = (*last.split(), "", "", "")[:3]
    if code != "0":
        reason = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConversionError(f"{' '.join(command)[:200]}: failed: {reason}")
    return Run(float(printed[-1] if own_clock else seconds), int(kilobytes) * 1024, None)


def drop_from_cache(path: Path) -> None:
    """Have the kernel forget the file's pages. A disk's own cache, or that of a machine around this one, is out of
    reach."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bring_into_cache(path: Path) -> None:
    if cached_share(path) == 1:
        return
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def cached_share(path: Path) -> float | None:
    """The share of the file that lies in the page cache, from samples; None where the kernel does not say."""
    size = path.stat().st_size
    found = 0
    with path.open("rb") as file:
        for number in range(CACHE_SAMPLES):
            try:
                os.preadv(file.fileno(), [bytearray(1)], size * number // CACHE_SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return None
            found += 1
    return found / CACHE_SAMPLES


def main(dtype: str, nbytes: int) -> None:
    """Print the seconds that casting `nbytes` of `dtype` takes when neither a file nor a check is in the way."""
    print(cast_in_memory(dtype, nbytes))


def cast_in_memory(dtype: str, nbytes: int, threads: int = 2) -> float:
    """Seconds that `threads` threads of numpy take to cast `nbytes` of F32 to BF16, or of BF16 to F32.

    No more than MEMORY_SPAN bytes a thread are held; larger amounts go over them several times."""
    size, wide = (4, 2) if dtype == "F32" else (2, 4)
    count = nbytes // size // threads
    held = max(1, min(count, MEMORY_SPAN // size))
    random = np.random.Generator(np.random.SFC64(0))
    sources = [random.integers(0, 1 << 8 * size - 2, held, f"u{size}") for _ in range(threads)]
    targets = [np.ones(held, f"u{wide}") for _ in range(threads)]
    start = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_cast_over_and_over, sources, targets, [count] * threads))
    return perf_counter() - start


def _cast_over_and_over(values: Array, out: Array, count: int) -> None:
    cast = _narrow if values.itemsize > out.itemsize else _widen
    while count > 0:
        for start in range(0, min(count, len(values)), CHUNK):
            cast(values[start : start + CHUNK], out[start : start + CHUNK])
        count -= len(values)


def _narrow(bits: Array, out: Array) -> None:
    """F32 to BF16, to nearest, ties to even, as if there were no NaN."""
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[:] = rounded


def _widen(bits: Array, out: Array) -> None:
    out[:] = bits
    out <<= 16


def _described(component: Component, file: Path, *, generated: bool) -> dict[str, Any]:
    return {
        "file": "stand-in with random values" if generated else file.name,
        "component": str(component.stage),
        "variant": str(component.variant),
        "layout": str(component.layout),
        "dtype": _dtype(component),
        "tensors": len(component.tensors),
        "bytes": file.stat().st_size,
    }

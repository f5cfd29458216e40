"""A reference's results in a file: recorded on a machine that holds the model, compared where only the bundle is.

A safetensors file: inputs and outputs of every case and of every pass of the trajectory, the latents after each step,
the image, and the noise that went into it. What they are is in the file's metadata.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..converters.checkpoints.component import Component
from ..converters.export.bundle_weights import source_files
from ..schemas.errors import CheckpointError, UsageError
from ..schemas.json_text import load_json
from ..schemas.stages import Stage
from ..storage.atomic_output import staged_output
from ..storage.file_hashes import fingerprint
from ..storage.safetensors_reader import TensorRange, read_header
from ..storage.safetensors_writer import encode_header
from .reference_run import Call, Expected, Trajectory, noise_tape
from .sample_inputs import Case
from .tolerances import COMPUTES

KEY = "cascadekit_recording"
VERSION = 1
DTYPES: Mapping[str, str] = {"F32": "<f4", "I64": "<i8"}
KINDS = {str(kind): kind for kind in COMPUTES}
NAMES = {np.dtype(numpy): name for name, numpy in DTYPES.items()}

Array = NDArray[Any]


@dataclass(frozen=True)
class Recording:
    """What a file holds, and the fingerprints of the model's files it was recorded of, by stage."""

    expected: Expected
    sources: Mapping[Stage, tuple[str, ...]]


@dataclass(frozen=True)
class _Array:
    values: Array

    @property
    def dtype(self) -> str:
        return NAMES[self.values.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def record(expected: Expected, components: Mapping[Stage, Component], path: Path, *, force: bool = False) -> None:
    """Write `expected`, which the `components` gave. Raises UsageError when the file exists, without `force`, or is one
    of the components'."""
    if expected.trajectory is not None:
        expected = replace(expected, trajectory=replace(expected.trajectory, noise=noise_tape(expected.trajectory)))
    tensors = {name: _Array(np.ascontiguousarray(values)) for name, values in _tensors(expected)}
    sources = {stage: [fingerprint(file) for file in source_files(components[stage])] for stage in expected.stages}
    header = encode_header(tensors, {KEY: json.dumps({**_described(expected), "sources": sources})})
    files = [file for component in components.values() for file in source_files(component)]
    with staged_output(path, force=force, sources=files, files=()) as staged, staged.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.values.tobytes())


def _tensors(expected: Expected) -> Iterator[tuple[str, Array]]:
    for number, (case, outputs) in enumerate(zip(expected.cases, expected.outputs, strict=True)):
        yield from _named(f"case/{number}/in", case.inputs)
        yield from _named(f"case/{number}/out", outputs)
    if (trajectory := expected.trajectory) is None:
        return
    for number, call in enumerate(trajectory.calls):
        yield from _named(f"call/{number}/in", call.inputs)
        yield from _named(f"call/{number}/out", call.outputs)
    yield from _named("latents", trajectory.latents)
    yield from _named("noise", trajectory.noise)
    yield "image/image", trajectory.image


def _named(prefix: str, arrays: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, values in arrays.items():
        yield f"{prefix}/{name}", values


def _described(expected: Expected) -> dict[str, Any]:
    trajectory = expected.trajectory
    return {
        "version": VERSION,
        "reference": expected.reference,
        "cases": [[str(case.stage), case.label, case.t] for case in expected.cases],
        "floors": {str(s): {str(p): _number(f) for p, f in floors.items()} for s, floors in expected.floors.items()},
        "calls": [[str(call.stage), call.number] for call in trajectory.calls] if trajectory else None,
        "gains": {name: _number(gain) for name, gain in trajectory.gains.items()} if trajectory else None,
    }


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def load_recording(path: Path) -> Recording:
    """What `record` wrote. Raises CheckpointError for a damaged file, UsageError for one that is no recording."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise UsageError(f"{path}: not a recording; make one with `cascadekit verify BUNDLE --against MODEL --record`")
    try:
        about = load_json(header.metadata[KEY])
        if about["version"] != VERSION:
            raise UsageError(f"{path}: a recording of version {about['version']}, expected {VERSION}; record it again")
        groups = _grouped(path, header.tensors)
        cases = [
            Case(Stage(stage), label, groups[f"case/{number}/in"], t)
            for number, (stage, label, t) in enumerate(about["cases"])
        ]
        outputs = tuple(groups[f"case/{number}/out"] for number in range(len(cases)))
        floors = {
            Stage(stage): {KINDS[kind]: np.inf if f is None else f for kind, f in floors.items()}
            for stage, floors in about["floors"].items()
        }
        trajectory = _trajectory(about, groups) if about["calls"] else None
        sources = {Stage(stage): tuple(found) for stage, found in about["sources"].items()}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: a damaged recording: {error!r}; record it again") from error
    return Recording(Expected(about["reference"], tuple(cases), outputs, floors, trajectory), sources)


def _trajectory(about: Mapping[str, Any], groups: Mapping[str, dict[str, Array]]) -> Trajectory:
    calls = tuple(
        Call(Stage(stage), count, groups[f"call/{number}/in"], groups[f"call/{number}/out"])
        for number, (stage, count) in enumerate(about["calls"])
    )
    gains = {name: np.inf if gain is None else gain for name, gain in about["gains"].items()}
    return Trajectory(calls, groups["latents"], groups["image"]["image"], gains, groups["noise"])


def _grouped(path: Path, tensors: Mapping[str, TensorRange]) -> dict[str, dict[str, Array]]:
    """The arrays by what comes before the last slash of their names."""
    groups: dict[str, dict[str, Array]] = {"noise": {}}
    for full, tensor in tensors.items():
        group, _, name = full.rpartition("/")
        dtype = np.dtype(DTYPES[tensor.dtype])
        values = np.fromfile(path, dtype, tensor.nbytes // dtype.itemsize, offset=tensor.offset)
        groups.setdefault(group, {})[name] = values.reshape(tensor.shape)
    return groups

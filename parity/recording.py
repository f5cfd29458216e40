"""A file of reference outputs: written on a machine that has the model, compared on one that has the bundle only.

The file is a safetensors file. It holds the inputs and outputs of every sample input and of every pass of the
trajectory, the latents after each step, the image and its noise. Its metadata says what each of them is.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
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
from ..storage.safetensors_plan import CalculatedRange, TensorPlan
from ..storage.safetensors_reader import TensorRange, read_header
from ..storage.safetensors_writer import write_safetensors
from .reference_run import ReferenceOutputs, ReferencePass, StepKey, Trajectory, reproduce_noise
from .tolerances import COMPUTE_DTYPES

KEY = "cascadekit_recording"
VERSION = 1
SAMPLED = (Stage.PRIOR, Stage.DECODER)
IMAGE_GAIN = "image"  # the key of the image's gain
DTYPES: Mapping[str, str] = {"F32": "<f4", "I64": "<i8"}
KINDS = {str(kind): kind for kind in COMPUTE_DTYPES}
NAMES = {np.dtype(numpy): name for name, numpy in DTYPES.items()}

Array = NDArray[Any]


@dataclass(frozen=True)
class Recording:
    """Reference outputs from a file, and by stage the fingerprints of the files of the model that gave them."""

    outputs: ReferenceOutputs
    sources: Mapping[Stage, tuple[str, ...]]


def write_recording(
    outputs: ReferenceOutputs, components: Mapping[Stage, Component], path: Path, *, force: bool = False
) -> None:
    """Write `outputs`, which were computed from `components`.

    Raises UsageError when the file exists and `force` is not set, or when it is one of the components' files."""
    if outputs.trajectory is not None:
        noise = reproduce_noise(outputs.trajectory)
        outputs = replace(outputs, trajectory=replace(outputs.trajectory, noise=noise))
    tensors = {name: _plan(np.ascontiguousarray(values)) for name, values in _tensors(outputs)}
    sources = {stage: [fingerprint(file) for file in source_files(components[stage])] for stage in outputs.stages}
    metadata = {KEY: json.dumps({**_described(outputs), "sources": sources})}
    files = [file for component in components.values() for file in source_files(component)]
    with staged_output(path, force=force, sources=files, files=()) as staged:
        write_safetensors(staged, tensors, metadata)


def _plan(values: Array) -> TensorPlan:
    return TensorPlan(NAMES[values.dtype], values.shape, (CalculatedRange(values.nbytes, lambda: [values]),))


# The names that the file has for the latents after a step, and for an array of noise.
_step_name, _noise_name = "{0[0]} step {0[1]}".format, "{0[0]} draw {0[1]}".format


def _tensors(outputs: ReferenceOutputs) -> Iterator[tuple[str, Array]]:
    trajectory = outputs.trajectory
    for group, passes in (("case", outputs.passes), ("call", trajectory.calls if trajectory else ())):
        for number, each in enumerate(passes):
            yield from _named(f"{group}/{number}/in", each.inputs)
            yield from _named(f"{group}/{number}/out", each.outputs)
    if trajectory is None:
        return
    yield from _named("latents", {_step_name(key): values for key, values in trajectory.latents.items()})
    yield from _named("noise", {_noise_name(key): values for key, values in trajectory.noise.items()})
    yield "image/image", trajectory.image


def _named(prefix: str, arrays: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, values in arrays.items():
        yield f"{prefix}/{name}", values


def _described(outputs: ReferenceOutputs) -> dict[str, Any]:
    floors = {str(s): {str(p): _number(f) for p, f in found.items()} for s, found in outputs.floors.items()}
    about = {
        "version": VERSION,
        "reference": outputs.reference,
        "cases": [[str(each.stage), each.label, each.t] for each in outputs.passes],
        "floors": floors,
        "calls": None,
        "gains": None,
    }
    if (trajectory := outputs.trajectory) is not None:
        gains = {_step_name(key): _number(gain) for key, gain in trajectory.gains.items()}
        about["calls"] = [[str(call.stage), (call.step or 1) - 1] for call in trajectory.calls]
        about["gains"] = {**gains, IMAGE_GAIN: _number(trajectory.image_gain)}
    return about


def _number(value: float) -> float | None:
    """The number, or None for infinity and NaN, which JSON lacks."""
    return value if np.isfinite(value) else None


def read_recording(path: Path) -> Recording:
    """Read what `write_recording` wrote.

    Raises CheckpointError for a damaged file, UsageError for a file that is not a recording."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise UsageError(
            f"{path}: not a recording; make one with `cascadekit verify BUNDLE --against MODEL --record FILE`"
        )
    try:
        about = load_json(header.metadata[KEY])
        if about["version"] != VERSION:
            raise UsageError(f"{path}: a recording of version {about['version']}, expected {VERSION}; record it again")
        groups = _grouped(path, header.tensors)
        passes = tuple(
            ReferencePass(Stage(stage), groups[f"case/{number}/in"], groups[f"case/{number}/out"], label, t)
            for number, (stage, label, t) in enumerate(about["cases"])
        )
        floors = {
            Stage(stage): {KINDS[kind]: np.inf if f is None else f for kind, f in floors.items()}
            for stage, floors in about["floors"].items()
        }
        trajectory = _trajectory(about, groups) if about["calls"] else None
        sources = {Stage(stage): tuple(found) for stage, found in about["sources"].items()}
        return Recording(ReferenceOutputs(str(about["reference"]), passes, floors, trajectory), sources)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: a damaged recording: {error!r}; record it again") from error


def _trajectory(about: Mapping[str, Any], groups: Mapping[str, dict[str, Array]]) -> Trajectory:
    calls = tuple(
        ReferencePass(Stage(stage), groups[f"call/{number}/in"], groups[f"call/{number}/out"], step=before + 1)
        for number, (stage, before) in enumerate(about["calls"])  # how many calls of the stage were before
    )
    latents, noise = groups["latents"], groups["noise"]
    gains = {name: np.inf if gain is None else gain for name, gain in about["gains"].items()}
    return Trajectory(
        calls,
        {key: latents[name] for key, name in _keys(latents, _step_name)},
        groups["image"]["image"],
        {key: gains[name] for key, name in _keys(latents, _step_name)},
        image_gain=gains[IMAGE_GAIN],
        noise={key: noise[name] for key, name in _keys(noise, _noise_name)},
    )


def _keys(found: Mapping[str, Any], name_of: Callable[[StepKey], str]) -> Iterator[tuple[StepKey, str]]:
    """The steps of each stage, counted up as long as `found` has their names; each with its name."""
    for stage in SAMPLED:
        keys = ((stage, number) for number in count(1))
        yield from takewhile(lambda item: item[1] in found, ((key, name_of(key)) for key in keys))


def _grouped(path: Path, tensors: Mapping[str, TensorRange]) -> dict[str, dict[str, Array]]:
    """The arrays of the file in groups: a tensor named group/name is in the group before its last slash."""
    groups: dict[str, dict[str, Array]] = {"noise": {}}
    for full, tensor in tensors.items():
        group, _, name = full.rpartition("/")
        dtype = np.dtype(DTYPES[tensor.dtype])
        values = np.fromfile(path, dtype, tensor.nbytes // dtype.itemsize, offset=tensor.offset)
        groups.setdefault(group, {})[name] = values.reshape(tensor.shape)
    return groups

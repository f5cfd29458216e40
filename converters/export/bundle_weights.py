"""Brings the weights of a stage into its folder of a bundle: as clones, as copies or as hard links."""

import errno
import fcntl
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ...schemas.block_types import QUANTISED
from ...schemas.callbacks import StartFile
from ...schemas.casts import target_dtype
from ...schemas.dtypes import FP8
from ...schemas.errors import ExportError
from ...schemas.manifest import Placement
from ...schemas.passport_keys import without_passport
from ...schemas.paths import problem_of_name
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange, read_header
from ...storage.safetensors_writer import write_safetensors
from ...storage.weights_file import is_pickle
from ..checkpoints.component import Component
from .export_options import ExportOptions, WeightsMode

WEIGHTS_NAME = "weights.safetensors"
OVERFLOW_ADVICE = 'export it with precision="bf16", which reaches as far as float32, or store it with storage="bf16"'
FICLONE = 0x40049409  # Linux: one file becomes a clone of another, its blocks shared until either changes

PROJECTIONS = {part: names for names in (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")) for part in names}
PROJECTION = re.compile(rf"(.*\.)({'|'.join(PROJECTIONS)})(\.weight|\.bias)")


@dataclass(frozen=True)
class StageWeights:
    """The weights of a stage in its folder of the bundle.

    `placement` is the way in which the files came there. `tensors` maps diffusers names to byte ranges of `files`.
    `notes` are lines for the user about values that were changed."""

    placement: Placement
    tensors: dict[str, TensorRange]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def add_weights(
    component: Component,
    folder: Path,
    mode: WeightsMode,
    *,
    dtype: str | None = None,
    start_file: StartFile | None = None,
) -> StageWeights:
    """Bring the weights of `component` into the empty `folder`.

    | mode | where the file system clones | elsewhere |
    |---|---|---|
    | "auto" | clones of the model's files | copies |
    | "link" | clones | hard links; onnx.load refuses graphs with hard-linked weights |
    | "copy" | copies | copies |

    `dtype` (F32, BF16, F16) is the dtype to store the weights in; weights of another dtype are copied.

    Raises ExportError when "link" is impossible, with the reason, and ConversionError for values that `dtype` cannot
    hold."""
    if mode != "copy":
        reason = why_not_as_is(component, dtype)
        try:
            if reason is None and (how := _share(component, folder, links=mode == "link")):
                files = tuple(folder / source.name for source in source_files(component))
                tensors = {name: replace(t, path=folder / t.path.name) for name, t in component.tensors.items()}
                return StageWeights(how, tensors, files)
        except OSError as error:
            reason = f"{source_files(component)[0]}: cannot be hard-linked into {folder.parent}: {error.strerror}"
        for half_done in folder.iterdir():
            half_done.unlink()
        if mode == "link":
            raise ExportError(f'{reason}; use weights="copy"')
    return copy_weights(component, folder, start_file, dtype=dtype)


def stored_dtype(component: Component, options: ExportOptions) -> str | None:
    """The dtype to store the weights in; None: as the model has them. Links keep the model's dtype unless `storage` is
    given. Graphs read neither fp8 nor GGUF's blocks: these become the narrowest dtype that holds every value exactly.
    """
    is_linked = options.weights == "link" and options.storage is None
    asked = None if is_linked else options.storage_of(component.stage)
    if asked is not None or not set(component.dtypes) & {*FP8, *QUANTISED}:
        return asked
    exact = {*FP8, "BF16"}  # what BF16 holds exactly; GGUF's blocks need the digits of scale times code
    tensors = component.tensors.values()
    return "BF16" if all(tensor.dtype in exact and not tensor.scale for tensor in tensors) else "F32"


def why_not_as_is(component: Component, dtype: str | None) -> str | None:
    """Why a graph cannot refer to the model's files without a copy; None when it can."""
    for name, tensor in component.tensors.items():
        if tensor.transposed:
            return f"{tensor.path}: {name} is stored transposed"
        if tensor.scale is not None:
            return f"{tensor.path}: {name} is {tensor.dtype} with scales"
        if tensor.dtype in QUANTISED:
            return f"{tensor.path}: {name} is quantised ({tensor.dtype})"
        if target_dtype(tensor.dtype, dtype) != tensor.dtype:
            return f"{tensor.path}: {name} is stored as {tensor.dtype}, not as {dtype}"
    sources = source_files(component)
    pickles = [path for path in sources if is_pickle(path)]
    if pickles:
        return f"{pickles[0]}: a pickled checkpoint, not a safetensors file"
    named = [f"{path}: the name {problem}" for path in sources if (problem := problem_of_name(path.name))]
    return named[0] if named else None


def _share(component: Component, folder: Path, *, links: bool) -> Placement | None:
    """Clone the files of `component` into `folder`, or hard-link them where `links` allows it.

    Returns None for a file that can be neither cloned nor linked. ONNX refuses symbolic links. Raises OSError when a
    file cannot be linked."""
    placements: set[Placement] = set()
    for source in source_files(component):
        if clone(source, folder / source.name):
            placements.add("reflink")
        elif links:
            os.link(source.resolve(), folder / source.name)
            placements.add("link")
        else:
            return None
    return "link" if "link" in placements else "reflink"


def clone(source: Path, target: Path) -> bool:
    """Make `target` a clone of `source`; False where the file system cannot clone.

    A clone shares its blocks on disk with `source` until either changes. Raises OSError when `target` cannot be
    made."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            return True
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    target.unlink()
    return False


def copy_weights(
    component: Component, folder: Path, start_file: StartFile | None = None, *, dtype: str | None = None
) -> StageWeights:
    """Write the weights of `component` into one new file in `folder`, in `dtype` or as the model stores them."""
    path = folder / WEIGHTS_NAME
    tensors = component.tensors
    plans = {
        name: TensorPlan(target_dtype(tensors[name].dtype, dtype), tensors[name].shape, (tensors[name],))
        for name in projections_together(tensors)
    }
    total = sum(plan.nbytes for plan in plans.values())
    progress = start_file(f"{component.stage}/{WEIGHTS_NAME}", total) if start_file else None
    metadata = {"format": "pt", **without_passport(component.metadata)}  # cascade.json says what a bundle is made of
    counts = write_safetensors(path, plans, metadata, progress, overflow_advice=OVERFLOW_ADVICE)
    notes = counts.notes(f"{component.stage}/{WEIGHTS_NAME}")
    return StageWeights("copy", read_header(path).tensors, (path,), notes)


def projections_together(names: Iterable[str]) -> list[str]:
    """Sort `names` so that the query, key and value projections of each attention are adjacent, weights and biases
    apart. A graph can then read the three as one tensor. All other names keep their order."""
    present = dict.fromkeys(names)
    done: set[str] = set()
    result = []
    for name in present:
        found = PROJECTION.fullmatch(name)
        triple = [f"{found[1]}{part}{found[3]}" for part in PROJECTIONS[found[2]]] if found else [name]
        result += [each for each in triple if each in present and each not in done]
        done.update(triple)
    return result


def source_files(component: Component) -> list[Path]:
    """The files that hold the tensors of `component`, sorted."""
    return sorted({tensor.path for tensor in component.tensors.values()})

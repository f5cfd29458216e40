"""Brings a stage's weights into its folder of a bundle: cloned where the file system can, else copied, or linked."""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ...schemas.bundle import Placement
from ...schemas.callbacks import Progress
from ...schemas.errors import ExportError, UsageError
from ...schemas.paths import problem_of_name
from ...storage.cast import target_dtype
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange, read_header
from ...storage.safetensors_writer import write_safetensors
from ...storage.weights_file import is_pickle
from ..checkpoints.component import Component

WEIGHTS_NAME = "weights.safetensors"
OVERFLOW_ADVICE = "export it with --precision bf16, which reaches as far as float32, or store it so with --storage"
FICLONE = 0x40049409  # Linux: one file becomes a clone of another, its blocks shared until either changes

PROJECTIONS = {part: names for names in (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")) for part in names}
PROJECTION = re.compile(rf"(.*\.)({'|'.join(PROJECTIONS)})(\.weight|\.bias)")

StartFile = Callable[[str, int], Progress]
Wish = Literal["auto", "link", "copy"]
WISHES: tuple[Wish, ...] = get_args(Wish)


@dataclass(frozen=True)
class Placed:
    """A stage's weights in its folder: how they came there, its tensors by diffusers names, its files, and what a user
    should know of their values."""

    how: Placement
    tensors: dict[str, TensorRange]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def place_weights(
    component: Component,
    folder: Path,
    wish: Wish,
    *,
    dtype: str | None = None,
    start_file: StartFile | None = None,
) -> Placed:
    """Bring the weights of `component` into `folder`. "auto" clones its files where the file system clones, else copies
    them. "link" takes hard links in place of copies: onnx.load refuses graphs whose weights are hard links.
    With `dtype` (F32, BF16, F16) they are stored in that one, which takes a copy unless they are so already.

    Raises ExportError when "link" is impossible, naming the reason, ConversionError for values `dtype` cannot hold."""
    if wish not in WISHES:
        raise UsageError(f"weights {wish!r}: expected one of {', '.join(WISHES)}")
    if wish != "copy":
        reason = _why_not_as_is(component, dtype)
        try:
            if reason is None and (how := _share(component, folder, links=wish == "link")):
                files = tuple(folder / source.name for source in source_files(component))
                return Placed(how, moved(component.tensors, folder), files)
        except OSError as error:
            reason = f"{source_files(component)[0]}: cannot be hard-linked into {folder.parent}: {error.strerror}"
        for half_done in folder.iterdir():
            half_done.unlink()
        if wish == "link":
            raise ExportError(f"{reason}; use --weights copy")
    return copy_weights(component, folder, start_file, dtype=dtype)


def _why_not_as_is(component: Component, dtype: str | None) -> str | None:
    """Why a graph cannot refer to the model's files as they are."""
    for name, tensor in component.tensors.items():
        if tensor.transposed:
            return f"{tensor.path}: {name} lies transposed"
        if tensor.scale is not None:
            return f"{tensor.path}: {name} is scaled fp8"
        if target_dtype(tensor.dtype, dtype) != tensor.dtype:
            return f"{tensor.path}: {name} is stored as {tensor.dtype}, not as {dtype}"
    sources = source_files(component)
    pickles = [path for path in sources if is_pickle(path)]
    if pickles:
        return f"{pickles[0]}: a pickled checkpoint, not a safetensors file"
    named = [f"{path}: the name {problem}" for path in sources if (problem := problem_of_name(path.name))]
    return named[0] if named else None


def _share(component: Component, folder: Path, *, links: bool) -> Placement | None:
    """Clone the files of `component` into `folder`, or link them hard where `links` allows; None where a file can be
    neither. ONNX refuses symbolic links. Raises OSError when a file cannot be linked."""
    ways: set[Placement] = set()
    for source in source_files(component):
        if clone(source, folder / source.name):
            ways.add("reflink")
        elif links:
            os.link(source.resolve(), folder / source.name)
            ways.add("link")
        else:
            return None
    return "link" if "link" in ways else "reflink"


def clone(source: Path, target: Path) -> bool:
    """Make `target` a clone of `source` where the file system can. Raises OSError when `target` cannot be made."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            return True
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    target.unlink()
    return False


def moved(tensors: dict[str, TensorRange], folder: Path) -> dict[str, TensorRange]:
    """The same ranges in files of the same names in `folder`."""
    return {
        name: TensorRange(folder / t.path.name, t.dtype, t.shape, t.offset, t.nbytes, t.transposed)
        for name, t in tensors.items()
    }


def copy_weights(
    component: Component, folder: Path, start_file: StartFile | None = None, *, dtype: str | None = None
) -> Placed:
    """Write the weights of `component` into a file of the bundle's own, in `dtype` or as they are stored."""
    path = folder / WEIGHTS_NAME
    tensors = component.tensors
    plans = {
        name: TensorPlan(target_dtype(tensors[name].dtype, dtype), tensors[name].shape, (tensors[name],))
        for name in projections_together(tensors)
    }
    total = sum(plan.nbytes for plan in plans.values())
    progress = start_file(f"{component.stage}/{WEIGHTS_NAME}", total) if start_file else None
    metadata = {"format": "pt", **component.metadata}
    counts = write_safetensors(path, plans, metadata, progress, overflow_advice=OVERFLOW_ADVICE)
    notes = counts.notes(f"{component.stage}/{WEIGHTS_NAME}")
    return Placed("copy", read_header(path).tensors, (path,), notes)


def projections_together(names: Iterable[str]) -> list[str]:
    """The names with queries, keys and values of each attention side by side, weights and biases apart, so that a
    graph can take them as one; all others keep their order."""
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
    """The files its tensors lie in."""
    return sorted({tensor.path for tensor in component.tensors.values()})

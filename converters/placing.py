"""Brings a stage's weights into its folder of a bundle: linked where they can stay as they are, else copied."""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..runtime.integrity import WHOLE_BELOW, sha256_of
from ..schemas.bundle import Placement
from ..schemas.errors import ExportError, UsageError
from .cast import target_dtype
from .identify import Component
from .plans import TensorPlan
from .safetensors_file import Progress, TensorRange, read_header
from .safetensors_writer import write_file
from .weights_file import is_pickle

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
    """A stage's weights in its folder: how they came there, its tensors by diffusers names, its files with their
    SHA-256 where it is known, and what a user should know of their values."""

    how: Placement
    tensors: dict[str, TensorRange]
    files: dict[Path, str | None]
    notes: tuple[str, ...] = ()


def place_weights(
    component: Component,
    folder: Path,
    wish: Wish,
    *,
    dtype: str | None = None,
    hashed: bool = False,
    start_file: StartFile | None = None,
) -> Placed:
    """Bring the weights of `component` into `folder`. "link" clones its files or, where the file system does not
    clone, links them hard; "auto" copies where neither is possible. Files are hashed if `hashed`, small copies always.
    With `dtype` (F32, BF16, F16) they are stored in that one, which takes a copy unless they are so already.

    Raises ExportError when "link" is impossible, naming the reason, ConversionError for values `dtype` cannot hold."""
    if wish not in WISHES:
        raise UsageError(f"weights {wish!r}: expected one of {', '.join(WISHES)}")
    if wish != "copy":
        reason = _why_not_as_is(component, dtype)
        try:
            if reason is None:
                return _linked(component, folder, hashed)
        except OSError as error:
            reason = f"{source_files(component)[0]}: cannot be hard-linked into {folder.parent}: {error.strerror}"
            for half_done in folder.iterdir():
                half_done.unlink()
        if wish == "link":
            raise ExportError(f"{reason}; use --weights copy")
    return copy_weights(component, folder, start_file, dtype=dtype, hashed=hashed)


def _why_not_as_is(component: Component, dtype: str | None) -> str | None:
    """Why a graph cannot refer to the model's files as they are."""
    for name, tensor in component.tensors.items():
        if tensor.transposed:
            return f"{tensor.path}: {name} lies transposed"
        if tensor.scale is not None:
            return f"{tensor.path}: {name} is scaled fp8"
        if target_dtype(tensor.dtype, dtype) != tensor.dtype:
            return f"{tensor.path}: {name} is stored as {tensor.dtype}, not as {dtype}"
    odd = [path for path in source_files(component) if is_pickle(path)]
    return f"{odd[0]}: a pickled checkpoint, not a safetensors file" if odd else None


def _linked(component: Component, folder: Path, hashed: bool) -> Placed:
    sources = source_files(component)
    ways = {source: _clone_or_link(source, folder / source.name) for source in sources}
    return Placed(
        how="link" if "link" in ways.values() else "reflink",
        tensors=moved(component.tensors, folder),
        files={folder / s.name: sha256_of(folder / s.name) if hashed else None for s in sources},
    )


def _clone_or_link(source: Path, target: Path) -> Placement:
    """ONNX wants its data inside the model's folder and refuses symbolic links."""
    if clone(source, target):
        return "reflink"
    os.link(source.resolve(), target)
    return "link"


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
    component: Component,
    folder: Path,
    start_file: StartFile | None = None,
    *,
    dtype: str | None = None,
    hashed: bool = False,
) -> Placed:
    """Write the weights of `component` into a file of the bundle's own, in `dtype` or as they are stored. It is
    hashed if it is small or `hashed`: one stream of SHA-256 is slower than a disk."""
    path = folder / WEIGHTS_NAME
    tensors = component.tensors
    plans = {
        name: TensorPlan(target_dtype(tensors[name].dtype, dtype), tensors[name].shape, (tensors[name],))
        for name in projections_together(tensors)
    }
    total = sum(plan.nbytes for plan in plans.values())
    progress = start_file(f"{component.stage}/{WEIGHTS_NAME}", total) if start_file else None
    metadata = {"format": "pt", **component.metadata}
    counts = write_file(path, plans, metadata, progress, overflow_advice=OVERFLOW_ADVICE)
    notes = counts.notes(f"{component.stage}/{WEIGHTS_NAME}")
    return Placed("copy", read_header(path).tensors, {path: recorded_sha256(path, hashed)}, notes)


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


def recorded_sha256(path: Path, hashed: bool) -> str | None:
    """What the manifest is to have of a finished copy: its SHA-256 if it is small or `hashed`."""
    return sha256_of(path) if hashed or path.stat().st_size < WHOLE_BELOW else None


def source_files(component: Component) -> list[Path]:
    """The files its tensors lie in."""
    return sorted({tensor.path for tensor in component.tensors.values()})

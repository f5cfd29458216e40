"""LoRAs by name when a bundle is opened: a bundle with them merged in, made once and kept in a cache.

What is kept shares every file that the LoRAs leave alone with the bundle it was made from, so the cache costs as much
disk as the weights that change; on another file system, though, as much as the whole bundle.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas.callbacks import Say, StartFile
from ...schemas.errors import CascadeError, ConversionError, UsageError, reraise_interrupt
from ...storage.bundle import Bundle, open_bundle
from ...storage.file_hashes import fingerprint
from ...storage.user_cache import CACHE, user_cache
from .peft_config import CONFIG_NAME
from .read_formats import FOLDER_NAMES, holds_lora

if TYPE_CHECKING:
    from .merge_bundle import Applied

FOLDERS = "CASCADEKIT_LORAS"  # environment: where LoRAs are looked for by name
SUFFIX = ".safetensors"
KEY_DIGITS = 20  # of the SHA-256 that names a folder in the cache


def with_loras(
    bundle: str | Path,
    loras: Sequence[tuple[str | Path, float]],
    cache: Path | None = None,
    *,
    start_file: StartFile | None = None,
    say: Say = lambda text: None,
) -> Path:
    """The path of a bundle that is `bundle` with `loras` merged in, each a path or a name for `find_lora` and its
    strength; `bundle` itself without any.

    It is made in the folder `cache` (None: see `user_cache`) if it is not there yet, whole and unchanged; of several
    processes that want the same one, one makes it. `say` then hears what of the LoRAs did not apply.
    Raises UsageError for LoRAs that cannot be found, for strengths that are not finite and for a bundle that has LoRAs
    merged in already, ConversionError when the cache cannot be written, and what `apply_loras` raises."""
    if not loras:
        return Path(bundle)
    opened = open_bundle(Path(bundle))
    strengths = [strength for _, strength in loras]
    if not all(map(math.isfinite, strengths)):
        raise UsageError(f"LoRA strengths {', '.join(map(str, strengths))}: expected finite numbers, such as 0.8")
    paths = [find_lora(lora) for lora, _ in loras]
    target = (cache or user_cache("loras")) / _key(opened, paths, strengths)
    with _alone(target):
        if not _is_whole(target):
            done = _merging()(opened.root, target, paths, strengths=strengths, start_file=start_file)
            for text in (*done.notes, *(f"not applied: {part}" for part in done.unapplied)):
                say(text)
    return target


def find_lora(lora: str | Path) -> Path:
    """Where a LoRA lies: a file or a PEFT adapter's folder, or a name without folders, which stands for NAME or
    NAME.safetensors in one of the folders that $CASCADEKIT_LORAS lists, the first that has it.

    Raises UsageError when there is none, listing those there are."""
    path = Path(lora)
    if path.is_file() or (path.is_dir() and holds_lora(path)):
        return path
    if path.name != str(lora):
        raise UsageError(f"{lora}: no such LoRA file; check the path")
    folders = [Path(name) for name in os.environ.get(FOLDERS, "").split(os.pathsep) if name]
    name = path.name if path.name.endswith(SUFFIX) else path.name + SUFFIX
    for folder in folders:
        for found in (folder / name, folder / path.name):
            if found.is_file():
                return found
    if not folders:
        raise UsageError(f"{lora}: no such LoRA file; give its path, or list your folders of LoRAs in ${FOLDERS}")
    have = sorted({found.stem for folder in folders for found in folder.glob("*" + SUFFIX)})
    where = ", ".join(map(str, folders))
    raise UsageError(f"{lora}: no {name} in {where} (${FOLDERS}); there are: {', '.join(have) or 'none'}")


def _merging() -> Callable[..., "Applied"]:
    """What makes the bundle; what is in the cache can be had without the onnx package that this reads graphs with."""
    try:
        from .merge_bundle import derive_bundle
    except ImportError as error:
        reraise_interrupt(error)
        raise UsageError(
            "merging LoRAs takes the onnx package, which is not installed: pip install 'cascadekit[export]'"
        ) from error
    return derive_bundle


def _key(bundle: Bundle, loras: Sequence[Path], strengths: Sequence[float]) -> str:
    """Names what the merge is made of: the bundle's manifest but for the times of its files, the LoRAs' names,
    contents and strengths in their order, and the program that merges."""
    merged = [[path.name, _fingerprints(path), strength] for path, strength in zip(loras, strengths, strict=True)]
    parts = [version("cascadekit"), _without_times(bundle.manifest.model_dump(mode="json")), merged]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return digest[:KEY_DIGITS]


def _fingerprints(lora: Path) -> list[tuple[str, str]]:
    """Of the LoRA's file and of the settings of an adapter, which scale it."""
    folder, names = (lora, FOLDER_NAMES) if lora.is_dir() else (lora.parent, (lora.name,))
    return [(name, fingerprint(folder / name)) for name in (*names, CONFIG_NAME) if (folder / name).is_file()]


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_times(part) for key, part in value.items() if key != "mtime_ns"}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def _is_whole(target: Path) -> bool:
    """Whether a bundle is there of which nothing is missing or changed."""
    try:
        found = open_bundle(target)
        for stage in found.manifest.stages:
            found.check(stage)
        return found.tokenizer_change() is None
    except CascadeError:
        return False


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait until no other process makes `target`. The lock goes with the process, its empty file stays: whoever removed
    it could take it from under one who waits."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConversionError(
            f"{lock.parent}: the cache of LoRAs cannot be written: {error.strerror}; set ${CACHE} to a folder that can"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

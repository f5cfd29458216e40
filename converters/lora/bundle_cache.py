"""Keeps bundles with merged LoRAs in a cache, so that a bundle can be opened with LoRAs by their names.

A cached bundle shares all files that the LoRAs do not change with its original. It takes as much disk as the changed
weights, or as the whole bundle when the cache is on another file system.
"""

from __future__ import annotations  # help() shows the types as they are written here

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas.callbacks import Say, StartFile, ignored
from ...schemas.errors import CascadeError, ConversionError, MissingPackageError, UsageError, reraise_interrupt
from ...schemas.messages import known_keywords, shown
from ...storage.bundle import Bundle, open_bundle
from ...storage.file_hashes import fingerprint
from ...storage.install_hint import install_hint
from ...storage.locks import locked
from ...storage.user_cache import CACHE, user_cache
from .peft_config import CONFIG_NAME
from .read_formats import FOLDER_NAMES, holds_lora

if TYPE_CHECKING:
    from .merge_plan import Merge

FOLDERS = "CASCADEKIT_LORAS"  # environment variable: the folders in which LoRAs are searched by name
SUFFIX = ".safetensors"
KEY_DIGITS = 20  # digits of the SHA-256 that names a folder in the cache


@known_keywords
def with_loras(
    bundle: str | Path,
    loras: str | Path | Sequence[tuple[str | Path, float] | str | Path],
    cache: Path | None = None,
    *,
    start_file: StartFile | None = None,
    say: Say = ignored,
) -> Path:
    """Return the path of a copy of `bundle` with `loras` merged in; `bundle` itself when there are no LoRAs.

        cascade = Cascade.open(with_loras("bundle", [("style.safetensors", 0.8)]))

    Each LoRA is a path, or a name for `find_lora`, and its strength (1 for a path alone). The copy is made in the
    folder `cache` (None: see `user_cache`) unless it is there, whole and unchanged. If several processes ask for it,
    one of them makes it. `say` is called with each part of a LoRA that did not apply.

    Raises UsageError for a LoRA that is not found, for a strength that is not finite, and for a bundle with LoRAs in it
    already; ConversionError when the cache cannot be written; and the errors of `apply_loras`."""
    if not loras:
        return Path(bundle)
    opened = open_bundle(Path(bundle))
    several = [loras] if isinstance(loras, str | Path) else loras
    given = [(lora, 1.0) if isinstance(lora, str | Path) else lora for lora in several]
    for pair in given:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise UsageError(f'loras: expected paths or pairs, as ("style.safetensors", 0.8), found {shown(pair)}')
    strengths = [strength for _, strength in given]
    if not all(map(math.isfinite, strengths)):
        raise UsageError(f"LoRA strengths {', '.join(map(str, strengths))}: expected finite numbers, such as 0.8")
    paths = [find_lora(lora) for lora, _ in given]
    target = (cache or user_cache("loras")) / _key(opened, paths, strengths)
    with _alone(target):
        if not _is_whole(target):
            done = _merging()(opened.root, target, paths, strengths=strengths, start_file=start_file)
            for text in (*done.notes, *(f"not applied: {part}" for part in done.unapplied)):
                say(text)
    return target


def find_lora(lora: str | Path) -> Path:
    """Return the path of a LoRA, which is given by its path or by its name.

    A path leads to a file or to the folder of a PEFT adapter. A name stands for NAME or NAME.safetensors in the first
    folder of $CASCADEKIT_LORAS that has it. Raises UsageError when nothing is found; the message lists the names."""
    path = Path(lora)
    if path.is_file() or (path.is_dir() and holds_lora(path)):
        return path
    if path.name != str(lora):
        raise UsageError(f"{lora}: no such LoRA file; check the path")
    folders = _named_folders()
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


def listed_loras(folders: Sequence[Path] = ()) -> dict[str, str]:
    """The LoRAs in `folders` and in those of $CASCADEKIT_LORAS, by name, and what `find_lora` takes for each.

    A LoRA is a .safetensors file or the folder of a PEFT adapter. The first of several with one name counts."""
    found: dict[str, str] = {}
    for path in (path for folder in folders for path in _loras_in(folder)):
        found.setdefault(path.stem, str(path))
    for path in (path for folder in _named_folders() for path in _loras_in(folder)):
        found.setdefault(path.stem, path.stem if path.is_file() else str(path))
    return found


def _named_folders() -> list[Path]:
    return [Path(name) for name in os.environ.get(FOLDERS, "").split(os.pathsep) if name]


def _loras_in(folder: Path) -> list[Path]:
    """The LoRAs of a folder in the order of their names; none where there is no such folder."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in entries if (path.is_dir() and holds_lora(path)) or _is_lora_file(path)]


def _is_lora_file(path: Path) -> bool:
    return path.suffix == SUFFIX and not path.name.startswith(".") and path.is_file()


def _merging() -> Callable[..., Merge]:
    """Return `derive_bundle`. It needs the onnx package, which reading the cache does not."""
    try:
        from .merge_bundle import derive_bundle
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(
            f"merging LoRAs needs the onnx package, which is not installed: {install_hint('export')}"
        ) from error
    return derive_bundle


def _key(bundle: Bundle, loras: Sequence[Path], strengths: Sequence[float]) -> str:
    """Return a name for a merge.

    It depends on the version of this package, the bundle's manifest without times of files, and the LoRAs' names,
    contents and strengths in their order."""
    merged = [[path.name, _fingerprints(path), strength] for path, strength in zip(loras, strengths, strict=True)]
    parts = [version("cascadekit"), _without_times(bundle.manifest.model_dump(mode="json")), merged]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return digest[:KEY_DIGITS]


def _fingerprints(lora: Path) -> list[tuple[str, str]]:
    """Return names and digests of the LoRA's file and of the settings of an adapter, which scale it."""
    folder, names = (lora, FOLDER_NAMES) if lora.is_dir() else (lora.parent, (lora.name,))
    return [(name, fingerprint(folder / name)) for name in (*names, CONFIG_NAME) if (folder / name).is_file()]


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_times(part) for key, part in value.items() if key != "mtime_ns"}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def _is_whole(target: Path) -> bool:
    """Return whether `target` is a bundle without a missing or changed file."""
    try:
        found = open_bundle(target)
        for stage in found.manifest.stages:
            found.check(stage)
        return found.tokenizer_change() is None
    except CascadeError:
        return False


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock on `target`, and wait for it while another process holds it.

    The lock ends with the process. Its empty file stays: another process may be waiting for the lock on it."""
    lock = target.with_name(f".{target.name}.lock")

    def prepare() -> None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()

    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, prepare, wait=True, output=target))
        except OSError as error:
            raise ConversionError(
                f"{lock.parent}: the cache of LoRAs cannot be written: {error.strerror}; set ${CACHE} to another folder"
            ) from error
        yield

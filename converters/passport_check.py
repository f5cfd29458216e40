"""Compares files with their passports: weights files, ONNX graphs, and the other files of a model folder.

Most files that are inspected have no passport, so the modules that hash are imported when one is found."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..schemas.errors import CheckpointError
from ..schemas.folders import MODEL_INDEXES
from ..schemas.json_text import load_object
from ..schemas.passport_keys import ALGORITHM, FOLDER_KEY, KEY, SHOWN_DIGITS, load_passport, shown_source
from ..storage.weights_file import is_pickle, read_weights

SAID = {"layout": "layout ", "precision": "precision ", "quantization": "quantized to "}  # words before a value
COUNTERS = "I64"  # the dtype of the counters of batch norms, beside weights of any dtype
SAME, NOT_COMPARED = "every byte is as it was written", "its bytes were not compared"


@dataclass(frozen=True)
class PassportState:
    """A file's passport as plain values, None when it has none, and the result of comparing the two in words."""

    path: Path
    passport: dict[str, Any] | None
    good: bool
    text: str

    def to_json(self) -> dict[str, Any]:
        """The state as plain values."""
        return {"path": str(self.path), "passport": self.passport, "good": self.good, "state": self.text}


def check_passports(files: Iterable[Path], *, hash: bool) -> tuple[PassportState, ...]:
    """Return the state of each weights file that has a passport; with `hash`, of the others too.

    With `hash`, every byte is compared, else those of files below 64 MiB. Raises CheckpointError for a file that cannot
    be read."""
    texts = ((path, None if is_pickle(path) else read_weights(path).metadata.get(KEY)) for path in files)
    return tuple(check_passport(path, text, hash=hash) for path, text in texts if hash or text is not None)


def check_passport(path: Path, found: str | dict[str, Any] | None, *, hash: bool) -> PassportState:
    """Return the state of a file whose passport is `found`. A file that is not on this machine is not compared."""
    if found is None:
        return PassportState(path, None, not hash, "it has no passport to compare its bytes with")
    from ..storage.file_hashes import WHOLE_BELOW

    try:
        passport = load_passport(found)
    except ValueError as error:
        return PassportState(path, None, False, f"changed: {error}")
    if unknown := _unknown_digest(passport):
        return PassportState(path, passport, not hash, unknown)
    if not path.is_file() or (not hash and path.stat().st_size >= WHOLE_BELOW):
        return PassportState(path, passport, True, NOT_COMPARED)
    problem = _changed(path, passport)
    return PassportState(path, passport, problem is None, problem or SAME)


def check_folder(folder: Path, *, hash: bool) -> tuple[PassportState, ...]:
    """Return the state of a model folder's index, which has the passport of the folder's other files; none without it.

    These files are small, and always compared."""
    index = next((folder / name for name in MODEL_INDEXES if (folder / name).is_file()), None)
    if index is None:
        return ()
    try:
        found = load_object(index.read_bytes()).get(FOLDER_KEY)
    except ValueError as error:
        return (PassportState(index, None, False, f"changed: {error}"),)
    if found is None and not hash:
        return ()
    state = check_passport(index, found, hash=hash)
    problems = [*_changed_files(folder, state.passport)] if state.passport and state.text == SAME else []
    return (replace(state, good=False, text="; ".join(problems)) if problems else state,)


def _changed_files(folder: Path, passport: dict[str, Any]) -> Iterator[str]:
    from ..storage.file_hashes import sha256_of

    files = passport.get("files", {})
    for name, known in files.items():
        try:
            found = sha256_of(folder / name)
        except CheckpointError:
            yield f"{name} is missing"
            continue
        if found != known:
            yield f"{name} was changed"


def _unknown_digest(passport: dict[str, Any]) -> str | None:
    algorithm = str(passport["content"]).partition(":")[0]
    if algorithm == ALGORITHM:
        return None
    return (
        f"its digest is of the kind {algorithm}, which this version of cascadekit does not calculate; inspect the file "
        "with the version that wrote it, or write it again for a new passport"
    )


def _changed(path: Path, passport: dict[str, Any]) -> str | None:
    from ..storage.content_digest import content_of

    stated = passport["content"]
    found = content_of(path, stated)
    if found == stated:
        return None
    digits = (text.rpartition(":")[2][:SHOWN_DIGITS] for text in (stated, found))
    return "changed since it was written: expected {}..., found {}...".format(*digits)


def facts_of(passport: dict[str, Any]) -> dict[str, str]:
    """Return by whom and how a file was made, as in {"by": "by cascadekit 0.1.0", "dtypes": "dtype F16"}.

    Nothing but the form of its digest is known of the passport, which may come from anywhere."""
    facts = {"by": f"by {passport.get('created_by', 'unknown')}"}
    for key, said in SAID.items():
        if isinstance(passport.get(key), str):
            facts[key] = said + passport[key]
    dtypes, exponents, files = (_dict(passport, key) for key in ("dtypes", "exponents", "files"))
    if floats := [dtype for dtype in dtypes if dtype != COUNTERS]:
        facts["dtypes"] = f"dtype {'+'.join(floats)}"
    if loras := _list(passport, "loras"):
        facts["loras"] = ", ".join(f"LoRA {lora.get('name')} ({lora.get('strength')})" for lora in loras)
    if exponents:
        facts["exponents"] = f"exponents {', '.join(f'{name} {value}' for name, value in exponents.items())}"
    if files:
        facts["files"] = f"for {len(files)} files without weights"
    if isinstance(passport.get("values"), str):
        facts["values"] = passport["values"]  # at the end, where "from" follows
    return facts


def sources_of(passport: dict[str, Any] | None) -> list[str]:
    """Return the sources by name and the beginning of their fingerprints, as in "stage_c.safetensors (1f3a...)"."""
    return [shown_source(each.get("name"), each.get("fingerprint")) for each in _list(passport or {}, "sources")]


def _dict(passport: dict[str, Any], key: str) -> dict[str, Any]:
    found = passport.get(key)
    return found if isinstance(found, dict) else {}


def _list(passport: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = passport.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

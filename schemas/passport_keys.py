"""The keys of passports in files, the form of their digests, and a quick reader.

The models in `passport` take 0.2 s to import, which `inspect` does not wait for."""

import re
from collections.abc import Mapping
from typing import Any

from .json_text import load_object

FORMAT = "cascadekit-passport"
KEY = "cascadekit.passport"  # in the metadata of a file
FOLDER_KEY = "_cascadekit_passport"  # in the index of a model folder; diffusers passes over keys that begin with "_"

SHOWN_DIGITS = 12  # of a digest
ALGORITHM = "crc32-blocks"
SLOT = f"{ALGORITHM}:{'0' * 64}"  # the content of a passport whose file is still being written
CONTENT = r"^[a-z0-9-]{1,32}:[0-9a-f]{64}$"  # another version may have another algorithm


def without_passport(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a source's metadata for another file, to which the passport would not apply."""
    return {key: text for key, text in metadata.items() if key != KEY}


def load_passport(found: Any) -> dict[str, Any]:
    """Return the values of a passport, given as text or as an object.

    Only `format`, `content` and `files` are checked; names in `files` lead into their folder. Raises ValueError."""
    values = load_object(found) if isinstance(found, str) else found
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'its passport is not of the format "{FORMAT}"')
    content, files = values.get("content"), values.get("files", {})
    if not isinstance(content, str) or not re.fullmatch(CONTENT, content):
        raise ValueError(f"its passport has no digest, expected one such as {ALGORITHM}:... with 64 digits")
    if not isinstance(files, dict):
        raise ValueError("its passport lists no files, expected an object of names and SHA-256s")
    if outside := next((name for name in files if name.startswith("/") or ".." in name.split("/")), None):
        raise ValueError(f"its passport lists {outside!r}, which is not in the folder")
    return values


def shown_source(name: object, fingerprint: object) -> str:
    """Return the name of a source and the beginning of its fingerprint, as in "a.safetensors (1f3aac3c25b4)"."""
    return f"{name} ({str(fingerprint)[:SHOWN_DIGITS]})"

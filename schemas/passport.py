"""The passport of an output: its sources, the program that made it, and a digest that shows a changed byte.

| output | place of the passport |
|---|---|
| safetensors | `__metadata__`, under KEY |
| GGUF | the key-value KEY, a string |
| ONNX graph | `metadata_props`, under KEY |
| model folder | `model_index.json` or `modular_model_index.json`, under FOLDER_KEY |
| bundle | `cascade.json`, which has the same facts in fields of its own |

A passport has no time, no path and no name of a user, so the same sources make the same bytes. It is no signature:
anybody who changes a file can write a new passport for it.
"""

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from .errors import CheckpointError
from .json_models import Bytes, Exponent, FileName, FrozenModel, LoraEntry, Sha256
from .layouts import Layout
from .messages import wrong_fields
from .passport_keys import CONTENT, SLOT
from .paths import RelativePath

GENERATIONS = 4  # how many passports lie within each other; older sources keep their fingerprints only


class PassportSource(FrozenModel):
    """A file that the output was made of. `name` has no folders.

    `fingerprint` is that of `storage.file_hashes`. `header` is the SHA-256 of a safetensors file's header: a conversion
    back recognises by it that it writes this file again. `passport` is the file's own."""

    name: FileName
    bytes: Bytes
    fingerprint: Sha256
    header: Sha256 | None = None
    passport: "Passport | None" = None


class Passport(FrozenModel):
    """The sources and the digest of an output.

    `content` is the digest of the file that has the passport, taken with zeros in place of its own digits (see
    `storage.content_digest`). `values` says whether every value was copied bit for bit. `dtypes` counts tensors.
    `exponents` are those of an fp16 graph, as in the manifest. `files` are the SHA-256s of the other files of a model
    folder, without weights, which have passports of their own."""

    format: Literal["cascadekit-passport"] = "cascadekit-passport"
    version: Literal[1] = 1
    content: str = Field(default=SLOT, pattern=CONTENT)
    created_by: str
    layout: Layout | None = None
    values: Literal["copied", "calculated"] | None = None
    dtypes: dict[str, int] = Field(default_factory=dict)
    precision: str | None = None
    quantization: str | None = None
    exponents: dict[str, Exponent] = Field(default_factory=dict)
    loras: tuple[LoraEntry, ...] = ()
    sources: tuple[PassportSource, ...] = ()
    files: dict[RelativePath, Sha256] = Field(default_factory=dict)


def passport_values(passport: Passport) -> dict[str, Any]:
    """Return the passport as plain values, without fields that say nothing."""
    values: dict[str, Any] = passport.model_dump(mode="json", exclude_defaults=True)
    return {"format": passport.format, "version": passport.version, "content": passport.content, **values}


def passport_text(passport: Passport) -> str:
    """Return the passport as the text that goes into a file's metadata."""
    return json.dumps(passport_values(passport), separators=(",", ":"), ensure_ascii=False)


def parse_passport(text: str, where: str) -> Passport:
    """Return the passport in `text`. Raises CheckpointError that names `where` and each wrong field."""
    try:
        return Passport.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: its passport cannot be read: {wrong_fields(error)}; the file was changed, or a later cascadekit "
            "made it"
        ) from error


def of_generations(passport: Passport, count: int = GENERATIONS) -> Passport:
    """Return the passport with at most `count` passports within each other, itself included."""
    kept = (
        each.model_copy(update={"passport": each.passport and count > 1 and of_generations(each.passport, count - 1)})
        for each in passport.sources
    )
    return passport.model_copy(update={"sources": tuple(kept)})

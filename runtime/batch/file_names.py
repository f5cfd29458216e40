"""Names of output files from a template such as "{number:04d}-{seed}", which no prompt can lead astray."""

import os
import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...schemas.errors import UsageError

NUMBERS = ("number", "seed", "width", "height")
TEXTS = ("prompt", "name", "key")
DEFAULT_NAME = "{name}"
EXTENSION = ".png"

SLUG_BYTES = 100  # of a prompt or a name, in UTF-8
MOST_BYTES = 240  # of a file's name: file systems take 255, and while it is written it is somewhat longer
SPEC = {**dict.fromkeys(NUMBERS, re.compile(r"(0?\d{1,2})?d?")), **dict.fromkeys(TEXTS, re.compile(r"(\.\d{1,2})?s?"))}
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')  # somewhere, in a file's name


def slug(text: str) -> str:
    """The letters and digits of `text`, of any script, with "-" for everything between them; may be empty."""
    kept = (one if unicodedata.category(one)[0] in "LMN" or one == "_" else "-" for one in text)
    joined = re.sub("-+", "-", unicodedata.normalize("NFC", "".join(kept)))
    return joined.encode("utf-8")[:SLUG_BYTES].decode("utf-8", errors="ignore").strip("-")


@dataclass(frozen=True)
class NameTemplate:
    """Text with fields in braces, "/" between folders; the fields are those of NUMBERS and TEXTS."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError for a field there is none of, a format that is none, and a path out of the folder."""
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"name {text!r}: {error}; write {{{{ and }}}} for braces") from error
        for literal, name, spec, conversion in parts:
            if name is not None and (name not in SPEC or conversion or not SPEC[name].fullmatch(spec or "")):
                have = ", ".join(f"{{{each}}}" for each in SPEC)
                raise UsageError(
                    f"name {text!r}: {{{name}}}: expected one of {have}, with a format such as {{number:04d}} or "
                    "{prompt:.30}"
                )
            if FORBIDDEN.search(literal):
                raise UsageError(f"name {text!r}: {literal!r} holds characters that names of files must not have")
        return cls(text)

    def path(self, values: Mapping[str, Any]) -> Path:
        """A relative path ending in .png. Texts are made safe, numbers are not asked.

        Raises UsageError when what comes out is no name of a file, or one too long."""
        safe = {name: slug(value) if name in TEXTS else value for name, value in values.items()}
        filled = self.text.format_map(safe).removesuffix(EXTENSION)
        parts = filled.split("/")
        if any(not part.strip(". ") or part.startswith(".") for part in parts):
            raise UsageError(f"name {self.text!r} gives {filled!r}: expected a file's name, folders before it")
        if any(len(os.fsencode(part + EXTENSION)) > MOST_BYTES for part in parts):
            raise UsageError(f"name {self.text!r} gives one of more than {MOST_BYTES} bytes; cut it: {{prompt:.30}}")
        return Path(*parts[:-1], parts[-1] + EXTENSION)

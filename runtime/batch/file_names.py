"""Names of output files from a template such as "{number:04d}-{seed}"; no prompt can name a file in another folder."""

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

SLUG_BYTES = 100  # the UTF-8 bytes of a prompt or a name that are used
MOST_BYTES = 240  # of a file name: file systems take 255, and the name of an unfinished file is longer
SPEC = {**dict.fromkeys(NUMBERS, re.compile(r"(0?\d{1,2})?d?")), **dict.fromkeys(TEXTS, re.compile(r"(\.\d{1,2})?s?"))}
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')  # in file names, on some system


def slug(text: str) -> str:
    """The letters and digits of `text`, of any script, with "-" for everything between them; may be empty."""
    kept = (one if unicodedata.category(one)[0] in "LMN" or one == "_" else "-" for one in text)
    joined = re.sub("-+", "-", unicodedata.normalize("NFC", "".join(kept))).strip("-")
    return joined.encode("utf-8")[:SLUG_BYTES].decode("utf-8", errors="ignore").rstrip("-")


@dataclass(frozen=True)
class NameTemplate:
    """Text with fields in braces, "/" between folders; the fields are those of `NUMBERS` and `TEXTS`."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a template. Raises UsageError for an unknown field, an invalid format, or a forbidden character."""
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
                raise UsageError(f"name {text!r}: {literal!r} has characters that file names must not have")
        return cls(text)

    def path(self, values: Mapping[str, Any]) -> Path:
        """A relative path that ends in .png. Texts among `values` are reduced to letters, digits and "-".

        Raises UsageError when the result is no file name or too long."""
        safe = {name: slug(value) if name in TEXTS else value for name, value in values.items()}
        filled = self.text.format_map(safe).removesuffix(EXTENSION)
        parts = filled.split("/")
        if any(not part.strip(". ") or part.startswith(".") for part in parts):
            raise UsageError(f"name {self.text!r} gives {filled!r}: expected a file name, perhaps with folders")
        if any(len(os.fsencode(part + EXTENSION)) > MOST_BYTES for part in parts):
            raise UsageError(f"name {self.text!r} gives more than {MOST_BYTES} bytes; shorten it, as in {{prompt:.30}}")
        return Path(*parts[:-1], parts[-1] + EXTENSION)

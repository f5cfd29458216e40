"""Reads files of prompts: .txt (a prompt a line), .jsonl (a request a line), .csv and .parquet (a request a row, with
its fields as columns).

Only the form is checked here. An entry that cannot be read has a message, so that all messages can be shown together.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...schemas.errors import MissingPackageError, UsageError, reraise_interrupt
from ...schemas.json_text import load_json
from ...schemas.limits import MAX_PROMPT_FILE_BYTES, MAX_PROMPT_LINE
from ...storage.install_hint import install_hint

STDIN = "-"
COMMENT = "#"
LISTS = ("prior_timesteps", "decoder_timesteps")  # fields whose cell holds numbers with "," or ";" between them
FIRST_LINE = 1


@dataclass(frozen=True)
class PromptEntry:
    """One entry: fields of a request, "images" and "name"; or its problem."""

    line: int  # the line on which the entry begins, from 1
    given: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class PromptFile:
    """All entries of a file. Paths in it are relative to `folder`."""

    name: str
    folder: Path
    entries: tuple[PromptEntry, ...]


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read the file at `path`, in UTF-8 with a byte order mark or without; "-" is standard input, as .txt.

    Raises UsageError for a file that cannot be read, is too large, is of another kind, or holds no prompts."""
    name = str(path)
    if name == STDIN:
        if sys.stdin is None:
            raise UsageError(f"{name}: standard input is closed; pipe the prompts into it")
        kind, folder, content = ".txt", Path(), sys.stdin.buffer.read(MAX_PROMPT_FILE_BYTES + 1)
    else:
        kind, folder, content = Path(path).suffix.lower(), Path(path).parent, _content(Path(path))
    if kind not in READERS:
        raise UsageError(f"{name}: expected a name ending in {', '.join(READERS)}; rename the file after what it holds")
    if len(content) > MAX_PROMPT_FILE_BYTES:
        raise UsageError(f"{name}: more than {MAX_PROMPT_FILE_BYTES >> 20} MiB; divide it into several files")
    try:
        entries = tuple(_checked(entry) for entry in READERS[kind](content))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    if not entries:
        raise UsageError(f"{name}: holds no prompts; write one a line")
    return PromptFile(name, folder, entries)


def _text(content: bytes) -> str:
    """The text of a file. Bytes that are no UTF-8 become lone surrogates; `_checked` finds the entry that has them."""
    return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PROMPT_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: the prompts cannot be read: {error.strerror}; check the path") from error


def _checked(entry: PromptEntry) -> PromptEntry:
    """The entry unless it cannot be written as JSON in UTF-8."""
    try:
        json.dumps(entry.given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return PromptEntry(entry.line, problem="its text is not UTF-8; save the file in that encoding")
    except TypeError:  # the column of a table may hold dates or bytes
        return PromptEntry(entry.line, problem="expected text, numbers and lists; leave other columns out")
    return entry


def text_lines(content: bytes) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; a byte order mark before the first is left out.

    Lines end as in an editor; Python's splitlines() would also end them at other characters."""
    for number, line in enumerate(io.StringIO(_text(content), newline=None), FIRST_LINE):
        if line.strip():
            yield number, line.strip()


def _txt(content: bytes) -> Iterator[PromptEntry]:
    for number, line in text_lines(content):
        if not line.startswith(COMMENT):
            yield PromptEntry(number, {"prompt": line})


def _jsonl(content: bytes) -> Iterator[PromptEntry]:
    for number, line in text_lines(content):
        if len(line) > MAX_PROMPT_LINE:
            yield PromptEntry(number, problem=f"a line of {len(line)} characters; expected at most {MAX_PROMPT_LINE}")
            continue
        try:
            value = load_json(line)
        except ValueError as error:
            yield PromptEntry(number, problem=f"not JSON: {error}")
            continue
        if isinstance(value, str):
            value = {"prompt": value}
        if isinstance(value, dict):
            yield PromptEntry(number, {name: each for name, each in value.items() if each is not None})
        else:
            yield PromptEntry(number, problem=f"expected an object or a prompt in quotes, found {line[:40]}")


def _csv(content: bytes) -> Iterator[PromptEntry]:
    reader = csv.reader(io.StringIO(_text(content), newline=""), strict=True)
    header: list[str] | None = None
    begins = FIRST_LINE
    try:
        for cells in reader:
            if header is None and any(cells):
                header = [cell.strip() for cell in cells]
                if "" in header or len(set(header)) < len(header):
                    found = ", ".join(header)
                    yield PromptEntry(begins, problem=f"expected a header of different names, found {found}")
                    return
            elif header is not None and cells:
                yield _row(begins, header, cells)
            begins = reader.line_num + 1
    except csv.Error as error:
        yield PromptEntry(begins, problem=f"not CSV from here on: {error}")


def _row(line: int, header: list[str], cells: list[str]) -> PromptEntry:
    """The entry of a row. Empty cells, and cells missing at the end, leave their fields out."""
    if len(cells) > len(header):
        return PromptEntry(
            line, problem=f"{len(cells)} cells, where the header has {len(header)}; quote cells with commas"
        )
    given = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    return PromptEntry(line, {name: _numbers(cell) if name in LISTS else cell for name, cell in given.items()})


def _numbers(cell: str) -> list[str]:
    return [part.strip() for part in cell.replace(",", ";").split(";")]


def _parquet(content: bytes) -> Iterator[PromptEntry]:
    """The rows of a table; empty cells leave their fields out. A row counts as a line."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(f"a .parquet file: {error.name} is not installed: {install_hint('ray')}") from error
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"cannot be read as Parquet: {said}; write the table again") from error
    for number, row in enumerate(rows, FIRST_LINE):
        yield PromptEntry(number, {name: value for name, value in row.items() if value is not None})


READERS: Mapping[str, Callable[[bytes], Iterator[PromptEntry]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}

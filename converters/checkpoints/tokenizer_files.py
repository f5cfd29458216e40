"""The tokenizer of a model on its way into another folder: checked, and of its files only those that belong to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...runtime.text.tokenizer import ClipTokenizer
from ...runtime.text.tokenizer_file import LIST_NAMES, NAMES, WHOLE_NAME, TokenizerFile, read_tokenizer
from ...schemas.errors import CheckpointError, ConversionError
from ...schemas.limits import MAX_TOKENIZER_BYTES
from .provenance import lies_in

FOLDER = "tokenizer"  # of a bundle and of a model folder


@dataclass(frozen=True)
class OwnTokenizer:
    """A model's own tokenizer, sound: what it holds, its files, and what was left out of its folder."""

    content: TokenizerFile
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def check_tokenizer(folder: Path | None, rows: int | None) -> OwnTokenizer | None:
    """The tokenizer in `folder`, for a text encoder of `rows` tokens (None: there is none); None where there is no
    folder or no tokenizer in it, and the package's is to be used.

    Raises CheckpointError for files that lead elsewhere or are too large, for another tokenizer than CLIP's, and for
    tokens that the text encoder has no row for."""
    if folder is None or not any((folder / name).exists() for name in (WHOLE_NAME, LIST_NAMES[0])):
        return None
    files = tuple(folder / name for name in NAMES if (folder / name).exists() or (folder / name).is_symlink())
    for path in files:
        if not lies_in(path, folder):
            raise CheckpointError(
                f"{path}: expected a file in this folder, found a link that leads out of it or no regular file; put "
                "the file itself there"
            )
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_TOKENIZER_BYTES} bytes, it has {path.stat().st_size}")
    ClipTokenizer.open(folder, rows)
    content = read_tokenizer(folder)
    return OwnTokenizer(content, files, (*_left_out(folder), *_unreachable(folder, content, rows)))


def _left_out(folder: Path) -> Iterator[str]:
    others = sorted(path.name for path in folder.iterdir() if path.name not in NAMES)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        yield f"{folder}: not a tokenizer's files, left out: {', '.join(others[:5])}{more}"


def _unreachable(folder: Path, content: TokenizerFile, rows: int | None) -> Iterator[str]:
    known = 1 + max(content.added.values(), default=0)
    if rows is not None and content.added and known < rows:
        yield f"{folder}: its tokens end at {known}, the text encoder has {rows} rows; no prompt reaches the others"


def write_tokenizer(tokenizer: OwnTokenizer | None, root: Path) -> Path | None:
    """Write the one tokenizer.json of a bundle, with all that the model's files say; returns where, None without."""
    if tokenizer is None:
        return None
    path = root / FOLDER / WHOLE_NAME
    path.parent.mkdir()
    path.write_bytes(tokenizer.content.text.encode())
    return path


def copy_tokenizer(tokenizer: OwnTokenizer, target: Path) -> None:
    """Put the files into the folder `target`, in place of all that are there. Raises ConversionError."""
    target.mkdir(exist_ok=True)
    try:
        for old in target.iterdir():
            old.unlink()
        for path in tokenizer.files:
            (target / path.name).write_bytes(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{error.filename}: the tokenizer cannot be copied: {error.strerror}") from error

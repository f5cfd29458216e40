"""The files of a merged checkpoint: where each is written, and which files of the source are copied unchanged."""

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...schemas.errors import UsageError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack")
INDEX_MARK = ".safetensors.index"


@dataclass(frozen=True)
class OutputTree:
    """Source files and folders, and the place of each below the output; "" is the output itself."""

    places: dict[Path, str]

    def place(self, staged: Path, source: Path) -> Path:
        """Return where the counterpart of the file `source` is written, and make that folder."""
        path = staged / self.relative(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def relative(self, source: Path) -> Path:
        """Return the path of the counterpart below the output; "." where `source` becomes the output itself."""
        for root, place in self.places.items():
            if source == root or source.is_relative_to(root):
                return Path(place) / source.relative_to(root)
        raise UsageError(f"{source}: is outside of the checkpoint; give the folder that holds all its files")

    def copy_others(self, staged: Path, touched: Collection[Path]) -> list[str]:
        """Copy all files except `touched` and other weights in their folders.

        Other variants and formats of merged weights hold the old values. Returns a note for each file left out."""
        notes = []
        for path in self.others(touched):
            if self.is_stale(path, touched):
                notes.append(f"{path}: left out, its weights are not the merged ones")
            else:
                shutil.copyfile(path, self.place(staged, path))
        return notes

    def others(self, touched: Collection[Path]) -> Iterator[Path]:
        """Yield all files of the checkpoint except `touched` and hidden ones."""
        for root in self.places:
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                if path not in touched and path.is_file() and not _hidden(path, root):
                    yield path

    def is_stale(self, path: Path, touched: Collection[Path]) -> bool:
        """True for weights beside merged ones, which hold the old values."""
        return path not in self.places and _stale(path, touched)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _stale(path: Path, touched: Collection[Path]) -> bool:
    """Return whether a file holds old weights of a component's folder in which other weights were merged."""
    folder = path.parent
    is_weights = path.suffix in WEIGHT_SUFFIXES or (INDEX_MARK in path.name and not _lists(path, touched))
    return is_weights and (folder / "config.json").is_file() and any(file.parent == folder for file in touched)


def _lists(index: Path, touched: Collection[Path]) -> bool:
    """Return whether a shard index names the files that were merged."""
    text = index.read_text(encoding="utf-8", errors="replace")
    return any(f'"{file.name}"' in text for file in touched if file.parent == index.parent)


def output_tree(checkpoint: Path, text_encoder: Path | None, output: Path) -> OutputTree:
    """Return the output's places for a checkpoint, and for a text encoder that was given separately.

    Raises UsageError when a file is to become something else than a .safetensors file, or the checkpoint's folder has
    another text encoder already."""
    if text_encoder is not None and text_encoder.is_relative_to(checkpoint):
        text_encoder = None  # its files are among the checkpoint's
    if text_encoder is None:
        if checkpoint.is_file() and output.suffix != ".safetensors":
            raise UsageError(f"{output}: expected a name ending in .safetensors, as {checkpoint} is a file")
        return OutputTree({checkpoint: ""})
    if output.suffix == ".safetensors":
        raise UsageError(f"{output}: expected a folder, which takes the checkpoint and the text encoder")
    if (checkpoint / "text_encoder").is_dir():
        raise UsageError(
            f"{checkpoint}: has a text encoder of its own; give {checkpoint / 'prior'}, or no text_encoder"
        )
    inside = OutputTree({})
    inside.places[text_encoder] = text_encoder.name if text_encoder.is_file() else "text_encoder"
    if checkpoint.is_file():
        inside.places[checkpoint] = checkpoint.name
    else:
        inside.places[checkpoint] = "prior" if (checkpoint / "config.json").is_file() else ""
    return inside

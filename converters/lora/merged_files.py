"""The files of a merged checkpoint: where each is written, and which files of the source are copied unchanged."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ...schemas.errors import UsageError
from ...storage.weights_file import is_pickle

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack")
INDEX_MARK = ".safetensors.index"


@dataclass(frozen=True)
class OutputTree:
    """Source files and folders, and the place of each below the output; "" is the output itself."""

    places: dict[Path, str]

    def relative(self, source: Path) -> Path:
        """Return the path of the counterpart below the output; "." where `source` becomes the output itself."""
        for root, place in self.places.items():
            if source == root or source.is_relative_to(root):
                return Path(place) / source.relative_to(root)
        raise UsageError(f"{source}: is outside of the checkpoint; give the folder that holds all its files")

    def merged(self, source: Path) -> Path:
        """Return the path of merged weights below the output. A pickle becomes a .safetensors file."""
        place = self.relative(source)
        return place.with_suffix(".safetensors") if place.name and is_pickle(source) else place

    def others(self, touched: Collection[Path]) -> tuple[list[Path], list[Path]]:
        """Return the files of the checkpoint to copy, and files of weights to leave out.

        `touched` are the files that hold merged weights. Other variants and formats of these hold the old values.
        Hidden files are left out too."""
        copied: list[Path] = []
        stale: list[Path] = []
        for root in self.places:
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
                if path not in touched and path.is_file() and not hidden:
                    (stale if path != root and _is_stale(path, touched) else copied).append(path)
        return copied, stale


def _is_stale(path: Path, touched: Collection[Path]) -> bool:
    """Return whether a file holds old weights of a component's folder in which other weights were merged."""
    names = [file.name for file in touched if file.parent == path.parent]
    if not names or not (path.parent / "config.json").is_file():
        return False
    if INDEX_MARK not in path.name:
        return path.suffix in WEIGHT_SUFFIXES
    text = path.read_text(encoding="utf-8", errors="replace")
    return not any(f'"{name}"' in text for name in names)  # the index of shards that were merged still holds


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
    place = text_encoder.name if text_encoder.is_file() else "text_encoder"
    if checkpoint.is_file():
        return OutputTree({text_encoder: place, checkpoint: checkpoint.name})
    return OutputTree({text_encoder: place, checkpoint: "prior" if (checkpoint / "config.json").is_file() else ""})

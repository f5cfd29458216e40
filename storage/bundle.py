"""Opens bundles: reads and updates the manifest, and checks that the files are there, whole and unchanged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..schemas.errors import CheckpointError, ConversionError, UsageError
from ..schemas.limits import MAX_MANIFEST_BYTES
from ..schemas.manifest import (
    MAIN_GRAPH,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    StageEntry,
    parse_manifest,
    to_text,
)
from ..schemas.messages import reason
from ..schemas.stages import Stage
from .atomic_file import whole_file
from .bundle_lock import locked_bundle, require_manifest
from .file_hashes import find_change

DAMAGED = "the bundle is damaged, export it again"
PUT_BACK = "put it back, or export the model again"
# A change to the model's files reaches into a bundle with hard links to them.
LINKED = (
    "the model's file, which this is a hard link to, was changed in place; export it again, "
    'with weights="copy" if the model is to go on changing'
)


@dataclass(frozen=True)
class Bundle:
    """An exported bundle on disk."""

    root: Path
    manifest: Manifest

    def entry(self, stage: Stage) -> StageEntry:
        """The manifest's entry of `stage`. Raises UsageError when the stage was not exported."""
        if stage not in self.manifest.stages:
            have = ", ".join(self.manifest.stages)
            raise UsageError(f"{self.root}: has no {stage} (it has {have}); export the model again with that stage")
        return self.manifest.stages[stage]

    def graph(self, stage: Stage, name: str = MAIN_GRAPH) -> Path:
        """The path of one of the stage's graphs, after `check`. Raises UsageError when there is no such graph."""
        graphs = self.entry(stage).graphs
        if name not in graphs:
            raise UsageError(f"{self.root}: its {stage} has no graph {name!r}; it has {', '.join(graphs)}")
        self.check(stage)
        return self.root / graphs[name].path

    def check(self, stage: Stage) -> None:
        """Compare the stage's files with the manifest: graphs by all their bytes, weights as `find_change` does.

        This takes milliseconds. Raises CheckpointError for the first file that is missing, cut short or changed."""
        entry = self.entry(stage)
        for file in entry.files:
            problem = find_change(self.root / file.path, file, always_hash=file.path in entry.graph_paths)
            if problem:
                raise CheckpointError(f"{self.root / file.path}: {problem}; {self.advice(entry, file)}")

    def advice(self, entry: StageEntry, file: FileEntry) -> str:
        """The advice for a user whose file of a stage differs from the manifest."""
        if not (self.root / file.path).exists():
            return PUT_BACK
        return LINKED if entry.weights == "link" and file.path not in entry.graph_paths else DAMAGED

    @property
    def tokenizer(self) -> Path | None:
        """The bundle's own tokenizer.json, if it has one."""
        return self.root / self.manifest.tokenizer if self.manifest.tokenizer else None

    def tokenizer_change(self) -> str | None:
        """A warning when the tokenizer is not the exported one, by all its bytes.

        None when it is, and for bundles of earlier versions, whose manifests do not list it."""
        path = self.tokenizer
        file = self.manifest.file(self.manifest.tokenizer) if self.manifest.tokenizer else None
        problem = find_change(path, file, always_hash=True) if path and file else None
        return f"{path}: {problem}; it may read prompts differently; {DAMAGED}" if problem else None


def require_utf8(path: Path) -> None:
    """Raise UsageError for a path that is not UTF-8: the libraries that open a bundle's files take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{path}: the name is not UTF-8, and onnx, engines and tokenizers open no other; rename it"
        ) from None


def open_bundle(root: Path) -> Bundle:
    """The bundle at `root`. Raises UsageError when there is none, CheckpointError when its manifest is wrong."""
    require_utf8(root)
    require_manifest(root)
    path = root / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, it has {path.stat().st_size}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    return Bundle(root, parse_manifest(text, str(path)))


def update_manifest(root: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replace the manifest of the bundle at `root` by what `change` makes of it, and return the new one.

    The bundle stays locked from reading to writing, so that no other process's update is lost. Raises ConversionError
    when the manifest cannot be written, else what `open_bundle` raises."""
    path = root / MANIFEST_NAME
    with locked_bundle(root):
        old = open_bundle(root).manifest
        new = change(old)
        if new == old:
            return old
        try:
            with whole_file(path, path.stat().st_mode & 0o777) as file:
                file.write(to_text(new).encode())
        except OSError as error:
            raise ConversionError(f"{path}: cannot be written: {error.strerror}") from error
    return new

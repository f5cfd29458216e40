"""Opens a bundle: reads its manifest and checks that its files are there, whole."""

from dataclasses import dataclass
from pathlib import Path

from ..schemas.bundle import MANIFEST_NAME, Manifest, StageEntry, parse_manifest
from ..schemas.errors import CheckpointError, UsageError
from ..schemas.stages import Stage


@dataclass(frozen=True)
class Bundle:
    """An exported bundle on disk."""

    root: Path
    manifest: Manifest

    def entry(self, stage: Stage) -> StageEntry:
        """What the manifest says of `stage`. Raises UsageError when it was not exported."""
        if stage not in self.manifest.stages:
            have = ", ".join(self.manifest.stages)
            raise UsageError(f"{self.root}: has no {stage} (it has {have}); export the model again with that stage")
        return self.manifest.stages[stage]

    def graph(self, stage: Stage) -> Path:
        """The stage's ONNX file, its weights beside it. Raises CheckpointError when a file is missing or cut short."""
        entry = self.entry(stage)
        for file in entry.files:
            path = self.root / file.path
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                found = "it is missing" if size is None else f"it has {size}"
                raise CheckpointError(
                    f"{path}: expected {file.bytes} bytes, {found}; the bundle is damaged, export it again"
                )
        return self.root / entry.files[0].path

    @property
    def tokenizer(self) -> Path | None:
        """The bundle's own tokenizer.json, if it has one."""
        return self.root / self.manifest.tokenizer if self.manifest.tokenizer else None


def open_bundle(root: Path) -> Bundle:
    """The bundle at `root`. Raises UsageError when there is none, CheckpointError when its manifest is wrong."""
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(f"{root}: not a bundle, it has no {MANIFEST_NAME}; make one with `cascadekit export`")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return Bundle(root, parse_manifest(text, str(path)))

"""Writes a static website that generates images in the browser: a bundle of what a page needs, and the page.

The website is a bundle itself: its manifest lists the page's files beside the tokenizer. So `validate` checks a
website, `generate` runs it, and `force` may replace it.
"""

import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from ...runtime.memory.prediction import loaded_bytes
from ...runtime.text.tokenizer import read_checked
from ...runtime.text.tokenizer_file import WHOLE_NAME, shipped
from ...schemas.callbacks import Say, ignored
from ...schemas.created_by import created_by
from ...schemas.errors import UsageError
from ...schemas.manifest import MANIFEST_NAME, FileEntry, Manifest, StageEntry, VerdictEntry, to_text
from ...schemas.precision import Precision
from ...schemas.quantization import Quantization
from ...schemas.stages import EVERY_IMAGE, Stage
from ...storage.atomic_output import staged_output
from ...storage.bundle import Bundle, open_bundle
from ...storage.file_hashes import describe_file, sha256_of
from ..checkpoints.model_folder import TOKENIZER_FOLDER
from .onnxruntime_web import NAME, read_onnxruntime_web

MAX_FILE_BYTES = 2**31 - 1  # of an array in JavaScript, in every browser
MAX_MEMORY = 2**32  # bytes that WebAssembly of 32 bits can address
EXPORT = "cascadekit export MODEL -o BUNDLE"
SMALLER = f"use a lite model, or export it again: {EXPORT} --quantize int4"


def write_site(
    bundle: str | Path, output: str | Path, onnxruntime_web: str | Path, *, force: bool = False, say: Say = ignored
) -> Manifest:
    """Write the website of the bundle at `bundle` as the folder `output`, and return its manifest.

    `onnxruntime_web` is the archive of ``npm pack onnxruntime-web``, or the package's folder. `say` is called with each
    line that a user should know.

    Raises UsageError for a bundle that lacks a stage or has one that no browser can run, and as `staged_output` does.
    Raises CheckpointError when a file of the bundle is damaged."""
    opened, output = open_bundle(Path(bundle)), Path(output)
    entries = {stage: _slimmed(opened, stage) for stage in EVERY_IMAGE}
    tokenizer = _tokenizer(opened)
    page = {path.name: path.read_bytes() for path in files(__package__).joinpath("page").iterdir() if path.is_file()}
    page |= {f"{NAME}/{name}": content for name, content in read_onnxruntime_web(Path(onnxruntime_web)).items()}
    tokenizer_path = f"{TOKENIZER_FOLDER}/{WHOLE_NAME}"
    written = {**page, tokenizer_path: tokenizer.encode()}
    copied = [file.path for entry in entries.values() for file in entry.files]
    sources = [opened.root, onnxruntime_web]
    names = [MANIFEST_NAME, *written, *copied]
    with staged_output(output, force=force, sources=sources, files=names, say=say) as staged:
        for path in copied:
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(opened.root / path, staged / path)
        for path, content in written.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(content)
        manifest = opened.manifest.model_copy(
            update={
                "created_by": created_by(),
                "tokenizer": tokenizer_path,
                "stages": {stage: _described(staged, entry) for stage, entry in entries.items()},
                "files": tuple(describe_file(staged, staged / path, sha256_of(staged / path)) for path in written),
                "parity": tuple(_about(verdict, entries) for verdict in opened.manifest.parity),
                "lora": opened.manifest.lora and opened.manifest.lora.model_copy(update={"kept": ()}),
            }
        )
        (staged / MANIFEST_NAME).write_text(to_text(manifest), encoding="utf-8")
    return manifest


def _slimmed(bundle: Bundle, stage: Stage) -> StageEntry:
    """The entry of a stage with its main graph alone. Raises UsageError when no browser can run it."""
    bundle.check(stage)
    entry = bundle.entry(stage).with_main_graph_alone()
    if entry.precision is Precision.BF16:
        raise UsageError(
            f"{bundle.root}: its {stage} computes in bf16, which {NAME} cannot; export it again: "
            f"{EXPORT} --precision {stage}=fp32 --storage fp16"
        )
    for file in entry.files:
        if file.bytes > MAX_FILE_BYTES:
            raise UsageError(
                f"{bundle.root / file.path}: {file.bytes / 1e9:.2f} GB; expected at most {MAX_FILE_BYTES / 1e9:.2f} "
                f"GB, the largest array of a browser; {SMALLER}"
            )
    needed = loaded_bytes(bundle.manifest, stage) if entry.quantization is Quantization.NONE else 0
    if needed > MAX_MEMORY:
        raise UsageError(
            f"{bundle.root}: the weights of its {stage} take {needed / 1e9:.2f} GB in memory; expected at most "
            f"{MAX_MEMORY / 1e9:.2f} GB, what WebAssembly can address; {SMALLER}"
        )
    return entry.model_copy(update={"weights": "copy"})


def _tokenizer(bundle: Bundle) -> str:
    """The text of the bundle's tokenizer.json. Raises UsageError for one that the page cannot follow."""
    if bundle.tokenizer is None:
        return shipped()
    read = read_checked(bundle.tokenizer, bundle.manifest.text_rows)
    if read.added:
        raise UsageError(
            f"{bundle.tokenizer}: has {len(read.added)} tokens beside CLIP's, such as {next(iter(read.added))!r}; the "
            "page reads CLIP's alone; export the model with CLIP's tokenizer"
        )
    return read.text


def _described(root: Path, entry: StageEntry) -> StageEntry:
    """The entry with the times of the copies in `root`; their bytes are those of the originals."""
    described = (describe_file(root, root / file.path, file.sha256) for file in entry.files)
    return entry.model_copy(update={"files": tuple(described)})


def _about(verdict: VerdictEntry, entries: Mapping[Stage, StageEntry]) -> VerdictEntry:
    """The verdict on the files that were copied."""
    stages = {
        stage: found.model_copy(update={"files": _of(found.files, entries[stage].files)})
        for stage, found in verdict.stages.items()
        if stage in entries
    }
    return verdict.model_copy(update={"stages": stages})


def _of(fingerprints: Mapping[str, str], kept: tuple[FileEntry, ...]) -> dict[str, str]:
    paths = {file.path for file in kept}
    return {path: digest for path, digest in fingerprints.items() if path in paths}

"""Converts checkpoints between layouts: every output tensor is a range, or several, of an input file."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...schemas.errors import ConversionError, UsageError
from ...schemas.layouts import Layout
from ...schemas.stages import NetworkConfig, Stage, TextEncoderConfig, VQGANConfig
from ...storage.cast_ranges import Counts
from ...storage.outputs import staged_output
from ...storage.own_folders import MODEL_INDEX
from ...storage.safetensors_header import Progress
from ...storage.safetensors_writer import write_file
from .identify import Component
from .model_folder import write_folder_files
from .open_model import DEFAULT_CHOICE, ENCODERS, Choice, Model, open_model
from .plan_output import Arrangement, FilePlan, Target, arrange
from .provenance import copy_provenance, provenance_files
from .tokenizer_files import OwnTokenizer, check_tokenizer, copy_tokenizer

DIFFUSERS_VQGAN_SCALE = 0.3764

StartFile = Callable[[str, int], Progress]  # given a file's name and its bytes, who to tell of the bytes done


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote: the weights files below the output, and what the user should know."""

    output: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def convert(
    sources: Sequence[str | Path],
    output: str | Path,
    to: str | Layout | Target,
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    choice: Choice = DEFAULT_CHOICE,
    allow_overflow: bool = False,
    force: bool = False,
    start_file: StartFile | None = None,
) -> Conversion:
    """Write every component found in `sources` to `output` as `to` says: a layout, or a Target with more to say.

    Without a dtype in the target no weight changes a bit. `output` becomes a folder, or one file when it ends in
    .safetensors and everything goes into one. Raises a CascadeError, and leaves nothing behind, when a source is
    damaged, values overflow (without `allow_overflow`), or the output cannot be written."""
    output = Path(output)
    target = to if isinstance(to, Target) else Target(Layout(to))
    model = open_model(sources, text_encoder=text_encoder, image_encoder=image_encoder, choice=choice)
    if not model.components:
        raise UsageError("nothing to convert: no component found in " + ", ".join(map(str, sources)))
    for component in model.components.values():
        component.require_sound()
    plan = arrange(model.components, target)
    single = output.suffix.lower() == ".safetensors"
    if single and (len(plan.files) > 1 or target.layout is Layout.DIFFUSERS):
        raise UsageError(f"{output}: one file cannot hold all of {', '.join(model.components)}; give a folder instead")
    tokenizer = _tokenizer(model)
    _require_space(output, plan)
    given = [*map(Path, sources), *_given(text_encoder, image_encoder)]
    papers = provenance_files(given)
    notes = [
        *model.notes,
        *plan.notes,
        *_token_notes(tokenizer, target.layout),
        *_scale_notes(model, target.layout),
    ]
    with staged_output(
        output,
        force=force,
        fingerprint=_fingerprint(plan),
        sources=[*given, *_sources(plan)],
        files=() if single else [*_paths(plan, target), *(paper.name for paper in papers)],
        say=notes.append,
    ) as staged:
        for file in plan.files:
            path = staged if single else staged / file.path
            progress = start_file(path.name if single else str(file.path), file.nbytes) if start_file else None
            notes += _write(file, path, progress, allow_overflow).notes(file.path.name)
        if not single:
            _write_rest(model, plan, tokenizer, staged, target)
            copy_provenance(papers, staged)
    return Conversion(output, tuple(file.path for file in plan.files) if not single else (), tuple(notes))


def _write(file: FilePlan, path: Path, progress: Progress | None, allow_overflow: bool) -> Counts:
    """Write one file. Under its own name it is complete: one that is there was completed before a kill, and is done
    unless its values are computed, which are to be counted where they are not finite."""
    copied = all(part.dtype == tensor.dtype for tensor in file.tensors.values() for part in tensor.ranges)
    if path.exists() and copied:
        if progress:
            progress(file.nbytes)
        return Counts()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    counts = write_file(partial, file.tensors, file.metadata, progress, allow_overflow=allow_overflow)
    partial.rename(path)
    return counts


def _given(*paths: str | Path | None) -> list[Path]:
    return [Path(path) for path in paths if path is not None]


def _sources(plan: Arrangement) -> set[Path]:
    """The files that tensors are copied from."""
    return {part.path for file in plan.files for tensor in file.tensors.values() for part in tensor.ranges}


def _paths(plan: Arrangement, target: Target) -> list[str]:
    """Of the files that will surely be written, below the output folder."""
    index = [MODEL_INDEX] if target.layout is Layout.DIFFUSERS else []
    return [*(file.path.as_posix() for file in plan.files), *(path.as_posix() for path in plan.indexes), *index]


def _fingerprint(plan: Arrangement) -> str:
    """A digest of everything that decides the bytes of the output; sources count by path, size and time."""
    digest = hashlib.sha256()
    for path in sorted(_sources(plan)):
        status = path.stat()
        digest.update(repr((str(path.absolute()), status.st_size, status.st_mtime_ns)).encode())
    for file in plan.files:
        digest.update(repr((file.path, file.metadata, list(file.tensors.items()))).encode())
    return digest.hexdigest()


def _require_space(output: Path, plan: Arrangement) -> None:
    """Notice a disk that is too small before the first byte is written."""
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    needed, free = sum(file.nbytes for file in plan.files), shutil.disk_usage(existing).free
    if needed > free:
        raise ConversionError(
            f"{output}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; choose another disk"
        )


def _write_rest(model: Model, plan: Arrangement, tokenizer: OwnTokenizer | None, folder: Path, target: Target) -> None:
    """Everything of the output folder that is not weights."""
    for path, index in plan.indexes.items():
        (folder / path).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    is_diffusers = target.layout is Layout.DIFFUSERS
    configs = {
        stage: _config_for(component, target.layout)
        for stage, component in model.components.items()
        if is_diffusers or (stage in ENCODERS and target.layout is not Layout.COMFYUI)
    }
    write_folder_files(folder, configs, index=is_diffusers, combined=target.combined)
    if tokenizer is not None and target.layout is not Layout.COMFYUI:
        for prefix in ("", "prior_") if is_diffusers and target.combined else ("",):
            copy_tokenizer(tokenizer, folder / f"{prefix}tokenizer")


def _tokenizer(model: Model) -> OwnTokenizer | None:
    """The model's own, fit for its text encoder."""
    encoder = model.components.get(Stage.TEXT_ENCODER)
    rows = encoder.config.vocab_size if encoder and isinstance(encoder.config, TextEncoderConfig) else None
    return check_tokenizer(model.tokenizer, rows)


def _token_notes(tokenizer: OwnTokenizer | None, to: Layout) -> tuple[str, ...]:
    if tokenizer is None or to is not Layout.COMFYUI:
        return tokenizer.notes if tokenizer else ()
    added = ", ".join(list(tokenizer.content.added)[:5])
    return (f"ComfyUI has a tokenizer of its own, which does not know {added}",) if added else ()


def _config_for(component: Component, to: Layout) -> NetworkConfig:
    """The config to write; a diffusers folder says diffusers' VQGAN scale."""
    if isinstance(component.config, VQGANConfig) and to is Layout.DIFFUSERS is not component.layout:
        return replace(component.config, scale_factor=DIFFUSERS_VQGAN_SCALE)
    return component.config


def _scale_notes(model: Model, to: Layout) -> list[str]:
    vqgan = model.components.get(Stage.VQGAN)
    if vqgan is None or (vqgan.layout is Layout.DIFFUSERS) == (to is Layout.DIFFUSERS):
        return []
    return [
        "the vqgan's scale belongs to the layout: original code multiplies latents by 0.43, diffusers by 0.3764; "
        "weights are the same, images a little less or more contrasted (see export --vqgan-scale)"
    ]

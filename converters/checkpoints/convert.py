"""Converts checkpoints between layouts.

A conversion moves ranges: bytes of a source file that hold a tensor (`TensorRange`). `open_model` finds the ranges,
`plan_output` gives each range its place in a new tensor, and `write_safetensors` copies or casts them.
"""

from __future__ import annotations  # help() shows the types as they are written here

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...schemas.block_types import WRITTEN
from ...schemas.callbacks import Say, StartFile
from ...schemas.comfy_formats import CHOICES
from ...schemas.dtypes import parse_dtype
from ...schemas.errors import ConversionError, UsageError
from ...schemas.folders import parse_size
from ...schemas.forecast import FileSize, Forecast, OnPlan
from ...schemas.layouts import FOLDERS, Layout
from ...schemas.messages import known_keywords, listed, shown_bytes
from ...schemas.sdnq_formats import SDNQ_CHOICES
from ...schemas.stages import NetworkConfig, Stage, TextEncoderConfig, VQGANConfig
from ...storage.atomic_output import check_output, staged_output
from ...storage.file_sizes import sizes_of
from ...storage.safetensors_writer import write_gguf, write_safetensors
from ..hub import local_path
from .component import Component
from .gguf_types import STAGES
from .model_folder import OwnTokenizer, check_tokenizer, copy_tokenizer, write_folder_files, write_pipeline_parts
from .modular_folder import notes_on_missing, write_modular_files
from .open_model import ENCODERS, Model, open_model
from .plan_output import PIPELINE_FILES, FilePlan, OutputOptions, OutputPlan, plan_output
from .provenance import copy_provenance, provenance_files

if TYPE_CHECKING:
    from ...schemas.passport import PassportSource

DIFFUSERS_VQGAN_SCALE = 0.3764
GGUF = ".gguf"
WEIGHTS_ALONE = (Layout.COMFYUI, Layout.GGUF)  # without configs and tokenizers


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: the output, its weights files by their paths below it, and notes for the user.

    `files` is empty when the output is a single file. `details` has a line for each weights file: its sources, and how
    many of its tensors were copied or cast."""

    output: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    details: tuple[str, ...] = ()


@known_keywords
def convert(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    to: str | Layout,
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    dtype: str | None = "keep",
    allow_overflow: bool = False,
    variant: str | None = None,
    lite: bool = False,
    ema: bool = False,
    as_variant: str = "",
    shard_size: int | str | None = None,
    combined: bool = False,
    canonical: bool = False,
    quantize: str | None = None,
    passport: bool = True,
    force: bool = False,
    say: Say | None = None,
    start_file: StartFile | None = None,
    on_plan: OnPlan | None = None,
) -> Conversion:
    """Write every component found in `sources` to `output`, in the layout `to`. No weight changes a bit unless `dtype`
    asks for a cast.

    Args:
        sources: One weights file, folder or hf:// source, or a sequence of them.
        output: A folder, or one file when the name ends in .safetensors (or .gguf) and one file can hold everything.
        to: "diffusers", "modular", "original", "split", "comfyui" or "gguf".
        text_encoder: The text encoder to use instead of that in the sources: a Hugging Face folder or file.
        image_encoder: The image encoder to use, likewise.
        dtype: "keep", "fp32", "bf16" or "fp16"; safetensors' spelling ("BF16") is accepted too. "keep" gives weights
            that torchao, bitsandbytes or SDNQ quantised the dtype that they had before.
        allow_overflow: Let values that are too large for the dtype become infinite.
        variant: The weights to read from a folder with several variants, such as "bf16".
        lite: Read prior_lite/ and decoder_lite/ where a folder has both sizes.
        ema: Read averaged weights where a file has trained ones too.
        as_variant: The variant to put into the names of diffusers files, such as "bf16".
        shard_size: Cut diffusers components above this size into shards: bytes, or text such as "10GB".
        combined: Use the folder names of StableCascadeCombinedPipeline (diffusers).
        canonical: Order tensors as the safetensors library does, instead of as the source does.
        quantize: The type of most Linears of prior and decoder: blocks such as "Q8_0" in GGUF files; "fp8",
            "fp8_e5m2", "int8", "mxfp8" or "nvfp4" in the layouts comfyui and split, for ComfyUI; "sdnq_int8",
            "sdnq_fp8" or "sdnq_uint4" in the layout diffusers, for its quantisation by SDNQ.
        passport: Put into the output what it was made of, and a digest that shows a changed byte (docs/passports.md).
        force: Replace files of the same names, or an earlier output.
        say: Called with a line of text for each download.
        start_file: Called with the name and size of each file before it is written.
        on_plan: Called with a Forecast once everything was checked; raise an exception there to write nothing.

    The output appears whole or not at all. Raises UsageError for sources without components, for an output that exists
    without `force=True` and for options that do not fit; CheckpointError and LayoutError for damaged sources; and
    ConversionError when values overflow or the output cannot be written.

    Examples:
        >>> done = convert(["stage_a.safetensors", "stage_b.safetensors"], "model", "diffusers", dtype="bf16")
        >>> [path.as_posix() for path in done.files]
        ['vqgan/diffusion_pytorch_model.safetensors', 'decoder/diffusion_pytorch_model.safetensors']
    """
    output = Path(output)
    options = OutputOptions(
        layout=_parse_layout(to),
        dtype=parse_dtype(dtype),
        variant=as_variant,
        shard_size=_parse_shard_size(shard_size),
        combined=combined,
        canonical=canonical,
        quantize=_parse_type(quantize),
    )
    _require_fit(output, options)
    check_output(output, force=force)
    given = [sources] if isinstance(sources, str | Path) else sources
    model = open_model(
        [local_path(source, say, variant=variant, lite=lite) for source in given],
        text_encoder=None if text_encoder is None else local_path(text_encoder, say),
        image_encoder=None if image_encoder is None else local_path(image_encoder, say),
        variant=variant,
        lite=lite,
        ema=ema,
    )
    plan = _plan(model, output, options)
    tokenizer = _tokenizer(model)
    _require_space(output, plan)
    provenance = provenance_files(model.sources)
    notes = [*model.notes, *plan.notes, *_notes_on_tokens(tokenizer, options), *_notes_on_scale(model, options)]
    if options.layout is Layout.MODULAR:
        notes += notes_on_missing(model.components)
    single = _is_single(output)
    inputs = [*model.sources, *plan.sources]
    names = [] if single else [*plan.file_names, *(file.name for file in provenance)]
    if on_plan:
        check_output(output, force=force, sources=inputs, files=names)
        on_plan(_forecast(output, plan, notes))
    made: dict[Path, PassportSource] = {}
    if passport:
        from ..passports import made_of  # imports pydantic
        from .output_passports import with_passports, write_folder_passport

        made = made_of(plan.sources, notes.append)
        plan = with_passports(plan, made)
    with staged_output(
        output, force=force, fingerprint=plan.fingerprint(), sources=inputs, files=names, say=notes.append
    ) as staged:
        for file in plan.files:
            path = staged if single else staged / file.path
            notes += _write_weights(file, path, start_file, allow_overflow=allow_overflow)
        if not single:
            _write_other_files(model, plan, tokenizer, staged)
            copy_provenance(provenance, staged)
            if passport and options.layout in PIPELINE_FILES:
                write_folder_passport(staged / PIPELINE_FILES[options.layout][0], options.layout, made)
    written = () if single else tuple(file.path for file in plan.files)
    return Conversion(output, written, tuple(notes), tuple(map(_detail, plan.files)))


def _detail(file: FilePlan) -> str:
    sources = sorted({path.name for plan in file.tensors.values() for path in plan.files})
    return f"{file.path}: {file.described}, from {', '.join(sources)}"


def _forecast(output: Path, plan: OutputPlan, notes: Sequence[str]) -> Forecast:
    """Return what would be read and written. Headers, configs and tokenizers are left out: they are small."""
    single = _is_single(output)
    writes = tuple(FileSize("." if single else file.path.as_posix(), file.nbytes) for file in plan.files)
    return Forecast(output, sizes_of(plan.sources), writes, notes=tuple(notes))


def _parse_layout(to: str | Layout) -> Layout:
    try:
        return Layout(to)
    except ValueError as error:
        raise UsageError(f'to="{to}": expected a layout, one of {", ".join(Layout)}') from error


def _parse_shard_size(size: int | str | None) -> int | None:
    try:
        return parse_size(size) if isinstance(size, str) else size
    except ValueError as error:
        raise UsageError(f"shard_size={error}") from error


def _parse_type(quantize: str | None) -> str | None:
    known = (*WRITTEN, *CHOICES, *SDNQ_CHOICES)
    if quantize is not None and quantize.upper() not in known:
        raise UsageError(f'quantize="{quantize}": expected one of {", ".join(known)}')
    return quantize and quantize.upper()


def _is_single(output: Path) -> bool:
    """Return whether the output is one file instead of a folder."""
    return output.suffix.lower() in (".safetensors", GGUF)


def _require_fit(output: Path, options: OutputOptions) -> None:
    """Raise UsageError for options and a name of the output that the layout does not have."""
    layout, quantize = options.layout, f'quantize="{options.quantize}"'
    rules = (
        (options.combined, "combined=True", "such folders", (Layout.DIFFUSERS,)),
        (options.shard_size is not None, "shard_size=...", "shards", FOLDERS),
        (bool(options.variant), f'as_variant="{options.variant}"', "such names", FOLDERS),
        (options.canonical, "canonical=True", "such order", [each for each in Layout if each is not Layout.GGUF]),
        (options.quantize in WRITTEN, quantize, "such type", (Layout.GGUF,)),
        (options.quantize in SDNQ_CHOICES, quantize, "such type", (Layout.DIFFUSERS,)),
        (options.quantize in CHOICES, quantize, "such type", (Layout.COMFYUI, Layout.SPLIT)),
    )
    for given, option, what, layouts in rules:
        if given and layout not in layouts:
            places = " or ".join(f'to="{each}"' for each in layouts)
            raise UsageError(f"{option}: the {layout} layout has no {what}; leave it out, or take {places}")
    if _is_single(output) and (output.suffix.lower() == GGUF) != (layout is Layout.GGUF):
        raise UsageError(f'{output}: a name in {output.suffix} does not fit to="{layout}"; give another')
    if _is_single(output) and layout in FOLDERS:
        raise UsageError(f"{output}: one file cannot hold the {layout} layout; give a folder instead")


def _plan(model: Model, output: Path, options: OutputOptions) -> OutputPlan:
    """Plan the output, which has every component of the model. Raises UsageError when the plan does not fit."""
    if not model.components:
        where = ", ".join(map(str, model.sources))
        raise UsageError(f"nothing to convert: no component found in {where}; give other sources")
    for component in model.components.values():
        component.require_sound()
    plan = plan_output(model.components, options)
    found = ", ".join(model.components)
    if options.quantize and not model.components.keys() & {*STAGES}:
        raise UsageError(
            f'quantize="{options.quantize}": only {" and ".join(STAGES)} are quantised, found {found}; leave it out'
        )
    if not _is_single(output):
        return plan
    if len(plan.files) > 1:
        raise UsageError(f"{output}: one file cannot hold all of {found}; give a folder instead")
    return replace(plan, files=(replace(plan.files[0], path=Path(output.name)),))


def _require_space(output: Path, plan: OutputPlan) -> None:
    """Raise ConversionError when the disk is too small, before the first byte is written."""
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if plan.nbytes > free:
        raise ConversionError(
            f"{output}: needs {shown_bytes(plan.nbytes)}, {shown_bytes(free)} are free there; choose another disk"
        )


def _write_weights(file: FilePlan, path: Path, start_file: StartFile | None, *, allow_overflow: bool) -> Iterator[str]:
    """Write one file under a temporary name, then give it its own name. Yields notes for the user.

    A file that has its own name was completed by a run that was killed later. Such a file is kept, unless it has
    computed values, which are written again so that values that are not finite are counted."""
    progress = start_file(str(file.path), file.nbytes) if start_file else None
    if path.exists() and file.is_copied:
        if progress:
            progress(file.nbytes)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    if file.path.suffix.lower() == GGUF:
        metadata: dict[str, str | int] = {**file.metadata, **file.numbers}
        counts = write_gguf(partial, file.tensors, metadata, progress, allow_overflow=allow_overflow)
    else:
        counts = write_safetensors(partial, file.tensors, file.metadata, progress, allow_overflow=allow_overflow)
    partial.rename(path)
    yield from counts.notes(file.path.name)


def _write_other_files(model: Model, plan: OutputPlan, tokenizer: OwnTokenizer | None, folder: Path) -> None:
    """Write everything in the output folder that is not weights."""
    for path, index in plan.indexes.items():
        (folder / path).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    layout, combined = plan.options.layout, plan.options.combined
    is_diffusers, has_pipeline = layout is Layout.DIFFUSERS, layout in FOLDERS
    configs = {
        stage: _config_for(component, layout)
        for stage, component in model.components.items()
        if has_pipeline or (stage in ENCODERS and layout not in WEIGHTS_ALONE)
    }
    write_folder_files(folder, configs, index=is_diffusers, combined=combined, quantization=plan.quantization)
    if layout is Layout.MODULAR:
        write_pipeline_parts(folder)
        write_modular_files(folder, configs, plan.options.variant)
    if tokenizer is not None and layout not in WEIGHTS_ALONE:
        for prefix in ("", "prior_") if is_diffusers and combined else ("",):
            copy_tokenizer(tokenizer, folder / f"{prefix}tokenizer")


def _config_for(component: Component, to: Layout) -> NetworkConfig:
    """Return the config to write. The folders of diffusers state its VQGAN scale."""
    if isinstance(component.config, VQGANConfig) and to in FOLDERS and component.layout not in FOLDERS:
        return replace(component.config, scale_factor=DIFFUSERS_VQGAN_SCALE)
    return component.config


def _tokenizer(model: Model) -> OwnTokenizer | None:
    """Return the model's own tokenizer, checked against its text encoder; None when the model has none."""
    encoder = model.components.get(Stage.TEXT_ENCODER)
    rows = encoder.config.vocab_size if encoder and isinstance(encoder.config, TextEncoderConfig) else None
    return check_tokenizer(model.tokenizer, rows)


def _notes_on_tokens(tokenizer: OwnTokenizer | None, options: OutputOptions) -> Iterator[str]:
    if tokenizer is not None and options.layout not in WEIGHTS_ALONE:
        yield from tokenizer.notes
    elif tokenizer is not None and tokenizer.content.added and options.layout is Layout.COMFYUI:
        yield f"ComfyUI uses its own tokenizer, which does not have {listed(list(tokenizer.content.added))}"


def _notes_on_scale(model: Model, options: OutputOptions) -> Iterator[str]:
    vqgan = model.components.get(Stage.VQGAN)
    if options.layout is Layout.GGUF:
        return  # which has no vqgan
    if vqgan and (vqgan.layout in FOLDERS) != (options.layout in FOLDERS):
        yield (
            "the vqgan's scale depends on the layout: the original code multiplies latents by 0.43, diffusers by "
            "0.3764. The weights are the same; images have a little less or more contrast. To choose the scale, use "
            "`cascadekit export MODEL -o BUNDLE --vqgan-scale 0.43`"
        )

"""Merges LoRAs into a checkpoint and keeps its layout. Only the tensors that LoRAs change are computed."""

from __future__ import annotations  # help() shows the types as they are written here

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...schemas.callbacks import Say, StartFile
from ...schemas.created_by import created_by
from ...schemas.errors import UsageError
from ...schemas.forecast import FileSize, Forecast, OnPlan
from ...schemas.messages import known_keywords
from ...schemas.passport import Passport, of_generations, passport_text
from ...schemas.passport_keys import KEY
from ...storage.atomic_output import check_output, staged_output
from ...storage.file_sizes import sizes_of
from ...storage.safetensors_plan import CalculatedRange
from ...storage.safetensors_reader import TensorRange
from ...storage.safetensors_writer import write_safetensors
from ...storage.weights_file import is_pickle, read_weights
from ..checkpoints.open_model import open_model
from ..hub import local_path
from ..passports import made_of
from .changed_tensors import Effect, changed, rewritten
from .merge_plan import LoraPlan, Merge, as_loras, check_numbers, plan_loras
from .merged_files import OutputTree, output_tree
from .read_formats import holds_lora
from .stability_format import DEFAULT_FILTERS

STALE_METADATA = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
MERGED_KEY = "cascadekit.merged_loras"
PICKLED_PREFIX = "state_dict."  # the dictionary in which trainers pickle a checkpoint's tensors


@known_keywords
def merge_loras(
    checkpoint: str | Path,
    loras: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    strengths: Sequence[float] = (),
    text_encoder_strengths: Sequence[float] = (),
    text_encoder: str | Path | None = None,
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    unmerge: bool = False,
    force: bool = False,
    say: Say | None = None,
    start_file: StartFile | None = None,
    on_plan: OnPlan | None = None,
) -> Merge:
    """Write `checkpoint` with `loras` merged into it (`unmerge`: taken out of it) to `output`.

    W becomes W + strength · ΔW, in float32, rounded to the tensor's own dtype. LoRAs apply in the order given, which
    matters for DoRA alone. `strengths` has one number for each LoRA (default 1); so has `text_encoder_strengths`
    (default: `strengths`). A file becomes a file. A folder, or a checkpoint with a separate `text_encoder`, becomes a
    folder. Memory: one LoRA's factors of one module and some 16 MiB blocks.

    Any of the paths may be an hf:// source, which is downloaded first; `say` is called with a line for each download.
    `on_plan` is called with a Forecast once everything was checked; an exception there ends the merge with nothing
    written.

    Raises LayoutError when a LoRA is not for this checkpoint, ConversionError when it cannot be merged or undone.

    Examples:
        >>> done = merge_loras("stage_c.safetensors", ["style.safetensors"], "merged.safetensors", strengths=[0.8])
        >>> print(f"{len(done.effects)} tensors changed, by {done.largest_change:.3g} at most")
    """
    target = Path(output)
    check_output(target, force=force)
    loras = as_loras(loras)
    check_numbers(loras, strengths, text_encoder_strengths, alpha)
    source = local_path(checkpoint, say)
    loras = [local_path(lora, say) for lora in loras]
    apart = local_path(text_encoder, say) if text_encoder is not None else None
    if source.is_file() and holds_lora(source):
        raise UsageError(f"{source}: expected a checkpoint, found a LoRA; give the checkpoint first, then its LoRAs")
    model = open_model([source], text_encoder=apart)
    plan = plan_loras(
        source,
        model.components,
        loras,
        strengths=strengths,
        text_encoder_strengths=text_encoder_strengths,
        module_filters=module_filters,
        alpha=alpha,
        unmerge=unmerge,
    )
    record = None if unmerge else [[e.name, e.strength, e.text_encoder_strength] for e in plan.entries]
    sources = [*model.sources, *map(Path, loras)]
    files = output_tree(source, apart, target)
    check_output(target, force=force, sources=sources, files=_names(plan, files))
    if on_plan:
        on_plan(_forecast(plan, files, target, [Path(lora) for lora in loras]))
    sign = -1 if unmerge else 1
    merged = tuple(
        e.model_copy(update={"strength": sign * e.strength, "text_encoder_strength": sign * e.text_encoder_strength})
        for e in plan.entries
    )
    passport = Passport(created_by=created_by(), values="calculated", loras=merged)
    effects, skipped = _write(
        plan, files, target, sources=sources, record=record, passport=passport, force=force, start_file=start_file
    )
    return Merge(target, tuple(effects), tuple(plan.unapplied), (*model.notes, *plan.notes, *skipped))


def _write(
    plan: LoraPlan,
    files: OutputTree,
    output: Path,
    *,
    sources: Sequence[Path],
    record: list[list[object]] | None,
    passport: Passport,
    force: bool,
    start_file: StartFile | None,
) -> tuple[list[Effect], list[str]]:
    calculated: dict[TensorRange, CalculatedRange] = {}
    effects = []
    for target, changes in plan.changes.items():
        component = plan.components[target.stage].require_sound()
        tensor = component.tensors[target.tensor]
        calculated[tensor], effect = changed(f"{target.stage}: {target.name}", tensor, changes)
        effects.append(effect)
    touched = {tensor.path for tensor in calculated}
    replaced: list[str] = []
    with staged_output(output, force=force, sources=sources, files=_names(plan, files), say=replaced.append) as staged:
        skipped = files.copy_others(staged, touched)
        for path in sorted(touched):
            place = files.place(staged, path)
            if place != staged and is_pickle(path):
                place = place.with_suffix(".safetensors")
            made = tuple(made_of([path], replaced.append).values())
            text = passport_text(of_generations(passport.model_copy(update={"sources": made})))
            _rewrite(path, place, calculated, _metadata(path, record, text), start_file)
    return effects, [*replaced, *skipped]


def _touched(plan: LoraPlan) -> list[Path]:
    """The checkpoint's files that hold changed tensors, sorted."""
    targets = plan.changes
    return sorted({plan.components[target.stage].require_sound().tensors[target.tensor].path for target in targets})


def _names(plan: LoraPlan, files: OutputTree) -> list[str]:
    """The places of merged files below the output; none where the output is a single file."""
    return [name for path in _touched(plan) if (name := files.relative(path).as_posix()) != "."]


def _forecast(plan: LoraPlan, files: OutputTree, output: Path, loras: Sequence[Path]) -> Forecast:
    """What would be read and written: merged files are as large as their sources, and other files are copied."""
    touched = _touched(plan)
    copied = [path for path in files.others(touched) if not files.is_stale(path, touched)]
    writes = tuple(FileSize(files.relative(path).as_posix(), path.stat().st_size) for path in [*touched, *copied])
    notes = (*plan.notes, *(f"not applied: {part}" for part in plan.unapplied), f"{len(plan.changes)} tensors change")
    return Forecast(output, sizes_of([*loras, *touched, *copied]), writes, notes=notes)


def _metadata(source: Path, record: list[list[object]] | None, passport: str) -> dict[str, str]:
    """Return the metadata of the merged file, which is the source's and `record`, with a `passport` of its own."""
    stale = (*STALE_METADATA, KEY)
    metadata = {key: text for key, text in read_weights(source).metadata.items() if key not in stale}
    if record is not None:
        earlier = f"{metadata[MERGED_KEY]} " if MERGED_KEY in metadata else ""
        metadata[MERGED_KEY] = earlier + json.dumps(record)
    return {"format": "pt", **metadata, KEY: passport}


def _rewrite(
    source: Path,
    place: Path,
    calculated: dict[TensorRange, CalculatedRange],
    metadata: Mapping[str, str],
    start_file: StartFile | None,
) -> None:
    plans = rewritten(read_weights(source), calculated)
    if is_pickle(source):  # a pickle nests dictionaries, safetensors has names only
        plans = {name.removeprefix(PICKLED_PREFIX): plan for name, plan in plans.items()}
    progress = start_file(place.name, sum(plan.nbytes for plan in plans.values())) if start_file else None
    write_safetensors(place, plans, metadata, progress)

"""Merges LoRAs into a checkpoint and keeps its layout. Only the tensors that LoRAs change are computed."""

from __future__ import annotations  # help() shows the types as they are written here

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...schemas.callbacks import Say, StartFile
from ...schemas.created_by import created_by
from ...schemas.errors import UsageError
from ...schemas.forecast import FileSize, Forecast, OnPlan
from ...schemas.json_models import LoraEntry
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
from .changed_tensors import changed, rewritten
from .merge_plan import Merge, as_loras, check_numbers, plan_loras
from .merged_files import output_tree
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
    output = Path(output)
    check_output(output, force=force)
    loras = as_loras(loras)
    check_numbers(loras, strengths, text_encoder_strengths, alpha)
    source = local_path(checkpoint, say)
    paths = [local_path(lora, say) for lora in loras]
    apart = local_path(text_encoder, say) if text_encoder is not None else None
    if source.is_file() and holds_lora(source):
        raise UsageError(f"{source}: expected a checkpoint, found a LoRA; give the checkpoint first, then its LoRAs")
    model = open_model([source], text_encoder=apart)
    plan = plan_loras(
        source,
        model.components,
        paths,
        strengths=strengths,
        text_encoder_strengths=text_encoder_strengths,
        module_filters=module_filters,
        alpha=alpha,
        unmerge=unmerge,
    )
    tensors = {at: plan.components[at.stage].require_sound().tensors[at.tensor] for at in plan.changes}
    touched = sorted({tensor.path for tensor in tensors.values()})
    files = output_tree(source, apart, output)
    copied, stale = files.others(touched)
    places = {path: files.merged(path) for path in touched} | {path: files.relative(path) for path in copied}
    sources = [*model.sources, *paths]
    names = [places[path].as_posix() for path in touched if places[path].name]
    check_output(output, force=force, sources=sources, files=names)
    if on_plan:
        unapplied = (f"not applied: {part}" for part in plan.unapplied)
        writes = tuple(FileSize(place.as_posix(), path.stat().st_size) for path, place in places.items())
        said = (*plan.notes, *unapplied, f"{len(plan.changes)} tensors change")
        on_plan(Forecast(output, sizes_of([*paths, *places]), writes, notes=said))
    merged = [changed(f"{at.stage}: {at.name}", tensors[at], changes) for at, changes in plan.changes.items()]
    calculated = {old: new for old, (new, _) in zip(tensors.values(), merged, strict=True)}
    notes: list[str] = []
    with staged_output(output, force=force, sources=sources, files=names, say=notes.append) as staged:
        for path, place in places.items():
            target = staged / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in copied:
                shutil.copyfile(path, target)
                continue
            metadata = _metadata(path, plan.entries, notes.append, record=not unmerge)
            _rewrite(path, target, calculated, metadata, start_file)
    notes += [f"{path}: left out, its weights are not the merged ones" for path in stale]
    effects = tuple(effect for _, effect in merged)
    return Merge(output, effects, tuple(plan.unapplied), (*model.notes, *plan.notes, *notes))


def _metadata(source: Path, loras: Sequence[LoraEntry], say: Say, *, record: bool) -> dict[str, str]:
    """Return the metadata of the merged file: the source's, with a passport; with `record`, the LoRAs are added."""
    stale = (*STALE_METADATA, KEY)
    metadata = {key: text for key, text in read_weights(source).metadata.items() if key not in stale}
    if record:
        earlier = f"{metadata[MERGED_KEY]} " if MERGED_KEY in metadata else ""
        metadata[MERGED_KEY] = earlier + json.dumps([[e.name, e.strength, e.text_encoder_strength] for e in loras])
    made = tuple(made_of([source], say).values())
    passport = Passport(created_by=created_by(), values="calculated", loras=tuple(loras), sources=made)
    return {"format": "pt", **metadata, KEY: passport_text(of_generations(passport))}


def _rewrite(
    source: Path,
    target: Path,
    calculated: Mapping[TensorRange, CalculatedRange],
    metadata: Mapping[str, str],
    start_file: StartFile | None,
) -> None:
    plans = rewritten(read_weights(source), calculated)
    if is_pickle(source):  # a pickle nests dictionaries, safetensors has names only
        plans = {name.removeprefix(PICKLED_PREFIX): plan for name, plan in plans.items()}
    progress = start_file(target.name, sum(plan.nbytes for plan in plans.values())) if start_file else None
    write_safetensors(target, plans, metadata, progress)

"""Merges LoRAs into a checkpoint of any layout, in the layout it has; only what they change is calculated."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...schemas.errors import UsageError
from ...storage.outputs import staged_output
from ...storage.safetensors_header import Progress, TensorRange
from ...storage.weights_file import is_pickle, read_weights
from ..checkpoints.open_model import open_model
from .changed_tensors import Effect, changed, rewritten
from .merge_plan import LoraPlan, plan_loras
from .merged_files import Mirror, mirror
from .pieces import Calculated, write_pieces
from .read_formats import holds_lora
from .stability_format import DEFAULT_FILTERS

STALE_METADATA = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
MERGED_KEY = "cascadekit.merged_loras"
PICKLED_PREFIX = "state_dict."  # what trainers put a checkpoint's tensors in when they pickle it

StartFile = Callable[[str, int], Progress]


@dataclass(frozen=True)
class Merge:
    """What was written: the effect on every changed tensor, the modules nothing was there for, and notes."""

    output: Path
    effects: tuple[Effect, ...]
    unapplied: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest_change(self) -> float:
        return max((effect.largest_change for effect in self.effects), default=0.0)

    @property
    def rounding(self) -> float:
        """How far a value may be from the original after merging and unmerging the same LoRAs, by rounding alone."""
        return max((effect.rounding for effect in self.effects), default=0.0)


def merge_loras(
    checkpoint: str | Path,
    loras: Sequence[str | Path],
    output: str | Path,
    *,
    strengths: Sequence[float] = (),
    text_encoder_strengths: Sequence[float] = (),
    text_encoder: str | Path | None = None,
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    unmerge: bool = False,
    force: bool = False,
    start_file: StartFile | None = None,
) -> Merge:
    """Write `checkpoint` with `loras` merged into it (`unmerge`: taken out of it) to `output`.

    W becomes W + strength · ΔW, in float32, rounded to the tensor's own dtype; LoRAs apply in the order given, which
    matters for DoRA alone. `strengths` are one for each LoRA (default 1), `text_encoder_strengths` likewise (default:
    the same). A file becomes a file; a folder, or a checkpoint with a `text_encoder` given apart, becomes a folder.
    Memory: one LoRA's factors of one module and some 16 MiB blocks.

    Raises LayoutError when a LoRA is not for this checkpoint, ConversionError when it cannot be merged or undone."""
    source, target = Path(checkpoint), Path(output)
    apart = Path(text_encoder) if text_encoder is not None else None
    if source.is_file() and holds_lora(source):
        raise UsageError(
            f"{source}: expected a checkpoint, found a LoRA. Were the two exchanged? The checkpoint comes first"
        )
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
    effects, skipped = _write(plan, mirror(source, apart, target), target, sources, record, force, start_file)
    return Merge(target, tuple(effects), tuple(plan.unapplied), (*model.notes, *plan.notes, *skipped))


def _write(
    plan: LoraPlan,
    files: Mirror,
    output: Path,
    sources: Sequence[Path],
    record: list[list[object]] | None,
    force: bool,
    start_file: StartFile | None,
) -> tuple[list[Effect], list[str]]:
    calculated: dict[TensorRange, Calculated] = {}
    effects = []
    for target, changes in plan.changes.items():
        component = plan.components[target.stage].require_sound()
        tensor = component.tensors[target.tensor]
        calculated[tensor], effect = changed(f"{target.stage}: {target.name}", tensor, changes)
        effects.append(effect)
    touched = {tensor.path for tensor in calculated}
    replaced: list[str] = []
    names = [name for path in sorted(touched) if (name := files.relative(path).as_posix()) != "."]
    with staged_output(output, force=force, sources=sources, files=names, say=replaced.append) as staged:
        skipped = files.copy_others(staged, touched)
        for path in sorted(touched):
            place = files.place(staged, path)
            if place != staged and is_pickle(path):
                place = place.with_suffix(".safetensors")
            _rewrite(path, place, calculated, record, start_file)
    return effects, [*replaced, *skipped]


def _rewrite(
    source: Path,
    place: Path,
    calculated: dict[TensorRange, Calculated],
    record: list[list[object]] | None,
    start_file: StartFile | None,
) -> None:
    header = read_weights(source)
    plans = rewritten(header, calculated)
    if is_pickle(source):  # torch keeps a dictionary in a dictionary, safetensors has names alone
        plans = {name.removeprefix(PICKLED_PREFIX): plan for name, plan in plans.items()}
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE_METADATA}
    if record is not None:
        earlier = f"{metadata[MERGED_KEY]} " if MERGED_KEY in metadata else ""
        metadata[MERGED_KEY] = earlier + json.dumps(record)
    progress = start_file(place.name, sum(plan.nbytes for plan in plans.values())) if start_file else None
    write_pieces(place, plans, {"format": "pt", **metadata}, progress)

"""Merges LoRAs into a checkpoint of any layout, in the layout it has; only what they change is calculated."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...schemas.errors import ConversionError, UsageError
from ...schemas.lora import Target
from ...schemas.stages import NetworkConfig, Stage
from ..identify import Component
from ..model import open_model
from ..outputs import staged_output
from ..safetensors_file import Progress, TensorRange, read_header
from .lora_file import Lora, listed
from .mirror import Mirror, mirror
from .pieces import Calculated, write_pieces
from .reader import open_lora
from .stability import DEFAULT_FILTERS
from .weights import Change, Effect, adapter_change, changed, embedding_change, rewritten

STALE_METADATA = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
MERGED_KEY = "cascadekit.merged_loras"
TOKEN_TABLE = "text_model.embeddings.token_embedding"

MERGED_STAGES = (Stage.PRIOR, Stage.DECODER, Stage.TEXT_ENCODER)  # a LoRA that fits both UNets is the prior's

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


@dataclass
class Plan:
    """The changes by tensor, and what could not be placed."""

    components: dict[Stage, Component]
    changes: dict[Target, list[Change]] = field(default_factory=lambda: defaultdict(list))
    unapplied: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    model = open_model([source], text_encoder=apart)
    plan = Plan({stage: model.components[stage] for stage in MERGED_STAGES if stage in model.components})
    plan.notes.extend(model.notes)
    _require_network(plan, source)
    strength_pairs = _strengths(loras, strengths, text_encoder_strengths)
    for path, (strength, text_strength) in zip(loras, strength_pairs, strict=True):
        lora = open_lora(path, _configs(plan), module_filters=module_filters, alpha=alpha)
        _require_linear(lora, unmerge)
        sign = -1.0 if unmerge else 1.0
        _place(plan, lora, sign * strength, sign * text_strength)
    if not plan.changes:
        raise ConversionError(
            f"{source}: nothing in {', '.join(map(str, loras))} applies to it:\n  {listed(plan.unapplied)}\n"
            "Give the text encoder with --text-encoder, or another checkpoint"
        )
    record = None if unmerge else [[str(Path(p).name), *pair] for p, pair in zip(loras, strength_pairs, strict=True)]
    effects, skipped = _write(plan, mirror(source, apart, target), target, record, force, start_file)
    return Merge(target, tuple(effects), tuple(plan.unapplied), (*plan.notes, *skipped))


def _require_network(plan: Plan, source: Path) -> None:
    if not plan.components:
        raise UsageError(f"{source}: expected a prior (stage C), a decoder (stage B) or a text encoder to merge into")


def _configs(plan: Plan) -> list[NetworkConfig]:
    return [component.config for component in plan.components.values()]


def _strengths(
    loras: Sequence[str | Path], strengths: Sequence[float], for_text: Sequence[float]
) -> list[tuple[float, float]]:
    for name, given in (("strength", strengths), ("text encoder strength", for_text)):
        if given and len(given) != len(loras):
            raise UsageError(f"expected one {name} for each LoRA ({len(loras)}), found {len(given)}")
    plain = list(strengths) or [1.0] * len(loras)
    return list(zip(plain, for_text or plain, strict=True))


def _require_linear(lora: Lora, unmerge: bool) -> None:
    dora = [target.module for target, adapter in lora.adapters.items() if adapter.magnitude is not None]
    if unmerge and dora:
        raise ConversionError(
            f"{lora.path}: DoRA in {len(dora)} modules ({dora[0]}, ...) cannot be taken out again: it replaced the "
            "norms of the original weights, which are lost; use the original checkpoint"
        )


def _place(plan: Plan, lora: Lora, strength: float, text_strength: float) -> None:
    plan.notes.extend(lora.notes)
    for target, adapter in lora.adapters.items():
        if target.stage in plan.components:
            of_text = target.stage is Stage.TEXT_ENCODER
            plan.changes[target].append(adapter_change(adapter, text_strength if of_text else strength))
        else:
            plan.unapplied.append(f"{lora.path}: {target.stage}: {target.module}")
    _place_embeddings(plan, lora, text_strength)


def _place_embeddings(plan: Plan, lora: Lora, strength: float) -> None:
    encoder = plan.components.get(Stage.TEXT_ENCODER)
    for embedding in lora.embeddings:
        what = f"{lora.path}: token embeddings {embedding.name}"
        if embedding.indices is None:
            plan.unapplied.append(f"{what}: vectors of a new token, which a checkpoint has no row for")
        elif encoder is None:
            plan.unapplied.append(f"{what}: need the text encoder")
        else:
            table = encoder.tensors[f"{TOKEN_TABLE}.weight"].shape
            if max(embedding.index_values, default=0) >= table[0]:
                plan.unapplied.append(
                    f"{what}: rows {sorted(embedding.index_values)} of a table of {table[0]}; the rows that new "
                    "tokens start from are not in the file, only in the trainer's config"
                )
            elif embedding.rows.shape[1] != table[1]:
                plan.unapplied.append(f"{what}: width {embedding.rows.shape[1]}, the table's is {table[1]}")
            else:
                plan.changes[Target(Stage.TEXT_ENCODER, TOKEN_TABLE)].append(embedding_change(embedding, strength))


def _write(
    plan: Plan,
    files: Mirror,
    output: Path,
    record: list[list[object]] | None,
    force: bool,
    start_file: StartFile | None,
) -> tuple[list[Effect], list[str]]:
    calculated: dict[TensorRange, Calculated] = {}
    effects = []
    for target, changes in plan.changes.items():
        component = plan.components[target.stage].require_sound()
        tensor = component.tensors[f"{target.module}.weight"]
        calculated[tensor], effect = changed(f"{target.stage}: {target.module}", tensor, changes)
        effects.append(effect)
    touched = {tensor.path for tensor in calculated}
    with staged_output(output, force=force) as staged:
        skipped = files.copy_others(staged, touched)
        for path in sorted(touched):
            _rewrite(path, files.place(staged, path), calculated, record, start_file)
    return effects, skipped


def _rewrite(
    source: Path,
    place: Path,
    calculated: dict[TensorRange, Calculated],
    record: list[list[object]] | None,
    start_file: StartFile | None,
) -> None:
    header = read_header(source)
    plans = rewritten(header, calculated)
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE_METADATA}
    if record is not None:
        earlier = f"{metadata[MERGED_KEY]} " if MERGED_KEY in metadata else ""
        metadata[MERGED_KEY] = earlier + json.dumps(record)
    progress = start_file(place.name, sum(plan.nbytes for plan in plans.values())) if start_file else None
    write_pieces(place, plans, {"format": "pt", **metadata}, progress)

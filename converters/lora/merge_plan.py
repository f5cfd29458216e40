"""Plans a merge: the changes that LoRAs make to the tensors of a checkpoint."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...schemas.errors import ConversionError, UsageError
from ...schemas.json_models import LoraEntry
from ...schemas.lora_keys import LoraTarget
from ...schemas.messages import listed_below, shown
from ...schemas.stages import Stage
from ...storage.file_hashes import fingerprint
from ..checkpoints.component import Component
from .changed_tensors import Change, Effect, adapter_change, embedding_change
from .lora_file import Lora
from .read_formats import open_lora
from .stability_format import DEFAULT_FILTERS

TOKEN_TABLE = "text_model.embeddings.token_embedding"

MERGED_STAGES = (Stage.PRIOR, Stage.DECODER, Stage.TEXT_ENCODER)  # a LoRA that fits both UNets is the prior's


@dataclass(frozen=True)
class Merge:
    """The result of a merge into a checkpoint or bundle: the output, the effect on each changed tensor, and notes.

    `unapplied` are the parts of LoRAs that the checkpoint or the bundle's graphs lack."""

    output: Path
    effects: tuple[Effect, ...]
    unapplied: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest_change(self) -> float:
        """The largest change of any value."""
        return max((effect.largest_change for effect in self.effects), default=0.0)

    @property
    def rounding(self) -> float:
        """The largest distance, by rounding, between a value and its original after a merge and its undoing."""
        return max((effect.rounding for effect in self.effects), default=0.0)


@dataclass
class LoraPlan:
    """The changes of each tensor, the parts of LoRAs that do not apply, notes for the user, and the LoRAs merged."""

    components: dict[Stage, Component]
    changes: dict[LoraTarget, list[Change]] = field(default_factory=lambda: defaultdict(list))
    unapplied: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: list[LoraEntry] = field(default_factory=list)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages with changes."""
        return tuple(stage for stage in self.components if self.of(stage))

    def of(self, stage: Stage) -> dict[str, list[Change]]:
        """Return the changes of one network's tensors, by tensor name."""
        return {target.tensor: changes for target, changes in self.changes.items() if target.stage is stage}


def plan_loras(
    source: Path | str,
    components: Mapping[Stage, Component],
    loras: Sequence[str | Path],
    *,
    strengths: Sequence[float] = (),
    text_encoder_strengths: Sequence[float] = (),
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    unmerge: bool = False,
    advice: str = 'Give the text encoder with text_encoder="PATH", or another checkpoint',
) -> LoraPlan:
    """Read `loras` and plan their changes of `components`; with `unmerge`, plan to take the LoRAs out.

    Messages call the checkpoint `source`, and give `advice` when nothing applies. The other options are those of
    `merge_loras`.

    Raises UsageError when no component can be merged into, and LayoutError when a LoRA is not for these networks.
    Raises ConversionError when no part of the LoRAs applies, or a LoRA cannot be taken out again."""
    check_numbers(loras, strengths, text_encoder_strengths, alpha)
    plan = LoraPlan({stage: components[stage] for stage in MERGED_STAGES if stage in components})
    if not plan.components:
        raise UsageError(f"{source}: expected a prior (stage C), a decoder (stage B) or a text encoder to merge into")
    configs = [component.config for component in plan.components.values()]
    sign = -1.0 if unmerge else 1.0
    plain = strengths or [1.0] * len(loras)
    for path, strength, for_text in zip(loras, plain, text_encoder_strengths or plain, strict=True):
        lora = open_lora(path, configs, module_filters=module_filters, alpha=alpha)
        if unmerge:
            _require_linear(lora)
        entry = LoraEntry(
            name=Path(path).name,
            fingerprint=fingerprint(lora.path),
            strength=sign * strength,
            text_encoder_strength=sign * for_text,
        )
        _place(plan, lora, entry)
        plan.entries.append(entry)
    if not plan.changes:
        raise ConversionError(
            f"{source}: nothing in {', '.join(map(str, loras))} applies to it:{listed_below(plan.unapplied)}\n{advice}"
        )
    return plan


def as_loras(loras: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One LoRA or several as a list. Raises UsageError for pairs of a path and a strength, and for other objects."""
    found = [loras] if isinstance(loras, str | Path) else list(loras)
    for lora in found:
        if not isinstance(lora, str | Path):
            raise UsageError(f"loras: expected paths, found {shown(lora)}; strengths are given as strengths=[0.8]")
    return found


def check_numbers(
    loras: Sequence[str | Path], strengths: Sequence[float], for_text: Sequence[float], alpha: float | None = None
) -> None:
    """Raise UsageError for another number of strengths than of LoRAs, and for numbers that are not finite."""
    for name, given in (("strength", strengths), ("text encoder strength", for_text)):
        if given and len(given) != len(loras):
            raise UsageError(f"expected one {name} for each LoRA ({len(loras)}), found {len(given)}")
        if not all(map(math.isfinite, given)):
            raise UsageError(f"{name} {', '.join(map(str, given))}: expected finite numbers, such as 0.8")
    if alpha is not None and not math.isfinite(alpha):
        raise UsageError(f"alpha {alpha}: expected a finite number, such as 16")


def _require_linear(lora: Lora) -> None:
    dora = [target.module for target, adapter in lora.adapters.items() if adapter.magnitude is not None]
    if dora:
        raise ConversionError(
            f"{lora.path}: DoRA in {len(dora)} modules ({dora[0]}, ...) cannot be taken out again: it replaced the "
            "norms of the original weights, which are lost; use the original checkpoint"
        )


def _place(plan: LoraPlan, lora: Lora, entry: LoraEntry) -> None:
    """Add the changes of a LoRA to the plan, with the strengths of its entry."""
    plan.notes.extend(lora.notes)
    for target, adapter in lora.adapters.items():
        if target.stage in plan.components:
            of_text = target.stage is Stage.TEXT_ENCODER
            strength = entry.text_encoder_strength if of_text else entry.strength
            plan.changes[target].append(adapter_change(adapter, strength))
        else:
            plan.unapplied.append(f"{lora.path}: {target.stage}: {target.name}")
    _place_embeddings(plan, lora, entry.text_encoder_strength)


def _place_embeddings(plan: LoraPlan, lora: Lora, strength: float) -> None:
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
                plan.changes[LoraTarget(Stage.TEXT_ENCODER, TOKEN_TABLE)].append(embedding_change(embedding, strength))

"""Converts LoRA files between formats without changing what they do to a weight."""

from __future__ import annotations  # help() shows the types as they are written here

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.callbacks import Say
from ...schemas.created_by import created_by
from ...schemas.errors import ConversionError, UsageError
from ...schemas.lora_keys import LoraFormat, LoraTarget
from ...schemas.messages import known_keywords, listed_below
from ...schemas.passport import Passport
from ...schemas.stages import NetworkConfig, Stage, TextEncoderConfig, UNetConfig
from ...storage.atomic_output import check_output, staged_output
from ...storage.safetensors_writer import write_safetensors
from ..checkpoints.open_model import open_model
from ..hub import local_path
from ..passports import made_of, stamped
from .adapters import Adapter, Axis
from .factors import Factor, factor_plan
from .lora_file import Embedding, Lora
from .peft_config import CONFIG_NAME, METADATA_KEY, settings
from .read_formats import FOLDER_NAMES, open_lora
from .stability_format import DEFAULT_FILTERS, stability_tensors
from .write_formats import NAMED_FORMATS, Alpha, NamedFormat, named_tensors, unfit

# Metadata of the old file that does not hold for the new one: its settings, its architecture, its hashes.
STALE_METADATA = (
    METADATA_KEY,
    "modelspec.architecture",
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
)


@dataclass(frozen=True)
class LoraConversion:
    """The result of a conversion: the output, the number of modules in it, and notes for the user.

    `details` has a line for each tensor: copied byte for byte, or calculated."""

    output: Path
    modules: int
    notes: tuple[str, ...]
    details: tuple[str, ...] = ()


@known_keywords
def convert_lora(
    source: str | Path,
    output: str | Path,
    to: str | LoraFormat,
    *,
    against: str | Path | None = None,
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    drop: bool = False,
    force: bool = False,
    say: Say | None = None,
) -> LoraConversion:
    """Write the LoRA at `source` in the format `to`; every weight's change stays the same.

    Factors are copied byte for byte into formats that keep alpha. For the others (diffusers, Stability), alpha is
    multiplied into lora_up in F32. In the format peft, `output` may be a folder (adapter_config.json and weights) or a
    file whose metadata holds the settings. `against` is the checkpoint that the LoRA is for, unless that is a released
    one.

    Any of the paths may be an hf:// source, which is downloaded first; `say` is called with a line for each download.

    Raises ConversionError with a list of the parts that the format cannot hold, unless `drop` leaves them out.

    Examples:
        >>> done = convert_lora("style.safetensors", "comfyui.safetensors", "comfyui")
        >>> print(*done.notes, sep="\\n")
    """
    output, to = Path(output), _target_format(to)
    folder = to is LoraFormat.PEFT and output.suffix != ".safetensors"
    if output.suffix != ".safetensors" and not folder:
        raise UsageError(f"{output}: expected a name ending in .safetensors")
    check_output(output, force=force)
    source = local_path(source, say)
    lora = open_lora(source, networks_of(against, say), module_filters=module_filters, alpha=alpha)
    tensors, lost = _tensors(lora, to, module_filters)
    if lost and (not drop or not tensors):
        raise ConversionError(
            f"{lora.path}: {to} cannot hold {len(lost)} parts of it:{listed_below(lost)}\n"
            + ("drop=True leaves them out; or choose another format" if tensors else "Choose another format")
        )
    metadata = _metadata(lora, to)
    replaced: list[str] = []
    files = [CONFIG_NAME, FOLDER_NAMES[0]] if folder else []
    with staged_output(output, force=force, sources=[source, lora.path], files=files, say=replaced.append) as staged:
        if folder:
            staged.mkdir()
            (staged / CONFIG_NAME).write_text(metadata[METADATA_KEY] + "\n", encoding="utf-8")
        weights = staged / FOLDER_NAMES[0] if folder else staged
        plans = {name: factor_plan(factor) for name, factor in tensors.items()}
        write_safetensors(weights, plans, stamped(plans, metadata, _passport(lora, tensors, replaced.append))[0])
    notes = (*replaced, *lora.notes, *_norm_notes(lora, to), *(f"left out: {part}" for part in lost))
    return LoraConversion(output, len(lora.adapters), notes, tuple(_details(tensors)))


def _details(tensors: Mapping[str, Factor]) -> Iterator[str]:
    for name, factor in tensors.items():
        how = "calculated" if factor.source is None else "copied"
        yield f"{name}: {factor.dtype} {'x'.join(map(str, factor.shape)) or 'one value'}, {how}"


def _norm_notes(lora: Lora, to: LoraFormat) -> Iterator[str]:
    """Yield a note on DoRA with a magnitude for each output, which ComfyUI divides by other norms.

    ComfyUI (comfy/weight_adapter/base.py, weight_decompose) takes the norms of W. PEFT, LyCORIS, OneTrainer and this
    package take the norms of W + ΔW."""
    adapters = lora.adapters.values()
    count = sum(a.magnitude is not None and a.magnitude.axis is Axis.OUTPUT for a in adapters)
    if to is LoraFormat.COMFYUI and count:
        yield (
            f"{lora.path}: ComfyUI computes DoRA with a magnitude for each output ({count} modules) along the norms of "
            "the old weights rather than of the changed ones, so its images will differ from the trainer's; "
            "`cascadekit lora merge` gives a checkpoint with the trainer's weights"
        )


def networks_of(checkpoint: str | Path | None, say: Say | None) -> list[NetworkConfig]:
    """Return the configs of the UNets and the text encoder in a checkpoint; none without a checkpoint."""
    if checkpoint is None:
        return []
    configs = [component.config for component in open_model([local_path(checkpoint, say)]).components.values()]
    return [config for config in configs if isinstance(config, UNetConfig | TextEncoderConfig)]


def _target_format(to: str | LoraFormat) -> LoraFormat:
    formats = [kind.value for kind in (*NAMED_FORMATS, LoraFormat.STABILITY)]
    if to not in formats:
        raise UsageError(f"{to}: expected a format to write, one of {', '.join(formats)}")
    return LoraFormat(to)


def _tensors(lora: Lora, to: LoraFormat, filters: Sequence[str]) -> tuple[dict[str, Factor], list[str]]:
    """Return the tensors of the new file, and the parts that it cannot hold with the reasons."""
    if to is LoraFormat.STABILITY:
        tensors, lost = _stability(lora, filters)
    else:
        held, lost = _held(lora, NAMED_FORMATS[to])
        tensors = named_tensors(NAMED_FORMATS[to], held)
    for embedding in lora.embeddings:
        rows = _embedding_tensors(lora, embedding, to)
        tensors |= rows
        if not rows:
            shape = list(embedding.rows.shape)
            lost.append(f"token embeddings {embedding.name} {shape}: the format has no place for them")
    return tensors, lost


def _stability(lora: Lora, filters: Sequence[str]) -> tuple[dict[str, Factor], list[str]]:
    encoder = [f"{module}: the format holds no text encoder" for module in lora.of(Stage.TEXT_ENCODER)]
    biases = [f"{target.name}: the format holds no biases" for target in lora.biases]
    if lora.unet is None:
        return {}, encoder + biases
    tensors, lost = stability_tensors(lora.of(lora.unet.stage), lora.unet, filters)
    return tensors, lost + encoder + biases


def _held(lora: Lora, style: NamedFormat) -> tuple[dict[LoraTarget, Adapter], list[str]]:
    """Return the adapters that a format with names can hold, and the others with the reasons."""
    reasons = {target: unfit(style, target, adapter) for target, adapter in lora.adapters.items()}
    lost = [f"{target.name}: {reason}" for target, reason in reasons.items() if reason]
    held = {target: adapter for target, adapter in lora.adapters.items() if reasons[target] is None}
    if style.alpha is Alpha.SETTINGS and any(adapter.magnitude for adapter in held.values()):
        # One switch of the settings says whether all modules are DoRA.
        plain = [target for target, adapter in held.items() if adapter.magnitude is None]
        lost += [f"{target.module}: LoRA among DoRA; the format holds one kind" for target in plain]
        held = {target: adapter for target, adapter in held.items() if target not in plain}
    return held, lost


def _embedding_tensors(lora: Lora, embedding: Embedding, to: LoraFormat) -> dict[str, Factor]:
    if lora.format is LoraFormat.STABILITY and to is LoraFormat.STABILITY and embedding.indices:
        return {"embeddings.embeddings": embedding.rows, "embeddings.indices": embedding.indices}
    if to is LoraFormat.ONETRAINER and embedding.indices is None:
        return {f"bundle_emb.{embedding.name}.clip_g{'_out' if embedding.output else ''}": embedding.rows}
    return {}


def _passport(lora: Lora, tensors: Mapping[str, Factor], say: Say) -> Passport:
    is_copied = all(factor.source is not None for factor in tensors.values())
    return Passport(
        created_by=created_by(),
        values="copied" if is_copied else "calculated",
        dtypes=dict(Counter(factor.dtype for factor in tensors.values())),
        sources=tuple(made_of([lora.path], say).values()),
    )


def _metadata(lora: Lora, to: LoraFormat) -> dict[str, str]:
    kept = {key: text for key, text in lora.metadata.items() if key not in STALE_METADATA}
    metadata = {"format": "pt", **kept}
    style = NAMED_FORMATS.get(to)
    if style and style.architecture:
        metadata["modelspec.architecture"] = style.architecture
    if style and style.alpha is Alpha.SETTINGS:
        metadata[METADATA_KEY] = json.dumps(_settings(_held(lora, style)[0]), indent=2, sort_keys=True)
    return metadata


def _settings(adapters: Mapping[LoraTarget, Adapter]) -> dict[str, Any]:
    ranks = {target.module: adapter.rank or 0 for target, adapter in adapters.items()}
    alphas = {target.module: adapter.scale * (adapter.rank or 0) for target, adapter in adapters.items()}
    return settings(ranks, alphas, dora=any(adapter.magnitude for adapter in adapters.values()))

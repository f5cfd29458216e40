"""Describes a LoRA file from its header and its alphas alone."""

from __future__ import annotations  # help() shows the types as they are written here

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...schemas.callbacks import Say
from ...schemas.lora_keys import LoraTarget
from ...schemas.messages import known_keywords
from ...schemas.passport_keys import without_passport
from ...schemas.stages import Stage, variant_of
from ..hub import local_path
from .adapters import Adapter
from .convert_lora import networks_of
from .lora_file import Embedding, Lora
from .read_formats import open_lora
from .stability_format import DEFAULT_FILTERS

BLOCK = re.compile(r"(?:down|up)_blocks\.\d+|text_model\.encoder\.layers")


@known_keywords
def inspect_lora(
    path: str | Path,
    *,
    against: str | Path | None = None,
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Return the contents of a LoRA file and the network that it fits, ready for JSON.

    `path` is a LoRA file, the folder of a PEFT adapter, or an hf:// source. `against` is the checkpoint that the LoRA
    is for, unless that is a released one. `module_filters` are those of the training config, for Stability's format.
    `alpha` is used when the file states none (None: the rank). `say` is called with a line for each download.

    Raises CheckpointError for a damaged file, LayoutError for a file that is not a LoRA for these networks, and
    UsageError for a checkpoint.

    Examples:
        >>> inspect_lora("style.safetensors")["network"]
        'prior (full)'
    """
    networks = networks_of(against, say)
    return summary(open_lora(local_path(path, say), networks, module_filters=module_filters, alpha=alpha))


def summary(lora: Lora) -> dict[str, Any]:
    """Return the facts on a LoRA, ready for JSON: format, algorithms, ranks, alphas, networks, targets, embeddings."""
    adapters = list(lora.adapters.values())
    return {
        "path": str(lora.path),
        "format": lora.format,
        "algorithms": dict(Counter(_algorithm(adapter) for adapter in adapters)),
        "ranks": _counted(adapter.rank for adapter in adapters),
        "alphas": _counted(adapter.alpha for adapter in adapters),
        "network": f"{lora.unet.stage} ({variant_of(lora.unet)})" if lora.unet else None,
        "modules": len(adapters),
        "text_encoder_modules": len(lora.of(Stage.TEXT_ENCODER)),
        "targets": dict(sorted(Counter(_block(target) for target in lora.adapters).items())),
        "embeddings": [_embedding(embedding) for embedding in lora.embeddings],
        "dtypes": dict(lora.dtypes),
        "metadata": without_passport(lora.metadata),
        "notes": list(lora.notes),
    }


def _algorithm(adapter: Adapter) -> str:
    return f"{adapter.algorithm} with DoRA" if adapter.magnitude else str(adapter.algorithm)


def _counted(values: Iterable[float | None]) -> dict[str, int]:
    """Return how often each value occurs; "none" stands for None."""
    return dict(Counter("none" if value is None else f"{value:g}" for value in values))


def _block(target: LoraTarget) -> str:
    """Return the block and the module inside it, such as "prior: down_blocks.0 attention.to_q"."""
    match = BLOCK.match(target.module)
    if match is None:
        return f"{target.stage}: {target.name}"
    inside = re.sub(r"^\.\d+\.", "", target.name[match.end() :])
    return f"{target.stage}: {match[0]} {inside}"


def _embedding(embedding: Embedding) -> dict[str, Any]:
    return {
        "name": embedding.name,
        "shape": list(embedding.rows.shape),
        "indices": list(embedding.index_values) or None,
        "output": embedding.output,
    }

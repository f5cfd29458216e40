"""What a LoRA file holds, in words and numbers, from its header and its alphas alone."""

import re
from collections import Counter
from typing import Any

from ...schemas.lora_keys import Target
from ...schemas.stages import Stage, variant_of
from .adapters import Adapter
from .lora_file import Lora

BLOCK = re.compile(r"(?:down|up)_blocks\.\d+|text_model\.encoder\.layers")


def summary(lora: Lora) -> dict[str, Any]:
    """The facts, ready for JSON: format, algorithms, ranks, alphas, targets by block, networks, embeddings."""
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
        "metadata": lora.metadata,
        "notes": list(lora.notes),
    }


def _algorithm(adapter: Adapter) -> str:
    return f"{adapter.algorithm} with DoRA" if adapter.magnitude else str(adapter.algorithm)


def _counted(values: Any) -> dict[str, int]:
    """How often each value occurs; "none" where there is none."""
    return dict(Counter("none" if value is None else f"{value:g}" for value in values))


def _block(target: Target) -> str:
    """Such as "prior: down_blocks.0 attention.to_q"."""
    match = BLOCK.match(target.module)
    if match is None:
        return f"{target.stage}: {target.name}"
    inside = re.sub(r"^\.\d+\.", "", target.name[match.end() :])
    return f"{target.stage}: {match[0]} {inside}"


def _embedding(embedding: Any) -> dict[str, Any]:
    return {
        "name": embedding.name,
        "shape": list(embedding.rows.shape),
        "indices": list(embedding.index_values) or None,
        "output": embedding.output,
    }

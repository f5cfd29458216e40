"""The settings that a PEFT adapter keeps beside its weights: alpha and rank, for all modules or by pattern."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.errors import CheckpointError, LayoutError
from ...schemas.json_text import load_object
from ...schemas.messages import reason
from ...schemas.peft_settings import ALPHA_FIELDS, HARMLESS, LIMITED, OFF, UNDERSTOOD
from ...schemas.stages import Stage
from .peft_patterns import Patterns

CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # metadata in which diffusers keeps the same settings in the weights file
PREFIXES: Mapping[str, Stage | None] = {
    "prior.": Stage.PRIOR,
    "decoder.": Stage.DECODER,
    "text_encoder.": Stage.TEXT_ENCODER,
    "unet.": None,
}


@dataclass(frozen=True)
class PeftConfig:
    """Rank and alpha, and the modules that have other values. With `use_rslora`, the scale is alpha / √rank."""

    default_alpha: float
    default_rank: float
    alphas: Patterns
    ranks: Patterns
    use_rslora: bool
    use_dora: bool

    def alpha(self, module: str, rank: int) -> float:
        """Return the alpha for which alpha / rank is the module's scale."""
        value = self.alphas.value(module, self.default_alpha)
        return value * math.sqrt(rank) if self.use_rslora else value

    def scale(self, module: str) -> float:
        """Return the scale of a module whose factors do not show the rank."""
        return self.alphas.value(module, self.default_alpha) / self.ranks.value(module, self.default_rank)


Configs = Mapping[Stage | None, PeftConfig]  # None: the settings of every network without settings of its own


def find_configs(weights: Path, metadata: Mapping[str, str]) -> Configs:
    """Return the settings in the file's own metadata, else those in adapter_config.json beside it, else none.

    Raises CheckpointError for settings that cannot be read. Raises LayoutError for unknown settings, and for settings
    under which alpha and the factors do not give the change of the weights."""
    if METADATA_KEY in metadata:
        return _parse(f"{weights}: metadata {METADATA_KEY}", metadata[METADATA_KEY])
    path = weights.parent / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    return _parse(str(path), text)


def _parse(where: str, text: str) -> Configs:
    try:
        return {stage: _config(where, own) for stage, own in _by_stage(load_object(text)).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: not the settings of a LoRA: {error}") from error


def _by_stage(values: dict[str, Any]) -> dict[Stage | None, dict[str, Any]]:
    """Sort settings by network. Pipelines keep those of several networks in one table, with a prefix for each."""
    tables: dict[Stage | None, dict[str, Any]] = {}
    for key, value in values.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        tables.setdefault(PREFIXES.get(prefix), {})[key.removeprefix(prefix)] = value
    return tables


def _config(where: str, values: dict[str, Any]) -> PeftConfig:
    kind = str(values.get("peft_type") or "LORA")
    if kind not in ALPHA_FIELDS:
        raise LayoutError(
            f"{where}: peft_type: expected {', '.join(ALPHA_FIELDS)}, found {kind}, which is not supported; "
            "merge it with PEFT, then extract a LoRA"
        )
    problems = list(_refused(values, ALPHA_FIELDS[kind]))
    if problems:
        raise LayoutError(f"{where}: the adapter cannot be used:\n  " + "\n  ".join(problems))
    return PeftConfig(
        default_alpha=_number(ALPHA_FIELDS[kind], values.get(ALPHA_FIELDS[kind], 8)),
        default_rank=_number("r", values.get("r", 8)) or 8,
        alphas=Patterns("alpha_pattern", _table("alpha_pattern", values)),
        ranks=Patterns("rank_pattern", _table("rank_pattern", values)),
        use_rslora=bool(values.get("use_rslora", False)),
        use_dora=bool(values.get("use_dora", False)),
    )


def _refused(values: Mapping[str, Any], alpha: str) -> Iterator[str]:
    """Yield a line for each setting that is unknown, or has a value that is not supported."""
    for name, value in values.items():
        if name in UNDERSTOOD or name in HARMLESS or name == alpha or value in OFF:
            continue
        limit = LIMITED.get(name)
        if limit is None:
            yield f"{name}: {_shown(value)}: an unknown setting; merge the adapter with PEFT"
        elif _plain(value) not in limit.values:
            expected = " or ".join(json.dumps(allowed) for allowed in limit.values) or "none"
            yield f"{name}: expected {expected}, found {_shown(value)}: {limit.why}"


def _plain(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _table(name: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): _number(f"{name}: {key}", value) for key, value in (values.get(name) or {}).items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, found {value!r}")
    return float(value)


def settings(ranks: Mapping[str, int], alphas: Mapping[str, float], *, dora: bool) -> dict[str, Any]:
    """Return the settings of an adapter with these ranks and alphas by module, ready for JSON."""
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{module}": a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "use_dora": dora,
        "bias": "none",
        "inference_mode": True,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    """Return the most frequent value; whole numbers as integers."""
    found = list(values.values())
    value = max(dict.fromkeys(found), key=found.count)
    return int(value) if float(value).is_integer() else value

"""The settings that a PEFT adapter keeps beside its weights: alpha and rank, for all modules or by pattern."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...schemas.errors import CheckpointError
from ...schemas.stages import Stage

CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the same settings inside the weights file


@dataclass(frozen=True)
class PeftConfig:
    """`lora_alpha` and the modules that have another; `use_rslora`: the scale is alpha / √rank."""

    lora_alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def alpha(self, module: str, rank: int) -> float:
        """The alpha that makes alpha / rank the module's scale."""
        value = next((a for key, a in self.alpha_pattern.items() if _matches(key, module)), self.lora_alpha)
        return value * math.sqrt(rank) if self.use_rslora else value


def find_config(weights: Path, metadata: Mapping[str, str]) -> PeftConfig | None:
    """The settings in the file's own metadata, else in adapter_config.json beside it."""
    if METADATA_KEY in metadata:
        return _parse(f"{weights}: metadata {METADATA_KEY}", metadata[METADATA_KEY])
    path = weights.parent / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return _parse(str(path), text)


def _parse(where: str, text: str) -> PeftConfig:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        values = _of_prior(values)
        if values.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"peft_type: expected LORA, found {values['peft_type']}")
        if values.get("fan_in_fan_out"):
            raise ValueError("fan_in_fan_out: expected false; no module of these networks is transposed")
        patterns = {str(key): _number(key, value) for key, value in (values.get("alpha_pattern") or {}).items()}
        return PeftConfig(
            _number("lora_alpha", values.get("lora_alpha", 8)), patterns, bool(values.get("use_rslora", False))
        )
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not the settings of a LoRA: {error}") from error


def _of_prior(values: dict[str, Any]) -> dict[str, Any]:
    """Pipelines keep the settings of several networks in one table, each behind its name."""
    prefix = f"{Stage.PRIOR}."
    own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return own or values


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, found {value!r}")
    return float(value)


def _matches(pattern: str, module: str) -> bool:
    """PEFT takes patterns for regular expressions matching the end of a name; names are all we expect in them."""
    name = re.sub(r"\\(.)", r"\1", pattern.removesuffix("$"))
    if name.startswith("^"):
        return module == name[1:]
    return module == name or module.endswith(f".{name}")


def settings(ranks: Mapping[str, int], alphas: Mapping[str, float], *, dora: bool) -> dict[str, Any]:
    """The settings of an adapter with these ranks and alphas by module, ready for JSON."""
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
    """The most frequent value, whole numbers as such."""
    found = list(values.values())
    value = max(dict.fromkeys(found), key=found.count)
    return int(value) if float(value).is_integer() else value

"""The contents of a LoRA file by diffusers names, whatever names the file has."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ...schemas.lora_keys import LoraFormat, LoraTarget
from ...schemas.stages import PRESETS, NetworkConfig, Stage, TextEncoderConfig, UNetConfig, variant_of
from .adapters import Adapter
from .factors import Factor

Config = TypeVar("Config", UNetConfig, TextEncoderConfig)


@dataclass(frozen=True)
class Embedding:
    """Token embeddings that came with a LoRA: `rows` [n, width].

    In Stability's format they are added to the rows `indices` of the token table. In OneTrainer's they are the vectors
    of a new token `name`, which are added to the encoder's output when `output` is True."""

    name: str
    rows: Factor
    indices: Factor | None = None
    index_values: tuple[int, ...] = ()
    output: bool = False


@dataclass(frozen=True)
class Lora:
    """A LoRA file: its adapters by target, token embeddings, metadata, and notes for the user.

    `unet` is the UNet that the adapters fit; None when they change the text encoder alone."""

    path: Path
    format: LoraFormat
    adapters: dict[LoraTarget, Adapter]
    unet: UNetConfig | None
    embeddings: tuple[Embedding, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, stage: Stage) -> dict[str, Adapter]:
        """Return the adapters of one network's weights, by module."""
        return {t.module: adapter for t, adapter in self.adapters.items() if t.stage is stage and t.module == t.name}

    @property
    def biases(self) -> list[LoraTarget]:
        """The targets that are biases."""
        return [target for target in self.adapters if target.module != target.name]

    @property
    def dtypes(self) -> Counter[str]:
        return Counter(factor.dtype for adapter in self.adapters.values() for factor in adapter.factors.values())

    def describe(self) -> str:
        """Return a few words, such as "kohya, for the prior (full)"."""
        return f"{self.format}, for " + (describe(self.unet) if self.unet else "the text encoder alone")


def describe(config: NetworkConfig) -> str:
    return f"the {config.stage} ({variant_of(config)})"


def candidates(kind: type[Config], networks: Sequence[NetworkConfig]) -> list[Config]:
    """Return the networks of one `kind` that a LoRA may be for: those given, else the released ones, priors first."""
    given = [config for config in networks if isinstance(config, kind)]
    return given or [config for config in PRESETS.values() if isinstance(config, kind)]

"""Everything besides prompts, pictures and seed that decides what an image looks like."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from .errors import UsageError
from .sizes import SizePolicy


class Sampler(StrEnum):
    """Whose sampler: diffusers' DDPM, or Stability's own (gdf)."""

    DDPM_WUERSTCHEN = "ddpm-wuerstchen"
    GDF = "gdf"


def _ratios(value: object) -> object:
    """Also "1,0.5,0", from a table's cell."""
    return tuple(value.split(",")) if isinstance(value, str) else value


Ratios = Annotated[tuple[float, ...], BeforeValidator(_ratios)]


@dataclass(frozen=True)
class Settings:
    """A size, and how both stages are sampled.

    Lists of timestep ratios fall from at most 1 to at least 0 and take the place of a number of steps: as many steps
    as there are gaps. Shift and rescale are the gdf sampler's. `strength` is where sampling starts on an initial
    picture: 1 forgets it, the nearer to 0 the less changes."""

    __pydantic_config__ = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int
    height: int
    prior_steps: int = 20
    prior_guidance: float = 4.0
    decoder_steps: int = 10
    decoder_guidance: float = 0.0
    size_policy: SizePolicy = SizePolicy.EXACT
    sampler: Sampler = Sampler.DDPM_WUERSTCHEN
    prior_shift: float = 1.0
    decoder_shift: float = 1.0
    rescale: float = 0.0
    prior_timesteps: Ratios = ()
    decoder_timesteps: Ratios = ()
    strength: float = 0.8
    weighted: bool = False
    long_prompts: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values by name; those that say nothing (lists that are empty) are left out."""
        found = {name: value for name, value in asdict(self).items() if value != ()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


# Where a sampler's own defaults differ: Stability's notebooks sample so.
SAMPLER_DEFAULTS: Mapping[Sampler, Mapping[str, float]] = {
    Sampler.DDPM_WUERSTCHEN: {},
    Sampler.GDF: {"prior_shift": 2.0, "decoder_guidance": 1.1, "rescale": 0.7},
}

SETTINGS = frozenset(field.name for field in fields(Settings))
_ADAPTER = TypeAdapter(Settings)


def parse_settings(given: Mapping[str, Any], default_size: tuple[int, int]) -> Settings:
    """Settings from what is `given` of them, text for numbers accepted; the rest is the sampler's and Settings' own
    defaults, the size (width, height) `default_size`. Raises UsageError naming each field that is wrong."""
    width, height = default_size
    try:
        sampler = Sampler(given.get("sampler", Sampler.DDPM_WUERSTCHEN))
    except ValueError:
        raise UsageError(f"sampler {given['sampler']!r}: expected {' or '.join(Sampler)}") from None
    try:
        return _ADAPTER.validate_python({"width": width, "height": height, **SAMPLER_DEFAULTS[sampler], **given})
    except ValidationError as error:
        raise UsageError(f"settings: {wrong_fields(error)}") from error


def wrong_fields(error: ValidationError) -> str:
    """What pydantic found, a few words for each field."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: "
        + ("unknown" if e["type"] in ("unexpected_keyword_argument", "extra_forbidden") else e["msg"])
        for e in error.errors()[:5]
    )

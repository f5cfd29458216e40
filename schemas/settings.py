"""Everything besides prompts, pictures and seed that decides what an image looks like."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from numbers import Integral, Real
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from .errors import UsageError
from .limits import MAX_IMAGE_SIDE, MAX_STEPS, MAX_WEIGHT
from .sizes import SizePolicy


class Sampler(StrEnum):
    """Whose sampler: diffusers' DDPM, or Stability's own (gdf)."""

    DDPM_WUERSTCHEN = "ddpm-wuerstchen"
    GDF = "gdf"


def _ratios(value: object) -> object:
    """Also "1,0.5,0", from a table's cell."""
    return tuple(value.split(",")) if isinstance(value, str) else value


Ratios = Annotated[tuple[float, ...], BeforeValidator(_ratios)]
Range = tuple[type[Real], float, float]  # whole numbers or any, from the one to the other

_SIDE, _STEPS = (Integral, 1, MAX_IMAGE_SIDE), (Integral, 1, MAX_STEPS)
_WEIGHT, _SHIFT, _SHARE = (Real, -MAX_WEIGHT, MAX_WEIGHT), (Real, 0, MAX_WEIGHT), (Real, 0, 1)

# What every number of the settings may be. No comparison holds for NaN.
RANGES: Mapping[str, Range] = {
    "width": _SIDE,
    "height": _SIDE,
    "prior_steps": _STEPS,
    "decoder_steps": _STEPS,
    "prior_guidance": _WEIGHT,
    "decoder_guidance": _WEIGHT,
    "prior_shift": _SHIFT,
    "decoder_shift": _SHIFT,
    "rescale": _SHARE,
    "strength": _SHARE,
}
LONG, LONG_BITS = 60, 512  # characters of a value in a message, bits of a number that is written out
TIMESTEPS = ("prior_timesteps", "decoder_timesteps")


@dataclass(frozen=True)
class Settings:
    """A size, and how both stages are sampled.

    Lists of timestep ratios fall from at most 1 to at least 0 and take the place of a number of steps: as many steps
    as there are gaps. Shift and rescale are the gdf sampler's. `strength` is where sampling starts on an initial
    picture: 1 forgets it, the nearer to 0 the less changes. Raises UsageError for numbers outside RANGES, NaN too."""

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

    def __post_init__(self) -> None:
        wrong = [*_outside(self)]
        if wrong:
            raise UsageError(f"settings: {'; '.join(wrong)}")

    def to_json(self) -> dict[str, Any]:
        """Plain values by name; those that say nothing (lists that are empty) are left out."""
        found = {name: value for name, value in asdict(self).items() if value != ()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _outside(settings: Settings) -> Iterator[str]:
    """What is wrong with the numbers, a few words for each."""
    for name, (kind, least, most) in RANGES.items():
        value = getattr(settings, name)
        if not _is_within(value, kind, least, most):
            yield f"{name} {shown(value)}: expected {least} to {most}"
    for name in TIMESTEPS:
        ratios = getattr(settings, name)
        if len(ratios) > MAX_STEPS + 1:
            yield f"{name}: expected at most {MAX_STEPS + 1}, found {len(ratios)}"
        elif wrong := [ratio for ratio in ratios if not _is_within(ratio, *_SHARE)]:
            yield f"{name} {shown(wrong[0])}: expected ratios from 0 to 1"


def _is_within(value: Any, kind: type, least: float, most: float) -> bool:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    return is_number and bool(least <= value <= most)


def shown(value: object) -> str:
    """A wrong value in a message: never long, and whatever it is."""
    if isinstance(value, list | tuple | dict):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > LONG_BITS:
        return "a number of hundreds of digits"
    text = repr(value[:LONG] if isinstance(value, str) else value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


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
        raise UsageError(f"sampler {shown(given['sampler'])}: expected {' or '.join(Sampler)}") from None
    try:
        return _ADAPTER.validate_python({"width": width, "height": height, **SAMPLER_DEFAULTS[sampler], **given})
    except ValidationError as error:
        raise UsageError(f"settings: {wrong_fields(error)}") from error


def wrong_fields(error: ValidationError) -> str:
    """What pydantic found, a few words for each field."""
    return "; ".join(
        f"{'.'.join(str(part)[:LONG] for part in e['loc'])}: "
        + ("unknown" if e["type"] in ("unexpected_keyword_argument", "extra_forbidden") else e["msg"])
        for e in error.errors()[:5]
    )

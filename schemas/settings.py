"""Settings: everything that decides an image besides prompts, pictures and the seed.

People and PNG metadata write settings flat: `prior_steps`, `decoder_guidance`. Code passes them on as one value:
`Settings.prior` and `Settings.decoder` each give the `Sampling` of one stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Self, TypedDict, Unpack

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from .errors import UsageError
from .limits import MAX_IMAGE_SIDE, MAX_STEPS, MAX_WEIGHT
from .messages import known_fields, require_known, shown, wrong_fields
from .sampler import Sampler as Sampler
from .sizes import SizePolicy


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keywords of `Cascade.prior` and `Cascade.decode`."""

    steps: int
    guidance: float
    sampler: Sampler | str
    shift: float
    rescale: float
    timesteps: Sequence[float]


class SettingsOptions(TypedDict, total=False):
    """The fields of `Settings` as keywords of `Cascade.generate`."""

    width: int
    height: int
    prior_steps: int
    prior_guidance: float
    decoder_steps: int
    decoder_guidance: float
    size_policy: SizePolicy | str
    sampler: Sampler | str
    prior_shift: float
    decoder_shift: float
    rescale: float
    prior_timesteps: Sequence[float]
    decoder_timesteps: Sequence[float]
    strength: float
    weighted: bool
    long_prompts: bool


@dataclass(frozen=True)
class Sampling:
    """How one stage is sampled.

    A `guidance` above 1 turns classifier-free guidance on. `timesteps` are ratios that fall from at most 1 to at least
    0; they replace `steps`, and there is one ratio more than there are steps. `shift` and `rescale` belong to the gdf
    sampler. `runtime.sampling.samplers.make_schedule` checks the values."""

    steps: int
    guidance: float
    sampler: Sampler | str = Sampler.DDPM_WUERSTCHEN
    shift: float = 1.0
    rescale: float = 0.0
    timesteps: Sequence[float] = ()

    @property
    def guides(self) -> bool:
        """True when the stage computes an unconditional prediction too."""
        return self.guidance > 1

    def changed(self, **changes: Unpack[SamplingOptions]) -> Self:
        """A copy with these fields changed. Raises UsageError that suggests a name for each unknown one."""
        known = [field.name for field in fields(self)]
        require_known("sampling", changes, known)
        return replace(self, **changes)


# diffusers' defaults for the two stages.
PRIOR_SAMPLING, DECODER_SAMPLING = Sampling(steps=20, guidance=4.0), Sampling(steps=10, guidance=0.0)


def _ratios(value: object) -> object:
    """Split a table's cell such as "1,0.5,0"; pydantic checks every other value."""
    return tuple(value.split(",")) if isinstance(value, str) else value


Ratios = Annotated[tuple[float, ...], BeforeValidator(_ratios)]
NumberRange = tuple[type[Real], float, float]  # the kind of number, its least and its greatest value

_SIDE, _STEPS = (Integral, 1, MAX_IMAGE_SIDE), (Integral, 1, MAX_STEPS)
_WEIGHT, _SHIFT, _SHARE = (Real, -MAX_WEIGHT, MAX_WEIGHT), (Real, 0, MAX_WEIGHT), (Real, 0, 1)

# The range of every number of the settings. NaN is in none of them.
RANGES: Mapping[str, NumberRange] = {
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
TIMESTEPS = ("prior_timesteps", "decoder_timesteps")


@known_fields
@dataclass(frozen=True)
class Settings:
    """The size of an image in pixels, and how both stages are sampled.

    `prior_timesteps` and `decoder_timesteps` replace the number of steps, see `Sampling`. Shift and rescale belong to
    the gdf sampler. `strength` is the timestep ratio where sampling starts on an initial picture. At 1 nothing of the
    picture remains; near 0 little changes. `weighted` reads (words:1.2) in prompts as emphasis. `long_prompts` encodes
    prompts beyond 77 tokens in chunks.

    Raises UsageError for a number outside its range, NaN included.

        settings = Settings(1024, 768, prior_steps=30)
        settings.prior  # Sampling(steps=30, guidance=4.0, ...)
    """

    __pydantic_config__ = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int
    height: int
    prior_steps: int = PRIOR_SAMPLING.steps
    prior_guidance: float = PRIOR_SAMPLING.guidance
    decoder_steps: int = DECODER_SAMPLING.steps
    decoder_guidance: float = DECODER_SAMPLING.guidance
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

    @property
    def prior(self) -> Sampling:
        """How stage C is sampled."""
        return self._sampling("prior")

    @property
    def decoder(self) -> Sampling:
        """How stage B is sampled."""
        return self._sampling("decoder")

    def _sampling(self, stage: str) -> Sampling:
        own = {name: getattr(self, f"{stage}_{name}") for name in ("steps", "guidance", "shift", "timesteps")}
        return Sampling(**own, sampler=self.sampler, rescale=self.rescale)

    def to_json(self) -> dict[str, Any]:
        """Flat plain values that `parse_settings` reads; empty lists are left out."""
        found = {name: value for name, value in asdict(self).items() if value != ()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _outside(settings: Settings) -> Iterator[str]:
    """One short message for each number outside its range."""
    for name, (kind, least, most) in RANGES.items():
        value = getattr(settings, name)
        if not _is_within(value, kind, least, most):
            yield f"{_argument(name, value)}: expected {least} to {most}"
    for name in TIMESTEPS:
        ratios = getattr(settings, name)
        if len(ratios) > MAX_STEPS + 1:
            yield f"{name}: expected at most {MAX_STEPS + 1}, found {len(ratios)}"
        elif wrong := [ratio for ratio in ratios if not _is_within(ratio, *_SHARE)]:
            yield f"{_argument(name, wrong[0])}: expected ratios from 0 to 1"


def _argument(name: str, value: object) -> str:
    """The setting as an argument, which the command line turns into its option; a value too long for one is described.

    Examples:
        >>> _argument("prior_steps", -1)
        'prior_steps=-1'
    """
    text = shown(value)
    return f"{name}={text}" if text == repr(value) else f"{name} {text}"


def _is_within(value: Any, kind: type, least: float, most: float) -> bool:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    return is_number and bool(least <= value <= most)


# Defaults that depend on the sampler; the values for gdf are from Stability's notebooks.
SAMPLER_DEFAULTS: Mapping[Sampler, Mapping[str, float]] = {
    Sampler.DDPM_WUERSTCHEN: {},
    Sampler.GDF: {"prior_shift": 2.0, "decoder_guidance": 1.1, "rescale": 0.7},
}

SETTINGS = frozenset(field.name for field in fields(Settings))


@cache
def _adapter() -> TypeAdapter[Settings]:
    """The checks of the settings, which take a while to prepare."""
    return TypeAdapter(Settings)


def parse_settings(given: Mapping[str, Any], default_size: tuple[int, int]) -> Settings:
    """Make settings of flat values, such as a PNG's metadata; text is accepted for numbers.

    `default_size` is (width, height). Other defaults depend on the sampler, see SAMPLER_DEFAULTS. Raises UsageError
    that names each wrong field."""
    width, height = default_size
    try:
        sampler = Sampler(given.get("sampler", Sampler.DDPM_WUERSTCHEN))
    except ValueError:
        raise UsageError(f"sampler {shown(given['sampler'])}: expected {' or '.join(Sampler)}") from None
    try:
        return _adapter().validate_python({"width": width, "height": height, **SAMPLER_DEFAULTS[sampler], **given})
    except ValidationError as error:
        raise UsageError(f"settings: {wrong_fields(error, SETTINGS)}") from error

"""A request for one image: what the command line, a line of a batch, the page and a PNG's metadata all say."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import UsageError
from .settings import SETTINGS, Settings, parse_settings, wrong_fields

# Metadata that tells how an image was made without deciding what it looks like to `generate`.
INFORMATION = frozenset({"vqgan_scale", "engine", "precision", "bundle", "version", "created_by", "key"})
CONTROL = re.compile(r"(?P<name>[a-z_]+)=(?P<path>.+?)(?::(?P<strength>\d*\.?\d+))?")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PictureRef(_Frozen):
    """A picture's file, and the SHA-256 it had when it was used."""

    path: str
    sha256: str | None = None


class ControlRef(PictureRef):
    """A ControlNet by name, the picture it looks at, and how strongly it counts."""

    name: str
    strength: float = 1.0


class LoraRef(_Frozen):
    """A LoRA by name or path, merged into the weights with this strength."""

    name: str
    strength: float = 1.0


def _picture(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _several(value: object) -> object:
    """One where several may be; "a;b" from a table's cell."""
    if isinstance(value, str):
        return [part for part in value.split(";") if part]
    return [value] if isinstance(value, Mapping) else value


def _control(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = CONTROL.fullmatch(value)
    if not match:
        raise ValueError(f"{value!r}: expected NAME=PICTURE or NAME=PICTURE:STRENGTH, such as canny=photo.png:0.8")
    return {key: found for key, found in match.groupdict().items() if found is not None}


Picture = Annotated[PictureRef, BeforeValidator(_picture)]
ControlEntry = Annotated[ControlRef, BeforeValidator(_control)]


class Request(_Frozen):
    """One image. `seed` with `index` and `batch`: that image of a batch which one generator draws."""

    prompt: str
    negative: str = ""
    seed: int = Field(ge=-(2**63), lt=2**64)
    index: int = Field(default=0, ge=0)
    batch: int = Field(default=1, ge=1)
    settings: Settings
    image_prompts: Annotated[tuple[Picture, ...], BeforeValidator(_several)] = ()
    init_image: Picture | None = None
    mask: Picture | None = None
    controls: Annotated[tuple[ControlEntry, ...], BeforeValidator(_several)] = ()
    loras: tuple[LoraRef, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Flat plain values, as `parse_request` reads them; what says nothing is left out."""
        own = self.model_dump(exclude={"settings"}, exclude_defaults=True)
        return {"prompt": self.prompt, "negative": self.negative, **_placed(self), **own, **self.settings.to_json()}

    @property
    def group(self) -> tuple[object, ...]:
        """Requests of one group can be drawn together: they differ in prompts and seeds alone."""
        return self.settings, self.image_prompts, self.init_image, self.mask, self.controls, self.loras


def _placed(request: Request) -> dict[str, int]:
    return {"seed": request.seed, "index": request.index, "batch": request.batch}


def parse_request(given: Mapping[str, Any], default_size: tuple[int, int]) -> Request:
    """A request from flat values; text is accepted for numbers, None and "" for what is not said.

    Raises UsageError naming each field that is wrong, unknown or missing."""
    said = {name: value for name, value in given.items() if value not in (None, "") or name in ("prompt", "negative")}
    settings = parse_settings({name: said[name] for name in said.keys() & SETTINGS}, default_size)
    rest = {name: said[name] for name in said if name not in SETTINGS | INFORMATION}
    try:
        request = Request(settings=settings, **rest)
    except ValidationError as error:
        raise UsageError(f"request: {wrong_fields(error)}") from error
    if request.index >= request.batch:
        raise UsageError(
            f"request: index {request.index} of a batch of {request.batch}: expected 0 to {request.batch - 1}"
        )
    return request


def loras_of(given: Mapping[str, Any]) -> tuple[LoraRef, ...]:
    """The LoRAs among flat values. Raises UsageError for what is no list of them."""
    try:
        return TypeAdapter(tuple[LoraRef, ...]).validate_python(given.get("loras", ()))
    except ValidationError as error:
        raise UsageError(f"loras: {wrong_fields(error)}") from error

"""A request for one image, in the form that the command line, batches, the page and PNG metadata share."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from .errors import UsageError
from .json_models import FrozenModel
from .limits import MAX_IMAGES, MAX_PICTURES, MAX_WEIGHT
from .messages import LONG, require_known, wrong_fields
from .settings import SETTINGS, Settings, parse_settings

NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"  # has one way to match, so that long digits of a hostile text take no time
CONTROL = re.compile(rf"(?P<name>[a-z_]+)=(?P<path>.+?)(?::(?P<strength>{NUMBER}))?")

Strength = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]


class PictureRef(FrozenModel):
    """The path of a picture, and the SHA-256 that the file had when it was used."""

    path: str
    sha256: str | None = None


class ControlRef(PictureRef):
    """A ControlNet by name, the path of the picture it follows, and the factor of its residuals."""

    name: str
    strength: Strength = 1.0


class LoraRef(FrozenModel):
    """A LoRA by name or path, merged into the weights with this strength."""

    name: str
    strength: Strength = 1.0


def _picture(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text, found half of a surrogate pair at character {error.start + 1}") from None
    return value


def _several(value: object) -> object:
    """Make a list of a single entry or of a table's cell such as "a;b"."""
    if isinstance(value, str):
        return [part for part in value.split(";") if part]
    return [value] if isinstance(value, Mapping) else value


def _control(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = CONTROL.fullmatch(value)
    if not match:
        raise ValueError(
            f"{value[:LONG]!r}: expected NAME=PICTURE or NAME=PICTURE:STRENGTH, such as canny=photo.png:0.8"
        )
    return {key: found for key, found in match.groupdict().items() if found is not None}


Text = Annotated[str, AfterValidator(_text)]
Several = Field(max_length=MAX_PICTURES)
Picture = Annotated[PictureRef, BeforeValidator(_picture)]
ControlEntry = Annotated[ControlRef, BeforeValidator(_control)]


class Request(FrozenModel):
    """Everything that decides one image: number `index` of a `batch` whose noise comes from one generator."""

    prompt: Text
    negative: Text = ""
    seed: int = Field(ge=-(2**63), lt=2**64)
    index: int = Field(default=0, ge=0, lt=MAX_IMAGES)
    batch: int = Field(default=1, ge=1, le=MAX_IMAGES)
    settings: Settings
    image_prompts: Annotated[tuple[Picture, ...], BeforeValidator(_several), Several] = ()
    init_image: Picture | None = None
    mask: Picture | None = None
    controls: Annotated[tuple[ControlEntry, ...], BeforeValidator(_several), Several] = ()
    loras: Annotated[tuple[LoraRef, ...], Several] = ()

    def to_json(self) -> dict[str, Any]:
        """Flat plain values that `parse_request` reads; values equal to their default are left out."""
        own = self.model_dump(exclude={"settings"}, exclude_defaults=True)
        always = {name: getattr(self, name) for name in ("prompt", "negative", "seed", "index", "batch")}
        return always | own | self.settings.to_json()

    @property
    def group(self) -> tuple[object, ...]:
        """The key of requests that can be generated together: they differ in prompts and seeds alone."""
        return self.settings, self.image_prompts, self.init_image, self.mask, self.controls, self.loras


FIELDS = SETTINGS | (Request.model_fields.keys() - {"settings"})
_SAID: TypeAdapter[str] = TypeAdapter(Text)
_INFORMATION: Mapping[str, TypeAdapter[Any]] = {
    "vqgan_scale": TypeAdapter(Annotated[float, Field(allow_inf_nan=False)]),
    "precision": TypeAdapter(dict[Text, Text]),
    **dict.fromkeys(("engine", "bundle", "version", "created_by", "key"), _SAID),
}
INFORMATION = frozenset(_INFORMATION)  # fields about how an image was generated; `generate` ignores them


def parse_request(given: Mapping[str, Any], default_size: tuple[int, int]) -> Request:
    """Make a request of flat values. Text is accepted for numbers; None and "" count as not given.

    Raises UsageError naming each field that is wrong, unknown or missing."""
    texts = ("prompt", "negative")
    present = {name: value for name, value in given.items() if value not in (None, "") or name in texts}
    settings = parse_settings({name: present[name] for name in present.keys() & SETTINGS}, default_size)
    rest = {name: present[name] for name in present if name not in SETTINGS | INFORMATION}
    require_known("request", rest, FIELDS)
    try:
        request = Request(settings=settings, **rest)
    except ValidationError as error:
        raise UsageError(f"request: {wrong_fields(error)}") from error
    if request.index >= request.batch:
        raise UsageError(
            f"request: index {request.index} of a batch of {request.batch}: expected 0 to {request.batch - 1}"
        )
    return request


def understood(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split flat values into the sound ones, as plain JSON values, and the names of the others.

    Each value is checked by itself. So the page can show the sound values of an image from a newer version, or of a
    manipulated one."""
    found: dict[str, Any] = {}
    others: list[str] = []
    for name, value in given.items():
        if value in (None, "") and name in FIELDS:
            continue
        try:
            found[name] = _one(name, value)
        except (UsageError, ValidationError, KeyError):
            others.append(name)
    return found, others


def _one(name: str, value: Any) -> Any:
    """The value of one field. Raises KeyError for an unknown name, UsageError or ValidationError for a wrong value."""
    if name in _INFORMATION:
        return _INFORMATION[name].validate_python(value)
    if name not in FIELDS:
        raise KeyError(name)
    # An index is only sound within a batch, and a request has a prompt and a seed.
    request = parse_request({"prompt": "", "seed": 0, "batch": MAX_IMAGES, name: value}, (1, 1))
    return {**request.model_dump(mode="json"), **asdict(request.settings)}[name]


def loras_of(given: Mapping[str, Any]) -> tuple[LoraRef, ...]:
    """The LoRAs among flat values. Raises UsageError when `loras` is not a list of LoRAs."""
    try:
        return TypeAdapter(Annotated[tuple[LoraRef, ...], Several]).validate_python(given.get("loras", ()))
    except ValidationError as error:
        raise UsageError(f"loras: {wrong_fields(error)}") from error

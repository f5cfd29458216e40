"""Parses the body of a call of OpenAI's images API into requests for images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.errors import UsageError
from ...schemas.manifest import Manifest
from ...schemas.messages import shown
from ...schemas.request import INFORMATION, Request
from ...schemas.settings import DECODER_SAMPLING, PRIOR_SAMPLING
from ..batch.picture_hashes import PICTURE_FIELDS
from ..batch.prompt_requests import counted_requests
from ..images.pictures import decode, has_alpha, open_picture
from .image_queue import require_served

MOST_IMAGES, MOST_PARTIALS = 10, 3  # of a call, as at OpenAI

FORMATS: Mapping[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
QUALITIES: Mapping[str, float] = {"low": 0.5, "standard": 1, "medium": 1, "auto": 1, "hd": 2, "high": 2}  # times steps
IGNORED = frozenset({"model", "user", "safety_identifier", "moderation", "style", "input_fidelity"}) | INFORMATION
ONLY: Mapping[str, Sequence[Any]] = {"background": ("auto", "opaque"), "output_compression": (100, "100")}
# Fields of a request that a caller cannot give: the first name files of the server.
REFUSED = frozenset({*PICTURE_FIELDS, "loras", "index", "batch", "width", "height"})
OPAQUE = 128  # alpha from which on a mask keeps the picture
YES, NO = (True, "true", "True", "1"), (False, None, "", "false", "False", "0")


@dataclass(frozen=True)
class ImageCall:
    """The requests of a caller, and the form of the answer. A streamed answer has `partials` previews of each image."""

    requests: tuple[Request, ...]
    format: str = "png"
    quality: str = "auto"
    as_url: bool = False
    streamed: bool = False
    partials: int = 0

    @property
    def suffix(self) -> str:
        return FORMATS[self.format]

    @property
    def size(self) -> str:
        settings = self.requests[0].settings
        return f"{settings.width}x{settings.height}"

    @property
    def described(self) -> dict[str, str]:
        """The fields of an answer that hold for all of its images."""
        return {"size": self.size, "quality": self.quality, "background": "opaque", "output_format": self.format}


def parse_image_call(
    given: Mapping[str, Any], manifest: Manifest, pictures: Mapping[str, Any] | None = None
) -> ImageCall:
    """Parse the fields of a JSON body or a form. Fields that OpenAI does not have are those of a request: seed,
    negative, prior_steps, and so on. The seeds of several images count on from `seed`.

    `pictures` are fields of a request that name uploaded files. Raises UsageError for what cannot be generated."""
    fields = {name: value for name, value in given.items() if name not in IGNORED and value is not None}
    for name, allowed in ONLY.items():
        _choice(fields, name, allowed)
    if wrong := sorted(REFUSED & fields.keys()):
        raise UsageError(f"{wrong[0]}: cannot be given here; give size, n, or a picture to /v1/images/edits")
    count = _number(fields, "n", (1, MOST_IMAGES))
    streamed = _choice(fields, "stream", (*NO, *YES)) in YES
    partials = _number(fields, "partial_images", (0, MOST_PARTIALS))
    as_url = _choice(fields, "response_format", ("b64_json", "url")) == "url"
    format = _choice(fields, "output_format", tuple(FORMATS))
    quality = _choice(fields, "quality", ("auto", *QUALITIES))
    for name, usual in (("prior_steps", PRIOR_SAMPLING.steps), ("decoder_steps", DECODER_SAMPLING.steps)):
        fields.setdefault(name, max(1, round(usual * QUALITIES[quality])))
    fields |= _size(fields.pop("size", "auto"))
    requests = counted_requests({**fields, **(pictures or {})}, count, manifest)
    require_served(requests[0])
    return ImageCall(
        requests,
        format=format,
        quality=quality,
        as_url=as_url and not streamed,
        streamed=streamed,
        partials=partials if streamed else 0,
    )


def edited_pictures(images: Sequence[Path], mask: Path | None) -> dict[str, Any]:
    """The fields of a request for uploaded pictures: the first is varied, others are image prompts.

    A mask with alpha is transparent where the image is generated anew, as at OpenAI; one without is white there.
    Raises UsageError for a file that is no picture."""
    for path in (*images, *([mask] if mask else [])):
        try:
            open_picture(path)
        except UsageError as error:
            raise UsageError(str(error).replace(str(path), path.stem)) from error
    if not images:
        raise UsageError("image: expected a picture as a file of the form")
    found: dict[str, Any] = {"init_image": str(images[0]), "image_prompts": [str(path) for path in images[1:]]}
    return found if mask is None else {**found, "mask": str(_as_white(mask))}


def _as_white(mask: Path) -> Path:
    """The path of a mask that is white where `mask` is transparent."""
    picture = decode(mask)
    if not has_alpha(picture):
        return mask
    alpha = picture.convert("RGBA").getchannel("A")
    white = mask.with_name("white.png")
    alpha.point([255 if value < OPAQUE else 0 for value in range(256)]).save(white)
    return white


def _number(fields: dict[str, Any], name: str, between: tuple[int, int]) -> int:
    """Take a whole number out of `fields`; the least one without it."""
    given = fields.pop(name, between[0])
    text = str(given)
    if isinstance(given, bool) or not text.isdecimal() or len(text) > 3 or not between[0] <= int(text) <= between[1]:
        raise UsageError(f"{name}: {shown(given)}: expected {between[0]} to {between[1]}")
    return int(text)


def _choice(fields: dict[str, Any], name: str, allowed: Sequence[Any]) -> Any:
    """Take one of the `allowed` values out of `fields`; the first one without it."""
    given = fields.pop(name, allowed[0])
    if given not in allowed:
        words = dict.fromkeys(str(each).lower() for each in allowed if each not in (None, ""))
        raise UsageError(f"{name}: {shown(given)}: expected {' or '.join(words)}")
    return given


def _size(given: Any) -> dict[str, int]:
    if given == "auto":
        return {}
    sides = str(given).lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 6 for side in sides):
        raise UsageError(f"size: {shown(given)}: expected WIDTHxHEIGHT, such as 1024x768, or auto")
    return {"width": int(sides[0]), "height": int(sides[1])}

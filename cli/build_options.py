"""The options of `build` for image sizes and profiles."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from .options import parsed

if TYPE_CHECKING:  # they import pydantic, which `build --help` does without
    from ..schemas.plan_entries import ImageSize
    from ..schemas.profiles import Bounds

# The sizes of `schemas.profiles.DEFAULT`.
DEFAULT_SIZES: Mapping[str, str] = {"min": "512x512x1", "opt": "1024x1024x1", "max": "1536x1536x2"}


def parse_image_size(text: str) -> "ImageSize":
    from ..schemas import profiles

    return profiles.parse_image_size(text)


def parse_profile(text: str) -> "Bounds":
    """The sizes in MIN:OPT:MAX. Raises UsageError for any other text."""
    from ..schemas.profiles import Bounds

    sizes = text.split(":")
    if len(sizes) != 3:
        raise UsageError(f"{text!r}: expected MIN:OPT:MAX, such as 512x512:1024x1024:1536x1536x2")
    return Bounds(*map(parse_image_size, sizes))


def chosen_profiles(
    least: "ImageSize | None",
    likeliest: "ImageSize | None",
    largest: "ImageSize | None",
    *,
    statics: "Sequence[ImageSize]",
    profiles: "Sequence[Bounds]",
) -> "tuple[Bounds, ...]":
    """The profile of --min, --opt and --max, where one is given or there is no other, then the others."""
    from ..schemas.profiles import DEFAULT, Bounds

    others = (*(Bounds(size, size, size) for size in statics), *profiles)
    if others and not (least or likeliest or largest):
        return others
    return (Bounds(least or DEFAULT.min, likeliest or DEFAULT.opt, largest or DEFAULT.max), *others)


def size_option(name: str, text: str) -> Callable[..., Any]:
    return click.option(
        f"--{name}",
        f"{name}_size",
        metavar="WxH[xB]",
        callback=parsed(parse_image_size),
        help=f"{text}  [default: {DEFAULT_SIZES[name]}]",
    )

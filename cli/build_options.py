"""The option types of `build`: GPUs, image sizes and profiles."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import CascadeError, UsageError
from ..schemas.targets import parse_targets

if TYPE_CHECKING:  # they import pydantic, which `build --help` does without
    from ..schemas.plan_entries import ImageSize
    from ..schemas.profiles import Bounds

# The sizes of `schemas.profiles.DEFAULT`.
DEFAULT_SIZES: Mapping[str, str] = {"min": "512x512x1", "opt": "1024x1024x1", "max": "1536x1536x2"}


def parse_sizes(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """One size, or a tuple of sizes for an option that may be repeated."""
    from ..schemas.profiles import parse_image_size

    try:
        return tuple(map(parse_image_size, value)) if isinstance(value, tuple) else value and parse_image_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def parse_arch(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return parse_targets(values)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def parse_profiles(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> "tuple[Bounds, ...]":
    from ..schemas.profiles import Bounds, parse_image_size

    found = []
    for value in values:
        sizes = value.split(":")
        if len(sizes) != 3:
            raise click.BadParameter(f"{value!r}: expected MIN:OPT:MAX, such as 512x512:1024x1024:1536x1536x2")
        try:
            found.append(Bounds(*map(parse_image_size, sizes)))
        except CascadeError as error:
            raise click.BadParameter(str(error)) from None
    return tuple(found)


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
        callback=parse_sizes,
        help=f"{text}  [default: {DEFAULT_SIZES[name]}]",
    )

"""The pictures and settings of `Cascade.generate`, checked and opened before any stage is loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from ..schemas.errors import UsageError
from ..schemas.limits import MAX_PIXELS_TOGETHER
from ..schemas.messages import shown
from ..schemas.settings import Settings
from ..schemas.sizes import latent_sizes
from .images.masks import as_mask, fit_mask
from .images.pictures import Picture, as_picture, fit
from .sampling.controlnets import INPAINTING, ControlPicture
from .sampling.samplers import check_schedules


@dataclass(frozen=True)
class OpenedPictures:
    """The pictures of one call as PIL images: RGB, masks in mode L."""

    init: Image.Image | None
    mask: Image.Image | None  # of the size of the picture that it belongs to
    controls: list[ControlPicture]
    kept: tuple[Image.Image, Image.Image] | None  # the initial picture and its mask, both at the size of the image


def check_settings(settings: Settings, *, varies: bool) -> None:
    """Raise UsageError for a size or schedule that a stage would refuse; `varies` says that there is an init image."""
    latent_sizes(settings.height, settings.width, settings.size_policy)
    check_schedules(settings, varies=varies)


def require_room(images: int, settings: Settings) -> None:
    """Raise UsageError for more `images` than one call may keep in memory."""
    if images > (most := most_images(settings)):
        size = f"{settings.width}x{settings.height}"
        raise UsageError(f"{images} images of {size} at once: expected at most {most}; use several calls")


def most_images(settings: Settings) -> int:
    """The most images that one call may keep in memory."""
    return max(1, MAX_PIXELS_TOGETHER // (settings.width * settings.height))


def _checked(controls: ControlPicture | Sequence[ControlPicture]) -> Sequence[ControlPicture]:
    """Raise UsageError for controls of another type; one alone becomes a list."""
    several = [*controls] if isinstance(controls, Iterable) and not isinstance(controls, str) else [controls]
    for control in several:
        if not isinstance(control, ControlPicture):
            raise UsageError(f'controls: expected ControlPicture("canny", picture), found {shown(control)}')
    return several


def open_pictures(
    settings: Settings,
    *,
    init_image: Picture | None,
    mask: Picture | None,
    controls: Sequence[ControlPicture],
) -> OpenedPictures:
    """Open the pictures that `generate` is given. Raises UsageError for one that cannot be read."""
    init = None if init_image is None else as_picture(init_image)
    opened = [replace(control, picture=as_picture(control.picture)) for control in _checked(controls)]
    if mask is None:
        return OpenedPictures(init, None, opened, None)
    masked = [*([] if init is None else [init]), *(each.picture for each in opened if each.name == INPAINTING)]
    if not masked:
        raise UsageError("the mask needs a picture; give init_image=..., or the control inpainting with its picture")
    found = as_mask(mask, as_picture(masked[0]).size)
    if init is None:
        return OpenedPictures(None, found, opened, None)
    height, width = latent_sizes(settings.height, settings.width, settings.size_policy).image
    return OpenedPictures(init, found, opened, (fit(init, width, height), fit_mask(found, width, height)))

"""ControlNets: the control images they take, and the residuals they add to the prior.

A control picture is resized to 32 times the size of the prior's latents, as in Stability's training: 768x768 for the
24x24 latents of a 1024x1024 image. An EfficientNet then has one pixel of its map for each latent. The residuals
may have any size, as the prior resizes them to its latents.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...schemas.control import is_control
from ...schemas.errors import MissingPackageError, UsageError, reraise_interrupt
from ...schemas.manifest import Manifest
from ...schemas.stages import Stage
from ...storage.install_hint import install_hint
from ..engines.protocol import F32
from ..images.masks import fit_mask, mask_pixels
from ..images.pictures import EFFNET_COMPRESSION, Picture, effnet_pixels, fitted_pixels
from ..images.resample import bilinear

Size = tuple[int, int]  # (height, width)

CANNY_SIDE = 224  # Canny's filter runs on the picture squeezed to this square
CANNY_THRESHOLDS = (100, 200)
INPAINTING = "inpainting"  # the control that takes a mask as well
EXPORT_COMMAND = "cascadekit export MODEL -o BUNDLE --controlnet"
HALVES = 2  # super-resolution takes the latents of the picture at half its size


@dataclass(frozen=True)
class ControlPicture:
    """A ControlNet by its name in CONTROLS, the picture it follows, and the factor of its residuals.

    Examples:
        >>> cascade.generate("a castle", controls=[ControlPicture("canny", "photo.png", 0.8)])
    """

    name: str
    picture: Picture
    strength: float = 1.0


@dataclass(frozen=True)
class FilterInputs:
    """The inputs of a filter: an RGB picture, its mask or None, and the effnet encoder.

    `encode` takes `pixels` (B, 3, 32h, 32w) to (B, 16, h, w) float32."""

    picture: Image.Image
    prior_size: Size  # of the prior's latents
    mask: Image.Image | None
    encode: Callable[[F32], F32]

    @property
    def size(self) -> Size:
        """The size of the control image, in pixels."""
        height, width = self.prior_size
        return EFFNET_COMPRESSION * height, EFFNET_COMPRESSION * width


Filter = Callable[[FilterInputs], F32]


@dataclass(frozen=True)
class Control:
    """A ControlNet's stage, the filter that makes its control image, and the other stages that the filter runs.

    A filter returns a batch of one, float32. It raises UsageError without a mask that it needs, and MissingPackageError
    without OpenCV."""

    stage: Stage
    filter: Filter
    also: tuple[Stage, ...] = ()


def canny(given: FilterInputs) -> F32:
    """Canny's edges of the picture: (1, 1, H, W) float32 in 0..1.

    The picture is squeezed to 224x224 and the edges are stretched back, both bilinear without antialiasing, as torch's
    `interpolate` does in Stability's filter. Pillow's filters antialias."""
    squeezed = bilinear(_pixels(given), (CANNY_SIDE, CANNY_SIDE))
    bytes_ = (squeezed[0] * np.float32(255)).astype(np.uint8)  # cut off, as in Stability's filter
    found = _opencv().Canny(np.ascontiguousarray(bytes_.transpose(1, 2, 0)), *CANNY_THRESHOLDS)
    return bilinear(np.asarray(found, np.float32)[None, None] / np.float32(255), given.size)


def edges(given: FilterInputs) -> F32:
    """A picture that shows edges already, white on black: (1, 1, H, W) float32 in 0..1."""
    return fitted_pixels(given.picture.convert("L"), *given.size)


def inpainting(given: FilterInputs) -> F32:
    """The picture, white where it is masked, and the mask: (1, 4, H, W) float32 in 0..1."""
    if given.mask is None:
        raise UsageError("the inpainting ControlNet needs a mask of the part to be generated anew; give mask=...")
    height, width = given.size
    mask = mask_pixels(fit_mask(given.mask, width, height))
    return np.concatenate([np.where(mask > 0, np.float32(1), _pixels(given)), mask], axis=1)


def super_resolution(given: FilterInputs) -> F32:
    """Effnet latents of every second pixel, each repeated twice across and down: (1, 16, h, w) float32."""
    half = effnet_pixels(np.ascontiguousarray(_pixels(given)[..., ::HALVES, ::HALVES]))
    return given.encode(half).repeat(HALVES, axis=-2).repeat(HALVES, axis=-1)


# The names that users write. The fourth ControlNet, identity, is left out: its embeddings of faces need networks that
# are not part of Stable Cascade.
CONTROLS: Mapping[str, Control] = {
    "canny": Control(Stage.CONTROLNET_CANNY, canny),
    "edges": Control(Stage.CONTROLNET_CANNY, edges),
    INPAINTING: Control(Stage.CONTROLNET_INPAINTING, inpainting),
    "super_resolution": Control(Stage.CONTROLNET_SUPER_RESOLUTION, super_resolution, also=(Stage.EFFNET_ENCODER,)),
}


def require_control(manifest: Manifest, name: str) -> tuple[Stage, ...]:
    """The stages that the control `name` runs, its ControlNet first.

    Raises UsageError when the bundle lacks a stage, and when its prior takes no residuals or those of another
    ControlNet."""
    if name not in CONTROLS:
        raise UsageError(f"control {name!r}: expected one of {', '.join(CONTROLS)}")
    control = CONTROLS[name]
    needed = (control.stage, *control.also)
    missing = [stage for stage in needed if stage not in manifest.stages]
    if missing:
        raise UsageError(f"control {name}: the bundle has no {', '.join(missing)}; export the model with it")
    prior = manifest.stages.get(Stage.PRIOR)
    taken = {port.name: port.dims[1] for port in prior.inputs if is_control(port.name)} if prior else {}
    if not taken:
        raise UsageError(f"control {name}: the bundle's prior takes no residuals; export it again: {EXPORT_COMMAND}")
    given = {port.name: port.dims[1] for port in manifest.stages[control.stage].outputs}
    wrong = [f"{port} of {channels}" for port, channels in given.items() if taken.get(port) != channels]
    if wrong:
        raise UsageError(
            f"control {name}: the {control.stage} makes {', '.join(wrong)} channels, which the prior does not take; "
            f"ControlNets need the full prior, exported with `{EXPORT_COMMAND}`"
        )
    return needed


def summed(residuals: Iterable[Mapping[str, F32]], prior_size: Size) -> dict[str, F32]:
    """The sum of several ControlNets' residuals, by port.

    Residuals of another size than the prior's latents are resized as the prior itself resizes them, bilinear with
    aligned corners. The sum for a single ControlNet therefore changes nothing."""
    total: dict[str, F32] = {}
    for each in residuals:
        for port, residual in each.items():
            resized = bilinear(residual, prior_size, align_corners=True)
            total[port] = total[port] + resized if port in total else resized
    return total


def _pixels(given: FilterInputs) -> F32:
    return fitted_pixels(given.picture, *given.size)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(
            f"control canny: OpenCV finds the edges, and is not installed: {install_hint('control')}, "
            "or give a picture of edges as the control edges=PICTURE"
        ) from error
    return cv2

"""What ControlNets look at, and what they add to the prior.

A control picture is brought to 32 times the size of the prior's latents: 768x768 for the 24x24 of a 1024 image, as
Stability trained and ran them. An EfficientNet then sees one pixel of its own for each latent; what leaves a
ControlNet may have any size all the same, as the prior resizes it to its latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...schemas.bundle import Manifest
from ...schemas.control import is_control
from ...schemas.errors import UsageError, reraise_interrupt
from ...schemas.stages import Stage
from ..engines.base import Tensors
from ..images.masks import fit_mask, mask_pixels
from ..images.pictures import EFFNET_COMPRESSION, F32, fit, to_pixels
from ..images.png import effnet_pixels
from ..images.resample import bilinear

Run = Callable[[Tensors], Mapping[str, Any]]
Size = tuple[int, int]  # (height, width)

CANNY_SIDE = 224  # edges are looked for in the picture squeezed to this square
CANNY_THRESHOLDS = (100, 200)
INPAINTING = "inpainting"  # the control that sees a mask, too
HALVES = 2  # super-resolution sees the latents of the picture at half its size


@dataclass(frozen=True)
class ControlPicture:
    """A ControlNet chosen by a name of CONTROLS, the RGB picture it looks at, and how strongly it counts."""

    name: str
    picture: Image.Image
    strength: float = 1.0


@dataclass(frozen=True)
class View:
    """What a filter may look at: `picture` RGB, `mask` of the same size where there is one, and the effnet encoder,
    `pixels` (B, 3, 32h, 32w) to (B, 16, h, w), where that is loaded."""

    picture: Image.Image
    size: Size  # of the control image, in pixels
    mask: Image.Image | None
    encode: Callable[[F32], F32] | None


Filter = Callable[[View], F32]


@dataclass(frozen=True)
class Kind:
    """A ControlNet's stage, what makes its control image, and which other stage that takes."""

    stage: Stage
    filter: Filter
    also: tuple[Stage, ...] = ()


def canny(view: View) -> F32:
    """(1, 1, H, W) float32 in 0..1: Canny's edges of the picture squeezed to 224x224, stretched back. Both ways
    bilinear without antialiasing, as torch's `interpolate` in Stability's filter; not Pillow's, which antialiases."""
    squeezed = bilinear(_pixels(view), (CANNY_SIDE, CANNY_SIDE))
    bytes_ = (squeezed[0] * np.float32(255)).astype(np.uint8)  # cut off, as there
    found = _opencv().Canny(np.ascontiguousarray(bytes_.transpose(1, 2, 0)), *CANNY_THRESHOLDS)
    return bilinear(np.asarray(found, np.float32)[None, None] / np.float32(255), view.size)


def edges(view: View) -> F32:
    """(1, 1, H, W) float32 in 0..1: a picture of edges, white on black, as it is."""
    height, width = view.size
    return to_pixels(fit(view.picture.convert("L"), width, height))


def inpainting(view: View) -> F32:
    """(1, 4, H, W) float32 in 0..1: the picture, white where masked, and the mask."""
    if view.mask is None:
        raise UsageError("the inpainting ControlNet needs a mask of what is to be drawn anew; give one")
    height, width = view.size
    mask = mask_pixels(fit_mask(view.mask, width, height))
    return np.concatenate([np.where(mask > 0, np.float32(1), _pixels(view)), mask], axis=1)


def super_resolution(view: View) -> F32:
    """(1, 16, h, w) float32: effnet latents of the picture at half the size, every second pixel of it, each latent
    four times."""
    if view.encode is None:
        raise UsageError("the super_resolution ControlNet looks at effnet latents; export the effnet_encoder too")
    half = effnet_pixels(np.ascontiguousarray(_pixels(view)[..., ::HALVES, ::HALVES]))
    return view.encode(half).repeat(HALVES, axis=-2).repeat(HALVES, axis=-1)


# By the name a user chooses it by. The fourth ControlNet, identity, looks at embeddings of faces, which take networks
# that are not part of Stable Cascade.
CONTROLS: Mapping[str, Kind] = {
    "canny": Kind(Stage.CONTROLNET_CANNY, canny),
    "edges": Kind(Stage.CONTROLNET_CANNY, edges),
    INPAINTING: Kind(Stage.CONTROLNET_INPAINTING, inpainting),
    "super_resolution": Kind(Stage.CONTROLNET_SUPER_RESOLUTION, super_resolution, also=(Stage.EFFNET_ENCODER,)),
}


def require_control(manifest: Manifest, name: str) -> tuple[Stage, ...]:
    """The stages that the control `name` runs, its ControlNet first.

    Raises UsageError when the bundle lacks one, or its prior takes no residuals or not those of this ControlNet."""
    if name not in CONTROLS:
        raise UsageError(f"control {name!r}: expected one of {', '.join(CONTROLS)}")
    kind = CONTROLS[name]
    needed = (kind.stage, *kind.also)
    missing = [stage for stage in needed if stage not in manifest.stages]
    if missing:
        raise UsageError(f"control {name}: the bundle has no {', '.join(missing)}; export the model with it")
    prior = manifest.stages.get(Stage.PRIOR)
    taken = {port.name: port.dims[1] for port in prior.inputs if is_control(port.name)} if prior else {}
    if not taken:
        raise UsageError(f"control {name}: the bundle's prior takes no residuals; export the prior with --controlnet")
    given = {port.name: port.dims[1] for port in manifest.stages[kind.stage].outputs}
    wrong = [f"{port} of {channels}" for port, channels in given.items() if taken.get(port) != channels]
    if wrong:
        raise UsageError(
            f"control {name}: the {kind.stage} makes {', '.join(wrong)} channels, which the prior does not take; "
            "ControlNets are for the full prior exported with --controlnet"
        )
    return needed


def control_image(
    name: str,
    picture: Image.Image,
    prior_size: Size,
    *,
    mask: Image.Image | None = None,
    encode: Callable[[F32], F32] | None = None,
) -> F32:
    """The `control_image` port of the ControlNet that `name` chooses, a batch of one, float32.

    `picture` is RGB, `prior_size` the (h, w) of the prior's latents. "inpainting" needs `mask`, of the picture's size,
    "super_resolution" `encode`, the effnet encoder. Raises UsageError without, and for "canny" without OpenCV."""
    height, width = (EFFNET_COMPRESSION * side for side in prior_size)
    return CONTROLS[name].filter(View(picture, (height, width), mask, encode))


def control_residuals(
    manifest: Manifest, name: str, image: F32, run: Run, *, strength: float = 1.0, batch: int = 1
) -> dict[str, F32]:
    """`control.N` (batch, c, h, w) float32 by port of the prior, out of `run`, the ControlNet's stage, for one control
    image. They go to both halves of guidance alike. Raises UsageError as `require_control` does."""
    require_control(manifest, name)
    outputs = run({"control_image": image})
    return {port: np.repeat(residual * np.float32(strength), batch, axis=0) for port, residual in outputs.items()}


def together(residuals: Sequence[Mapping[str, F32]], prior_size: Size) -> dict[str, F32]:
    """The sum of several ControlNets' residuals. Those of other sizes than the prior's latents are brought to that as
    the prior itself would, bilinear with aligned corners; so a sum of one changes nothing."""
    total: dict[str, F32] = {}
    for each in residuals:
        for port, residual in each.items():
            resized = bilinear(residual, prior_size, align_corners=True)
            total[port] = total[port] + resized if port in total else resized
    return total


def _pixels(view: View) -> F32:
    height, width = view.size
    return to_pixels(fit(view.picture, width, height))


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        reraise_interrupt(error)
        raise UsageError(
            "control canny: OpenCV finds the edges, and is not installed: pip install 'cascadekit[control]', "
            "or give a picture of edges with edges=PICTURE"
        ) from error
    return cv2

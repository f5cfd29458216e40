"""ControlNets in a whole prior: filters by OpenCV and torch, the networks in torch, and their residuals put into
diffusers' prior by hand, as Stability's code does it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_stable_cascade import SDCascadeResBlock
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from cascadekit import Cascade
from cascadekit.runtime.sampling.controlnets import ControlPicture
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.stages import PROJ_BLOCKS_ENDS, Stage
from helpers.whole import Whole, counted, picture

F32 = NDArray[np.float32]

TOLERANCE = 1e-4  # greatest |difference| over greatest |latent|; the EfficientNets' own is about 1e-6
SIZE = {"height": 200, "width": 152}  # 5x4 latents of the prior
ROWS, COLUMNS = 5, 4


@cache
def opened(whole: Whole) -> Cascade:
    return Cascade.open(whole.bundle, threads=1)


def cut(image: Image.Image) -> Image.Image:
    """The middle of the picture, 32 pixels for each latent."""
    width, height = 32 * COLUMNS, 32 * ROWS
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, image.width - left, image.height - top)
    )


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


def canny(image: Image.Image) -> torch.Tensor:
    """CannyFilter of Stability's code."""
    pixels = pixels_of(cut(image))
    small = F.interpolate(pixels, size=(224, 224), mode="bilinear")
    edges = cv2.Canny((small[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8), 100, 200)
    found = torch.from_numpy(edges)[None, None].float() / 255
    return F.interpolate(found, size=pixels.shape[-2:], mode="bilinear")


def inpainting(image: Image.Image) -> torch.Tensor:
    """InpaintFilter, for a mask on whole cells of the picture that is cut out."""
    pixels = pixels_of(cut(image))
    mask = torch.zeros(1, 1, *pixels.shape[-2:])
    mask[..., 32:96, 64:128] = 1
    return torch.cat([torch.where(mask > 0, torch.ones_like(pixels), pixels), mask], dim=1)


@contextmanager
def injected(prior: Any, residuals: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """One residual before each of these residual blocks, counted as they run, resized to what the block gets."""
    blocks = [block for level in (*prior.down_blocks, *prior.up_blocks) for block in level]
    numbered = [block for block in blocks if isinstance(block, SDCascadeResBlock)]
    assert len(numbered) == 64
    hooks = []
    for number, residual in residuals.items():

        def add(module: Any, arguments: tuple[Any, ...], residual: torch.Tensor = residual) -> Any:
            x, *rest = arguments
            return (x + F.interpolate(residual, x.shape[-2:], mode="bilinear", align_corners=True), *rest)

        hooks.append(numbered[number].register_forward_pre_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def of_network(whole: Whole, stage: Stage, image: torch.Tensor) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        found = whole.reference(stage)(control_image=image)
    assert list(found) == [f"control.{number}" for number in PROJ_BLOCKS_ENDS]
    return {number: found[f"control.{number}"] for number in PROJ_BLOCKS_ENDS}


def their_latents(whole: Whole, residuals: Mapping[int, torch.Tensor], guidance: float) -> list[F32]:
    prior, _ = whole.pipelines()
    tape: list[F32] = []

    def record(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tape.append(tensors["latents"].numpy().copy())
        return tensors

    with injected(prior.prior, residuals):
        prior(
            ["a", "b"],
            negative_prompt=["n", "n"],
            generator=torch.Generator().manual_seed(1),
            num_inference_steps=2,
            guidance_scale=guidance,
            callback_on_step_end=record,
            **SIZE,
        )
    return tape


def our_latents(cascade: Cascade, controls: list[ControlPicture], guidance: float = 4.0, **more: Any) -> list[F32]:
    tape: list[F32] = []
    cascade.generate(
        ["a", "b"],
        negative="n",
        seed=1,
        prior_steps=2,
        prior_guidance=guidance,
        controls=controls,
        output="prior",
        on_step=lambda stage, step: tape.append(step.latents),
        **SIZE,
        **more,
    )
    return tape


def compare(found: list[F32], expected: list[F32], tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(expected) == 2
    for mine, their in zip(found, expected, strict=True):
        assert mine.shape == their.shape == (2, 16, ROWS, COLUMNS)
        assert np.abs(mine - their).max() <= tolerance * np.abs(their).max()


IMAGE = picture(32 * COLUMNS * 2, 32 * ROWS * 2, 4)  # twice as large as it is looked at


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_canny(whole: Whole, guidance: float) -> None:
    residuals = of_network(whole, Stage.CONTROLNET_CANNY, canny(IMAGE))
    weaker = {number: residual * 0.6 for number, residual in residuals.items()}
    found = our_latents(opened(whole), [ControlPicture("canny", IMAGE, 0.6)], guidance)
    compare(found, their_latents(whole, weaker, guidance))
    for other in ({}, residuals):  # neither without, nor at full strength
        with pytest.raises(AssertionError):
            compare(found, their_latents(whole, other, guidance), 1e-2)


def test_two_at_once_and_a_mask(whole: Whole) -> None:
    mask = Image.new("L", IMAGE.size)
    mask.paste(255, (2 * 64, 2 * 32, 2 * 128, 2 * 96))
    each = [
        of_network(whole, Stage.CONTROLNET_CANNY, canny(IMAGE)),
        of_network(whole, Stage.CONTROLNET_INPAINTING, inpainting(IMAGE)),
    ]
    total = {number: each[0][number] * 0.5 + each[1][number] * 1.25 for number in PROJ_BLOCKS_ENDS}
    controls = [ControlPicture("canny", IMAGE, 0.5), ControlPicture("inpainting", IMAGE, 1.25)]
    cascade = opened(whole)
    found = cascade.residuals(controls, height=200, width=152, mask=mask)
    embeds = cascade.encode_prompt(["a", "b"], "n")
    steps = cascade.prior(embeds, **SIZE, seed=1, steps=2, control=found)
    compare([step.latents for step in steps], their_latents(whole, total, 4.0))


def test_super_resolution(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released network would be 800 MB; one of the same ports stands in for it."""
    weights = torch.randn(8, 64, 16, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.25

    def network(image: torch.Tensor) -> dict[int, torch.Tensor]:
        return {n: F.conv2d(image, w) for n, w in zip(PROJ_BLOCKS_ENDS, weights, strict=True)}

    def run(inputs: Mapping[str, F32]) -> dict[str, F32]:
        found = network(torch.from_numpy(inputs["control_image"]))
        return {f"control.{number}": residual.numpy() for number, residual in found.items()}

    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    half = F.interpolate(pixels_of(cut(IMAGE)), scale_factor=0.5, mode="nearest")
    with torch.no_grad():
        latents = whole.reference(Stage.EFFNET_ENCODER)(pixels=(half - mean) / std)["effnet"]
    expected = their_latents(whole, network(F.interpolate(latents, scale_factor=2, mode="nearest")), 4.0)
    stand_in = {Stage.CONTROLNET_SUPER_RESOLUTION: run}
    with counted(monkeypatch, stand_in), Cascade.open(whole.bundle, threads=1) as cascade:
        compare(our_latents(cascade, [ControlPicture("super_resolution", IMAGE)]), expected)


def test_no_strength_changes_nothing(whole: Whole) -> None:
    plain, nothing = (our_latents(opened(whole), controls) for controls in ([], [ControlPicture("canny", IMAGE, 0.0)]))
    compare(nothing, plain, 1e-7)


def test_beside_a_picture_that_is_varied(whole: Whole) -> None:
    """Controls go with all else: image prompts, an initial picture, gdf, batches in parts."""
    call: dict[str, Any] = {
        "controls": [ControlPicture("canny", IMAGE)],
        "image_prompts": [IMAGE],
        "init_image": IMAGE,
        "sampler": "gdf",
        "strength": 1.0,
    }
    together = our_latents(opened(whole), **call)
    with Cascade.open(whole.bundle, threads=1, rows=1, memory="staged") as cascade:
        compare(our_latents(cascade, **call), together, 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"controls": [ControlPicture("depth", IMAGE)]}, "control 'depth': expected one of"),
        ({"controls": [ControlPicture("inpainting", IMAGE)]}, "needs a mask"),
    ],
)
def test_controls_that_cannot_be(whole: Whole, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        our_latents(opened(whole), **call)


def test_a_prior_that_takes_none(whole: Whole) -> None:
    cascade = Cascade.open(whole.bundle, stages={Stage.PRIOR: whole.lite})
    with cascade, pytest.raises(UsageError, match="export it again: cascadekit export MODEL -o BUNDLE --controlnet"):
        our_latents(cascade, [ControlPicture("canny", IMAGE)])

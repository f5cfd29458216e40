"""Sampling that starts from pictures, and pictures out of its middle: against the torch networks, Pillow, and formulas
written by hand in torch."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from numpy.typing import NDArray
from PIL import Image

from cascadekit import Cascade
from cascadekit.runtime.sampling.loop import Start, Step
from cascadekit.runtime.sampling.samplers import make_schedule
from cascadekit.runtime.text.prompts import PromptEmbeds
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.settings import Sampling
from cascadekit.schemas.stages import Stage
from helpers.stability import ddpm, diffuse
from helpers.whole import Whole, picture

F32 = NDArray[np.float32]

TOLERANCE = 2e-5  # greatest |difference| over greatest |value|
SCALE = 0.3764  # of the vqgan's latents
SHARP = 16  # pixels from the mask where the original begins to the last bit


@cache
def opened(whole: Whole) -> Cascade:
    """With the lite prior, which is quicker."""
    return Cascade.open(whole.bundle, threads=1, stages={Stage.PRIOR: whole.lite})


def close(found: F32, expected: Any, tolerance: float = TOLERANCE) -> bool:
    wanted = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert found.shape == wanted.shape
    return bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())


def cut(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture in the proportions asked for, at that size."""
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


def alpha_bar(t: torch.Tensor) -> torch.Tensor:
    """The schedule of DDPMWuerstchenScheduler."""
    s = torch.tensor([0.008])
    bar = torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2 / torch.cos(s / (1 + s) * math.pi * 0.5) ** 2
    return bar.clamp(0.0001, 0.9999)


def noised(x_0: torch.Tensor, noise: torch.Tensor, t: float) -> torch.Tensor:
    bar = alpha_bar(torch.tensor(t))
    return bar.sqrt() * x_0 + (1 - bar).sqrt() * noise


@pytest.mark.parametrize(("width", "height"), [(256, 256), (200, 328), (640, 128)])
def test_pictures_are_encoded_as_by_the_network(whole: Whole, width: int, height: int) -> None:
    image = picture(150, 210, 5)
    rows, columns = (math.ceil(side / 42.67) for side in (height, width))
    seen = pixels_of(cut(image, 32 * columns, 32 * rows))
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = whole.reference(Stage.EFFNET_ENCODER)(pixels=(seen - mean) / std)["effnet"]
    assert expected.shape == (1, 16, rows, columns)
    assert close(opened(whole).encode_picture(image, height=height, width=width), expected)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (72, 200)])
def test_details_are_those_of_the_vqgan(whole: Whole, width: int, height: int) -> None:
    image = picture(150, 210, 6)
    with torch.no_grad():
        expected = whole.vqgans[False].encode(pixels_of(cut(image, width, height))).latents / SCALE
    assert close(opened(whole).encode_details(image, height=height, width=width), expected)


@dataclass
class Conditions:
    embeds: PromptEmbeds
    clip_text: torch.Tensor
    pooled: torch.Tensor

    @classmethod
    def of(cls, whole: Whole, prompts: list[str]) -> "Conditions":
        embeds = opened(whole).encode_prompt(prompts)
        return cls(embeds, torch.from_numpy(embeds.clip_text), torch.from_numpy(embeds.pooled))


def their_prior(whole: Whole, conditions: Conditions, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = whole.unets[Stage.PRIOR, True](
            sample=x,
            timestep_ratio=t.expand(len(x)),
            clip_text=conditions.clip_text,
            clip_text_pooled=conditions.pooled,
            clip_img=torch.zeros(len(x), 1, 768),
            return_dict=False,
        )[0]
    return found


@pytest.mark.parametrize(("strength", "made"), [(0.6, 6), (0.25, 2), (0.05, 1), (1.0, 10)])
def test_varying_a_picture(whole: Whole, strength: float, made: int) -> None:
    """From the diffused picture on as diffusers' scheduler would, that share of the steps."""
    conditions = Conditions.of(whole, ["a", "b"])
    x_0 = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 16, 3, 5)).astype(np.float32))
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 16, 3, 5, generator=generator)
    scheduler = DDPMWuerstchenScheduler()
    scheduler.timesteps = torch.linspace(strength, 0, made + 1)
    x = noised(x_0.expand(2, -1, -1, -1), noise, strength)
    expected = []
    for t in scheduler.timesteps[:-1]:
        eps = their_prior(whole, conditions, x, t)
        x = scheduler.step(eps, t.expand(2), x, generator).prev_sample
        expected.append(x)
    start = Start(x_0.numpy(), strength)
    steps = opened(whole).prior(conditions.embeds, height=128, width=200, seed=2, start=start, steps=10, guidance=1.0)
    found = list(steps)
    assert len(found) == made == found[0].steps
    for step, latents in zip(found, expected, strict=True):
        assert close(step.latents, latents), step.index


@pytest.mark.parametrize("shift", [2.0, 0.5, 1.0])
def test_varying_a_picture_with_gdf(whole: Whole, shift: float) -> None:
    """As the notebooks do: the picture is diffused without a shift, then sampled with one."""
    conditions = Conditions.of(whole, ["a", "b"])
    x_0 = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 16, 3, 5)).astype(np.float32))
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 16, 3, 5, generator=generator)
    expected = ddpm(
        lambda x, r, conditional: their_prior(whole, conditions, x, r[:1]),
        diffuse(x_0, noise, 0.7),
        generator,
        steps=4,
        cfg=None,
        shift=shift,
        rho=0.0,
        t_start=0.7,
    )
    steps = opened(whole).prior(
        conditions.embeds,
        height=128,
        width=200,
        seed=2,
        start=Start(x_0.numpy(), 0.7),
        steps=6,
        guidance=1.0,
        sampler="gdf",
        shift=shift,
    )
    for step, latents in zip(steps, expected.latents, strict=True):
        assert close(step.latents, latents, 1e-4), step.index


@pytest.mark.parametrize("shift", [2.0, 0.5])
def test_stage_b_starts_without_a_shift_too(whole: Whole, shift: float) -> None:
    conditions = Conditions.of(whole, ["a"])
    random = np.random.default_rng(3)
    details, effnet = (random.standard_normal(s).astype(np.float32) for s in ((1, 4, 32, 32), (1, 16, 3, 3)))
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(1, 4, 32, 32, generator=generator)

    def network(x: torch.Tensor, r: torch.Tensor, conditional: bool) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = whole.unets[Stage.DECODER, False](
                sample=x,
                timestep_ratio=r,
                clip_text_pooled=conditions.pooled,
                effnet=torch.from_numpy(effnet),
                return_dict=False,
            )[0]
        return found

    begun = diffuse(torch.from_numpy(details), noise, 0.8)
    expected = ddpm(network, begun, generator, steps=2, cfg=None, shift=shift, rho=0.0, t_start=0.8)
    steps = opened(whole).decode(
        effnet,
        conditions.embeds,
        height=128,
        width=128,
        seed=4,
        start=Start(details, 0.8),
        steps=3,
        sampler="gdf",
        shift=shift,
    )
    for step, latents in zip(steps, expected.latents, strict=True):
        assert close(step.latents, latents, 1e-4), step.index


@pytest.mark.parametrize(
    ("strength", "wanted"),
    [(1.0, (1.0, 0.8, 0.5, 0.1)), (0.9, (0.9, 0.8, 0.5, 0.1)), (0.8, (0.8, 0.5, 0.1)), (0.3, (0.3, 0.1))],
)
def test_timesteps_of_ones_own_from_a_strength_on(strength: float, wanted: tuple[float, ...]) -> None:
    schedule = make_schedule(Sampling(20, 1.0, timesteps=(1.0, 0.8, 0.5, 0.1)), strength)
    assert np.array_equal(schedule.ratios, np.array(wanted, np.float32))


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan])
def test_strengths_that_cannot_be(strength: float) -> None:
    with pytest.raises(UsageError, match="strength"):
        make_schedule(Sampling(20, 1.0), strength)


def test_a_strength_below_the_last_timestep_of_ones_own() -> None:
    with pytest.raises(UsageError, match="all timesteps are above it"):
        make_schedule(Sampling(20, 1.0, timesteps=(1.0, 0.8, 0.5)), 0.4)


@pytest.mark.parametrize("sampler", ["ddpm-wuerstchen", "gdf"])
def test_inpainting(whole: Whole, sampler: str) -> None:
    """Outside the mask latents are the diffused picture's, pixels in the end the picture's own; inside all is new."""
    image, width, height = picture(300, 170, 8), 256, 144
    mask = np.zeros((170, 300), np.uint8)
    mask[40:100, 150:230] = 255
    tape: dict[Stage, list[F32]] = {Stage.PRIOR: [], Stage.DECODER: []}
    cascade = opened(whole)
    result = cascade.generate(
        ["a", "b"],
        seed=3,
        width=width,
        height=height,
        init_image=image,
        mask=Image.fromarray(mask),
        strength=0.8,
        prior_steps=5,
        decoder_steps=3,
        sampler=sampler,
        on_step=lambda stage, step: tape[stage].append(step.latents),
    )
    # Where the mask lies in the picture that is cut out of the middle, and in cells of the latents.
    # Each time what it touches.
    scale = 300 / width
    above = (170 - height * scale) / 2
    left, right = int(150 / scale), math.ceil(230 / scale)
    top, bottom = int((40 - above) / scale), math.ceil((100 - above) / scale)
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(2, 16, 4, 6, generator=generator)]
    for _ in range(4):
        torch.randn(2, 16, 4, 6, generator=generator)
    noises.append(torch.randn(2, 4, 36, 64, generator=generator))
    known = [
        torch.from_numpy(cascade.encode_picture(image, height=height, width=width)),
        torch.from_numpy(cascade.encode_details(image, height=height, width=width)),
    ]
    ratios = [torch.linspace(0.8, 0, 5), torch.linspace(1, 0, 4)]
    for stage, x_0, noise, times in zip((Stage.PRIOR, Stage.DECODER), known, noises, ratios, strict=True):
        rows, columns = x_0.shape[-2:]
        new = np.zeros((rows, columns), bool)
        across, down = columns / width, rows / height
        new[int(top * down) : math.ceil(bottom * down), int(left * across) : math.ceil(right * across)] = True
        assert 0 < new.sum() < new.size
        assert len(tape[stage]) == len(times) - 1
        for latents, t in zip(tape[stage], times[1:], strict=True):
            diffused = x_0.expand(2, -1, -1, -1) if t == 0 else _diffused(x_0, noise, float(t), sampler, stage)
            expected = diffused.numpy()
            assert close(latents[..., ~new], expected[..., ~new], 1e-4), (stage, t)
            assert np.abs(latents[..., new] - expected[..., new]).mean() > 0.1
    original = np.asarray(cut(image, width, height)).astype(int)
    for drawn in result.images:
        there = np.asarray(drawn).astype(int)
        far = np.ones((height, width), bool)
        far[max(0, top - SHARP) : bottom + SHARP, left - SHARP : right + SHARP] = False
        assert far.sum() > far.size / 4
        assert np.array_equal(there[far], original[far])
        assert np.abs(there - original)[top:bottom, left:right].mean() > 10
    assert result.images[0].tobytes() != result.images[1].tobytes()


def _diffused(x_0: torch.Tensor, noise: torch.Tensor, t: float, sampler: str, stage: Stage) -> torch.Tensor:
    if sampler == "gdf":
        return diffuse(x_0, noise, t, shift=2.0 if stage is Stage.PRIOR else 1.0)
    return noised(x_0, noise, t)


def test_predictions_and_previews(whole: Whole) -> None:
    """The noiseless image of a step, by the formula and diffusers' networks; and its pictures."""
    conditions = Conditions.of(whole, ["a", "b"])
    cascade = opened(whole)
    size = {"height": 96, "width": 168, "seed": 5, "steps": 3}
    first = torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(5))
    found = list(cascade.prior(conditions.embeds, **size, guidance=1.0))
    previewer = whole.reference(Stage.PREVIEWER)
    x = first
    for step, t in zip(found, torch.linspace(1, 0, 4), strict=False):
        bar = alpha_bar(t)
        expected = (x - (1 - bar).sqrt() * their_prior(whole, conditions, x, t)) / bar.sqrt()
        assert close(step.predicted, expected, 1e-4), step.index
        with torch.no_grad():
            images = previewer(latents=torch.from_numpy(step.predicted))["images"]
        _same_pictures(step.preview(), images)
        assert step.preview()[0].size == (32, 24)
        x = torch.from_numpy(step.latents)
    effnet, vqgan = found[-1].latents, whole.vqgans[False]
    x = torch.randn(2, 4, 24, 42, generator=torch.Generator().manual_seed(5))
    for step, t in zip(cascade.decode(effnet, conditions.embeds, **size), torch.linspace(1, 0, 4), strict=False):
        with torch.no_grad():
            eps = whole.unets[Stage.DECODER, False](
                sample=x,
                timestep_ratio=t.expand(2),
                clip_text_pooled=conditions.pooled,
                effnet=torch.from_numpy(effnet),
                return_dict=False,
            )[0]
            images = vqgan.decode(SCALE * torch.from_numpy(step.predicted)).sample
        bar = alpha_bar(t)
        assert close(step.predicted, (x - (1 - bar).sqrt() * eps) / bar.sqrt(), 1e-4), step.index
        _same_pictures(step.preview(), images)
        x = torch.from_numpy(step.latents)


def test_previews_of_changed_predictions_are_made_when_asked_for(whole: Whole) -> None:
    cascade = opened(whole)
    steps: list[Step] = list(cascade.prior(cascade.encode_prompt("x"), height=64, width=64, steps=2))
    before = steps[0].preview()[0].tobytes()
    steps[0].predicted = steps[0].predicted + np.float32(1)
    assert steps[0].preview()[0].tobytes() != before


def _same_pictures(found: list[Image.Image], images: torch.Tensor) -> None:
    """Up to the rounding to 8 bits."""
    expected = (images.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert len(found) == len(expected)
    for mine, their in zip(found, expected, strict=True):
        assert np.abs(np.asarray(mine).astype(np.float32) - their).max() <= 0.51
        assert np.asarray(mine).std() > 1

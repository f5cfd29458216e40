"""Stability's sampler, against their formulas written anew in torch, with the networks of diffusers and torch's own
noise. None of our code is in the trajectories that are expected here."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from cascadekit import Cascade
from cascadekit.runtime.sampling.loop import Step
from cascadekit.runtime.sampling.samplers import Gdf, Wuerstchen, gdf_schedule, timesteps
from cascadekit.schemas.sizes import SizePolicy
from cascadekit.schemas.stages import Stage
from helpers.stability import CosineSchedule, ddpm, noise_condition
from helpers.whole import Whole

TOLERANCE = 1e-4  # greatest |difference| over greatest |latent|
PROMPTS, NEGATIVES = ["an image of a shiba inu", "a cat"], ["blurry", "dog"]


CASES = {
    "as the notebooks": {"steps": 5, "prior": (4.0, 2.0), "decoder": (1.1, 1.0), "rho": 0.7},
    "no rescale, another shift": {"steps": 4, "prior": (5.0, 0.5), "decoder": (1.5, 3.0), "rho": 0.0},
    "no guidance": {"steps": 3, "prior": (None, 1.0), "decoder": (None, 2.0), "rho": 0.7},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whole_trajectories(whole: Whole, case: dict[str, Any]) -> None:
    """Both stages from one generator, a batch of two. At each step: latents, predicted x0, and what is told of time."""
    prior, decoder = whole.unets[Stage.PRIOR, True], whole.unets[Stage.DECODER, False]
    steps, rho = case["steps"], case["rho"]
    texts = [_encoded(whole, PROMPTS), _encoded(whole, NEGATIVES)]
    generator = torch.Generator().manual_seed(4)

    def in_prior(x: torch.Tensor, r: torch.Tensor, conditional: bool) -> torch.Tensor:
        clip_text, pooled = texts[0 if conditional else 1]
        found: torch.Tensor = prior(
            sample=x,
            timestep_ratio=r,
            clip_text=clip_text,
            clip_text_pooled=pooled,
            clip_img=torch.zeros(2, 1, 768),
            return_dict=False,
        )[0]
        return found

    first = torch.randn(2, 16, 4, 5, generator=generator)
    cfg, shift = case["prior"]
    expected = {Stage.PRIOR: ddpm(in_prior, first, generator, steps=steps, cfg=cfg, shift=shift, rho=rho)}
    effnet = expected[Stage.PRIOR].latents[-1]

    def in_decoder(x: torch.Tensor, r: torch.Tensor, conditional: bool) -> torch.Tensor:
        seen = effnet if conditional else torch.zeros_like(effnet)
        pooled = texts[0 if conditional else 1][1]
        found: torch.Tensor = decoder(
            sample=x, timestep_ratio=r, clip_text_pooled=pooled, effnet=seen, return_dict=False
        )[0]
        return found

    first = torch.randn(2, 4, 36, 52, generator=generator)
    cfg, shift = case["decoder"]
    expected[Stage.DECODER] = ddpm(in_decoder, first, generator, steps=steps, cfg=cfg, shift=shift, rho=rho)

    found: dict[Stage, list[Step]] = {Stage.PRIOR: [], Stage.DECODER: []}
    with Cascade.open(whole.bundle, threads=1, stages={Stage.PRIOR: whole.lite}) as cascade:
        cascade.generate(
            PROMPTS,
            negative=NEGATIVES,
            seed=4,
            width=208,
            height=144,
            prior_steps=steps,
            decoder_steps=steps,
            sampler="gdf",
            prior_guidance=case["prior"][0] or 1.0,
            decoder_guidance=case["decoder"][0] or 1.0,
            prior_shift=case["prior"][1],
            decoder_shift=case["decoder"][1],
            rescale=rho,
            on_step=lambda stage, step: found[stage].append(step),
        )
    for stage, traced in expected.items():
        assert len(found[stage]) == steps
        for step, latents, x_0 in zip(found[stage], traced.latents, traced.x_0, strict=True):
            for mine, their in ((step.latents, latents), (step.predicted, x_0)):
                assert mine.shape == their.shape
                assert np.abs(mine - their.numpy()).max() <= TOLERANCE * float(their.abs().max()), (stage, step.index)


@pytest.mark.parametrize("t_start", [1.0, 0.8, 0.35])
@pytest.mark.parametrize("shift", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 60])
def test_what_networks_are_told_and_the_scales(steps: int, shift: float, t_start: float) -> None:
    schedule = CosineSchedule(shift)
    log_snr = schedule(torch.linspace(t_start, 0, steps + 1))
    found = gdf_schedule(timesteps(steps, t_start), shift)
    assert isinstance(found, Gdf)
    np.testing.assert_allclose(found.log_snr, log_snr.numpy(), rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(found.ratios, noise_condition(log_snr).numpy(), rtol=0, atol=3e-6)


def test_golden_numbers() -> None:
    """The original's noise conditions at 20 steps, plain and shifted."""
    plain, shifted = gdf_schedule(timesteps(20)), gdf_schedule(timesteps(20), 2.0)
    assert plain.ratios[0] == pytest.approx(0.99358, abs=5e-6)
    assert plain.ratios[-1] == pytest.approx(0.00226, abs=5e-6)
    np.testing.assert_allclose(plain.ratios[1:-1], timesteps(20)[1:-1], rtol=0, atol=3e-6)
    wanted = {1: 0.97496, 5: 0.87007, 10: 0.70564, 15: 0.44414, 19: 0.10627}  # t .95, .75, .5, .25, .05
    for index, ratio in wanted.items():
        assert shifted.ratios[index] == pytest.approx(ratio, abs=5.1e-6)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_beside_the_scheduler_of_diffusers(steps: int) -> None:
    """For equal noise predicted all steps but the last lead to the same latents; the last adds noise here."""
    rng = np.random.default_rng(steps)
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(steps)
    schedule, plain = gdf_schedule(timesteps(steps)), Wuerstchen(timesteps(steps))
    shape = (2, 4, 6, 6)
    for index, t in enumerate(scheduler.timesteps[:-1]):
        x, eps = (rng.standard_normal(shape, np.float32) for _ in range(2))
        generator, noise = (torch.Generator().manual_seed(index) for _ in range(2))
        expected = scheduler.step(torch.from_numpy(eps), t.expand(2), torch.from_numpy(x), generator).prev_sample
        z = torch.randn(shape, generator=noise).numpy()
        error = np.abs(schedule.step(x, eps, z, index) - expected.numpy()).max() / float(expected.abs().max())
        if index + 1 < steps:
            assert error <= 1e-6, index
        else:
            assert 1e-3 < error < 0.1
            assert np.abs(plain.step(x, eps, z, index) - expected.numpy()).max() <= 1e-5


def test_the_deviations_are_those_of_the_whole_batch_unbiased() -> None:
    """Guidance by the formula, on so few values that n and n - 1 differ."""
    prediction = np.random.default_rng(0).standard_normal((4, 1, 1, 2)).astype(np.float32)
    cond, uncond = torch.from_numpy(prediction).chunk(2)
    plain = torch.lerp(uncond, cond, 4.0)
    expected = 0.7 * (plain * (cond.std() / (plain.std() + 1e-9))) + 0.3 * plain
    found = gdf_schedule(timesteps(2), 1.0, 0.7).guide(prediction, 4.0)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    each = torch.stack([p * c.std() / p.std() for p, c in zip(plain, cond, strict=True)]) * 0.7 + 0.3 * plain
    assert np.abs(found - each.numpy()).max() > 0.01


def test_defaults_are_those_of_the_notebooks(whole: Whole) -> None:
    with Cascade.open(whole.bundle, threads=1, stages={Stage.PRIOR: whole.lite}) as cascade:
        call = {"seed": 1, "width": 64, "height": 64, "prior_steps": 2, "decoder_steps": 2, "sampler": "gdf"}
        short = cascade.generate("x", **call)
        said = cascade.generate(
            "x",
            **call,
            prior_guidance=4.0,
            decoder_guidance=1.1,
            prior_shift=2.0,
            decoder_shift=1.0,
            rescale=0.7,
            size_policy=SizePolicy.EXACT,
        )
        assert short.pixels is not None
        assert np.array_equal(short.pixels, said.pixels)


def _encoded(whole: Whole, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (2, 77, c) and (2, 1, c), by transformers."""
    tokens = whole.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = whole.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    return found.hidden_states[-1], found.text_embeds.unsqueeze(1)

"""The sampler against torch and diffusers' scheduler, and against published golden numbers."""

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from cascadekit.runtime.sampling.loop import sample
from cascadekit.runtime.sampling.samplers import Wuerstchen, alpha_bar, ddpm_step, guided, timesteps
from cascadekit.schemas.errors import UsageError


def test_timesteps_equal_torch_bit_for_bit() -> None:
    for steps in (*range(1, 130), 200, 333, 500, 999, 1000):
        assert np.array_equal(timesteps(steps), torch.linspace(1, 0, steps + 1).numpy()), steps


def test_no_steps() -> None:
    with pytest.raises(UsageError, match="0 steps"):
        timesteps(0)


GOLDEN = {1: 0.0001, 0.95: 0.00605964, 0.75: 0.144272, 0.5: 0.493844, 0.25: 0.847012, 0.05: 0.992007, 0: 0.9999}


@pytest.mark.parametrize(("t", "expected"), GOLDEN.items())
def test_golden_alpha_bar(t: float, expected: float) -> None:
    assert alpha_bar(np.float32(t)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "x_coefficient", "eps_coefficient", "sigma"),
    [(0, 7.784369, 7.656290, 0.988755), (10, 1.075780, 0.205528, 0.339207), (19, 1.003970, 0.088642, 0)],
)
def test_golden_coefficients(step: int, x_coefficient: float, eps_coefficient: float, sigma: float) -> None:
    ratios = timesteps(20)
    t, t_prev = ratios[step], ratios[step + 1]
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    assert ddpm_step(one, zero, zero, t, t_prev)[0] == pytest.approx(x_coefficient, rel=1e-5)
    assert ddpm_step(zero, one, zero, t, t_prev)[0] == pytest.approx(-eps_coefficient, rel=1e-4)
    assert ddpm_step(zero, zero, one, t, t_prev)[0] == pytest.approx(sigma, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 60])
def test_steps_equal_the_scheduler(steps: int) -> None:
    rng = np.random.default_rng(steps)
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(steps)
    shape = (2, 4, 5, 7)
    generator = torch.Generator().manual_seed(steps)
    noise = torch.Generator().manual_seed(steps)
    for index, t in enumerate(scheduler.timesteps[:-1]):
        x, eps = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        expected = scheduler.step(torch.from_numpy(eps), t.expand(2), torch.from_numpy(x), generator).prev_sample
        z = torch.randn(shape, generator=noise).numpy()
        found = ddpm_step(x, eps, z, timesteps(steps)[index], timesteps(steps)[index + 1])
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("guidance", [-1.0, 0.0, 0.3, 0.5, 1.0, 1.1, 4.0, 8.5])
def test_guidance_equals_lerp(guidance: float) -> None:
    cond, uncond = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    found = guided(torch.cat([cond, uncond]).numpy(), guidance)
    np.testing.assert_allclose(found, torch.lerp(uncond, cond, guidance).numpy(), rtol=1e-6, atol=1e-6)


def test_sampling_is_lazy_and_draws_once_a_step() -> None:
    draws: list[int] = []

    def draw() -> np.ndarray:
        draws.append(1)
        return np.zeros((1, 2), np.float32)

    steps = sample(lambda x, t: x, np.ones((1, 2), np.float32), Wuerstchen(timesteps(5)), draw)
    assert not draws
    first = next(steps)
    assert (first.index, first.steps, first.timestep_ratio) == (0, 5, pytest.approx(0.8))
    assert len(draws) == 1
    assert [step.index for step in steps] == [1, 2, 3, 4]
    assert len(draws) == 5  # the last one too, though it is not used

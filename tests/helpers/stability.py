"""Stability's sampler in torch, class by class as in StableCascade/gdf: schedule, noise condition, scaler, DDPM."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch


class CosineSchedule:
    """Log signal-to-noise ratio by time."""

    def __init__(self, shift: float = 1.0, s: float = 0.008, clamp: tuple[float, float] = (0.0001, 0.9999)) -> None:
        self.s, self.clamp, self.shift = torch.tensor([s]), clamp, shift
        self.min_var = torch.cos(self.s / (1 + self.s) * torch.pi * 0.5) ** 2

    def plain(self, t: torch.Tensor) -> torch.Tensor:
        var = torch.cos((self.s + t) / (1 + self.s) * torch.pi * 0.5).clamp(0, 1) ** 2 / self.min_var
        var = var.clamp(*self.clamp)
        return (var / (1 - var)).log()

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        log_snr = self.plain(t)
        if self.shift == 1:
            return log_snr
        low, high = self.plain(torch.tensor(1.0)).item(), self.plain(torch.tensor(0.0)).item()
        return (log_snr + 2 * math.log(1 / self.shift)).clamp(low, high)


def noise_condition(log_snr: torch.Tensor) -> torch.Tensor:
    """The noise condition of the network: the inverse of the cosine schedule."""
    s = torch.tensor([0.008])
    min_var = torch.cos(s / (1 + s) * torch.pi * 0.5) ** 2
    t = ((log_snr.sigmoid() * min_var) ** 0.5).acos() / (torch.pi * 0.5) * (1 + s) - s
    return t.clamp(0, 1)


def variance_preserving(log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return log_snr.sigmoid() ** 0.5, (1 - log_snr.sigmoid()) ** 0.5


def diffuse(x_0: torch.Tensor, epsilon: torch.Tensor, t: float, shift: float = 1.0) -> torch.Tensor:
    """GDF.diffuse, whose shift is 1 unless it is given; the notebooks give none when they start from a picture."""
    a, b = variance_preserving(CosineSchedule(shift)(torch.tensor(t)))
    return x_0 * a + epsilon * b


@dataclass
class Traced:
    told: list[float]
    latents: list[torch.Tensor]  # after each step
    x_0: list[torch.Tensor]


def ddpm(
    network: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor],
    x: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    cfg: float | None,
    shift: float,
    rho: float,
    eta: float = 1.0,
    t_start: float = 1.0,
) -> Traced:
    """GDF.sample with DDPMSampler and EpsilonTarget. `network` (x, r, conditional) predicts the noise."""
    schedule = CosineSchedule(shift)
    traced = Traced([], [], [])
    range_ = schedule(torch.linspace(t_start, 0, steps + 1))
    with torch.no_grad():
        for now, following in pairwise(range_):
            r = noise_condition(now).expand(len(x))
            a, b = variance_preserving(now)
            pred = network(x, r, True)
            if cfg is not None:
                cond, uncond = pred, network(x, r, False)
                pred = torch.lerp(uncond, cond, cfg)
                if rho > 0:
                    rescaled = pred * (cond.std() / (pred.std() + 1e-9))
                    pred = rho * rescaled + (1 - rho) * pred
            x_0, epsilon = (x - pred * b) / a, pred
            a_next, b_next = variance_preserving(following)
            sigma = eta * (b_next**2 / b**2).sqrt() * (1 - a**2 / a_next**2).sqrt()
            x = a_next * x_0 + (b_next**2 - sigma**2).sqrt() * epsilon
            x = x + sigma * torch.randn(x.shape, generator=generator)
            traced.told.append(float(r[0]))
            traced.latents.append(x)
            traced.x_0.append(x_0)
    return traced

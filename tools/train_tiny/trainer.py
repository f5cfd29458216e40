"""The training loop that every stage shares: AdamW, a warm-up and a cosine, averaged weights, resuming, curves."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .device import load
from .pictures import curves

EVERY = 25  # steps between two points of the curves
SAVE_SECONDS = 90.0

Losses = dict[str, Tensor]  # "loss" is minimised, the others are shown beside it
Sheet = Callable[[nn.Module, Path], None]
Loss = Callable[[int, np.random.Generator], Losses]


@dataclass(frozen=True)
class Plan:
    """How long and how fast one stage is trained."""

    steps: int
    rate: float  # peak learning rate
    average: float = 0.998  # of the averaged weights, which are the result
    decay: float = 0.01
    warmup: int = 100
    sheet: int = 500  # steps between two sample sheets
    slow: tuple[str, ...] = ()  # parts of the names of weights that learn at a tenth of the rate

    def cut(self, steps: int | None) -> "Plan":
        """The same plan with another number of steps, if one is given."""
        return self if steps is None else replace(self, steps=steps, warmup=min(self.warmup, steps // 5 + 1))


def train(folder: Path, network: nn.Module, plan: Plan, loss: Loss, sheet: Sheet, *, seed: int = 0) -> nn.Module:
    """Train `network` to ``plan.steps`` steps, from where `folder` left off. Returns the average, in eval mode.

    Each step's random numbers depend on the seed and the step alone, so a resumed training takes the same pictures.
    `sheet` makes a picture of what the averaged network does, every ``plan.sheet`` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(_groups(network, plan), lr=plan.rate, betas=(0.9, 0.99))
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    state, path = {"step": 0, "seconds": 0.0}, folder / "state.pt"
    if path.exists():
        saved = load(path)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        average, state = saved["average"], saved["state"]
    log, sums = _Log(folder), _Means()
    began = saved_at = time.monotonic()
    before = state["seconds"]
    network.train()
    for step in range(int(state["step"]), plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _rate(step, plan) * group["share"]
        torch.manual_seed(seed * 1_000_003 + step)
        losses = loss(step, np.random.default_rng([seed, step]))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        _update(average, network, min(plan.average, (1 + step) / (10 + step)))
        sums.add({**{name: float(value.detach()) for name, value in losses.items()}, "norm": float(norm)})
        done = step + 1 == plan.steps
        now = time.monotonic()
        state = {"step": step + 1, "seconds": before + now - began}
        if (step + 1) % EVERY == 0 or done:
            log.add(step + 1, state["seconds"], sums.take())
        if now - saved_at > SAVE_SECONDS or done:
            _save(
                path,
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "state": state,
                },
            )
            saved_at = time.monotonic()
        if (step + 1) % plan.sheet == 0 or done:
            _with_average(network, average, sheet, folder / f"sheet-{step + 1:06d}.png")
            curves(folder / "curves.png", log.rows)
    network.load_state_dict(average)
    return network.eval()


def averaged(folder: Path, network: nn.Module) -> nn.Module:
    """`network` with the averaged weights that the training in `folder` has reached so far, in eval mode."""
    network.load_state_dict(load(folder / "state.pt")["average"])
    return network.eval().requires_grad_(False)


def _groups(network: nn.Module, plan: Plan) -> list[dict[str, object]]:
    """Matrices decay, vectors do not; `share` is the share of the learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            share = 0.1 if any(part in name for part in plan.slow) else 1.0
            groups.setdefault((plan.decay if weight.ndim > 1 else 0.0, share), []).append(weight)
    return [{"params": some, "weight_decay": decay, "share": share} for (decay, share), some in groups.items()]


def _rate(step: int, plan: Plan) -> float:
    share = step / plan.steps
    return min(1.0, (step + 1) / plan.warmup) * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * share))))


@torch.no_grad()
def _update(average: dict[str, Tensor], network: nn.Module, keep: float) -> None:
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - keep)
        else:
            average[name].copy_(value)


def _with_average(network: nn.Module, average: dict[str, Tensor], sheet: Sheet, path: Path) -> None:
    current = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(average)
    network.eval()
    with torch.no_grad():
        sheet(network, path)
    network.load_state_dict(current)
    network.train()


def _save(path: Path, content: object) -> None:
    """A full disk only costs the time since the last state, if there is room again later."""
    part = path.with_suffix(".part")
    try:
        torch.save(content, part)
        part.rename(path)
    except (OSError, RuntimeError) as error:
        print(f"{path}: not saved: {error}", flush=True)


class _Means:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def take(self) -> dict[str, float]:
        rows, self.rows = self.rows, []
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


class _Log:
    """The losses, one JSON object a line, kept over a resume."""

    def __init__(self, folder: Path) -> None:
        self.path, self.name = folder / "log.jsonl", folder.name
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, float]] = [json.loads(line) for line in lines]

    def add(self, step: int, seconds: float, means: dict[str, float]) -> None:
        row = {"step": step, "seconds": round(seconds, 1), **{name: round(value, 5) for name, value in means.items()}}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % (EVERY * 4) == 0:
            print(self.name, " ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)

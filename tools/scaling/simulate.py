"""Simulates a batch on a cluster, image by image, and compares it with measured runs.

    python tools/scaling/simulate.py results.json
    python tools/scaling/simulate.py results.json --gpus 1,10,100,1000

An image goes through text encoder, prior, decoder, a task that writes, and the driver, which is one process. Seconds
of every stage are those of the runs. One number is fitted, to the runs of one actor alone: the time between two tasks
of an actor. The runs of more actors are then predicted, and the error is printed. With `--gpus`, the same model says
where the queue is on a larger cluster.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import simpy

WARM = 0.2  # share of the images at the beginning and at the end that the rate leaves out
IN_FLIGHT = 2  # tasks that Ray Data sends to an actor at a time
STAGES = ("text_encoder", "prior", "decoder", "write")


@dataclass(frozen=True)
class Costs:
    """Seconds for an image: of each stage, between two tasks of an actor, and of the driver."""

    stages: Mapping[str, float]
    between: float
    driver: float


@dataclass(frozen=True)
class Simulated:
    """Images a second, and the busy share of each server."""

    rate: float
    busy: Mapping[str, float]


def simulate(costs: Costs, actors: int, images: int, texts: int = 1) -> Simulated:
    """Run `images` through `actors` priors and decoders, `texts` text encoders and one driver."""
    env = simpy.Environment()
    numbers = {"text_encoder": texts, "prior": actors, "decoder": actors, "write": 2 * actors, "driver": 1}
    servers = {name: simpy.Resource(env, number) for name, number in numbers.items()}
    busy = dict.fromkeys(numbers, 0.0)
    room = {name: simpy.Resource(env, IN_FLIGHT * numbers[name]) for name in STAGES}  # back-pressure
    ends: list[float] = []

    def serve(name: str, seconds: float) -> Iterator[Any]:
        with servers[name].request() as mine:
            yield mine
            yield env.timeout(seconds)
            busy[name] += seconds

    def image() -> Iterator[Any]:
        held = None
        for name in STAGES:
            place = room[name].request()
            yield place
            if held is not None:
                room[held[0]].release(held[1])
            held = (name, place)
            yield from serve(name, costs.stages[name] + costs.between)
        yield from serve("driver", costs.driver)
        assert held is not None
        room[held[0]].release(held[1])
        ends.append(env.now)

    for _ in range(images):
        env.process(image())
    env.run()
    first, last = int(WARM * images), int((1 - WARM) * images)
    shares = {name: seconds / (env.now * numbers[name]) for name, seconds in busy.items()}
    return Simulated((last - first) / (ends[last] - ends[first]), shares)


def fitted(runs: list[dict[str, Any]]) -> Costs:
    """The costs of the runs of one actor; the time between tasks makes the simulated rate that of these runs."""
    ones = [run for run in runs if run["actors"] == 1]
    stages = {name: fmean(run["seconds"][name] for run in ones) for name in STAGES}
    driver, rate = fmean(run["driver"] for run in ones), fmean(run["rate"] for run in ones)
    low, high = 0.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        found = simulate(Costs(stages, middle, driver), 1, ones[0]["images"]).rate
        low, high = (middle, high) if found > rate else (low, middle)
    return Costs(stages, low, driver)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--gpus", default="", help="numbers of priors and decoders to simulate, with commas")
    given = parser.parse_args()
    runs = json.loads(given.results.read_text())["runs"]
    costs = fitted(runs)
    print("seconds:", {name: round(value, 4) for name, value in costs.stages.items()})
    print(f"between two tasks: {costs.between:.4f} (fitted), driver: {costs.driver:.4f} (CPU time)")
    for actors in sorted({run["actors"] for run in runs}):
        mine = [run for run in runs if run["actors"] == actors]
        measured, found = fmean(run["rate"] for run in mine), simulate(costs, actors, mine[0]["images"]).rate
        print(f"{actors} actors: measured {measured:.3f}, simulated {found:.3f} images/s, {found / measured - 1:+.1%}")
    for gpus in map(int, filter(None, given.gpus.split(","))):
        found = simulate(costs, gpus, 60 * gpus, texts=max(1, gpus // 10))
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found.busy.items())
        print(f"{gpus}: {found.rate:.2f} images/s; busy: {shares}")


if __name__ == "__main__":
    main()

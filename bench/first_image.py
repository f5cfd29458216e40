"""Measures a cold start: from the start of a fresh process to its first image, with the files in the page cache."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ..runtime.cascade import Cascade
from ..schemas.callbacks import Say, ignored
from .machine import describe_machine
from .process import WorkerJob, bring_into_cache, bundle_files

PROMPT = "an image of a shiba inu, donning a spacesuit and helmet"


@dataclass(frozen=True)
class FirstImageJob(WorkerJob):
    """One image in a fresh process; `runs` further ones follow, which show what the first took more.

    `checked=False` lets an image without sense pass, as random weights may give."""

    bundle: str
    device: str
    engine: str
    memory: str
    size: tuple[int, int]  # height, width
    steps: tuple[int, int]  # of prior and decoder
    cuda_graph: bool = True
    checked: bool = True


@dataclass(frozen=True)
class FirstImageReport:
    """The timings of each process, see `runtime.timings`, and "image": the median of further images in the process."""

    machine: dict[str, Any]
    job: dict[str, Any]
    rounds: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_first_image(job: FirstImageJob, rounds: int = 3, say: Say = ignored) -> FirstImageReport:
    """Start `rounds` processes, one after the other. Raises ConversionError when one fails."""
    root = Path(job.bundle)
    machine = describe_machine(root)
    for path in bundle_files(root):
        bring_into_cache(path)
    found = []
    for number in range(1, rounds + 1):
        found.append(job.work("first image"))
        say(f"process {number} of {rounds}: first image after {found[-1]['first_image']:.2f} s")
    machine["load_average"]["after"] = os.getloadavg()[0]
    described = {name: value for name, value in asdict(job).items() if name != "bundle"}
    return FirstImageReport(machine, described, tuple(found))


def main() -> None:
    """The fresh process: generate and print the timings as a line of JSON."""
    job = FirstImageJob(**json.loads(sys.argv[1]))
    said: list[str] = []
    with Cascade.open(
        job.bundle,
        job.device,
        engine=job.engine,
        threads=job.threads or None,
        memory=job.memory,
        cuda_graph=job.cuda_graph,
        say=said.append,
    ) as cascade:
        cascade.networks.checked = job.checked
        _generate(cascade, job)
        first = cascade.timings.to_json()
        later = [_generate(cascade, job) for _ in range(job.runs)]
        print(json.dumps({**first, "images": later, "engine": cascade.engine.name, "said": said}))


def _generate(cascade: Cascade, job: FirstImageJob) -> float:
    began = perf_counter()
    (height, width), (prior_steps, decoder_steps) = job.size, job.steps
    result = cascade.generate(
        PROMPT, seed=0, height=height, width=width, prior_steps=prior_steps, decoder_steps=decoder_steps
    )
    assert result.images
    return round(perf_counter() - began, 4)

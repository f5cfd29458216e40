"""python -m tools.train_tiny STAGE...: data, vqgan, effnet, text, prior, decoder, write, judge; see README.md."""

import argparse
import os
from pathlib import Path

import torch

from . import stages
from .device import use_best_device


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny", description=__doc__)
    parser.add_argument("stage", nargs="+", choices=list(stages.STAGES), help="what to do, in this order")
    parser.add_argument("--runs", type=Path, default=Path("tiny_runs"), help="folder of data, states and sheets")
    parser.add_argument(
        "--packages", type=Path, help="node_modules with the icon packages (default: RUNS/npm/node_modules)"
    )
    parser.add_argument("--steps", type=int, help="train this many steps instead of the planned ones")
    parser.add_argument("--share", type=float, default=1.0, help="of all pictures, for a quick try of the whole road")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    use_best_device()
    job = stages.Job(given.runs, given.packages or given.runs / "npm" / "node_modules", given.steps, given.share)
    for name in given.stage:
        torch.manual_seed(0)  # of the first weights; each step of a training has its own
        stages.STAGES[name](job)


main()

"""Measures how a batch on a Ray cluster scales with the number of actors, and writes the numbers as JSON.

    python tools/scaling/measure.py demo/bundle results.json --actors 1,2,4 --prior 0.54 --decoder 0.38

Stages compute the example model and then wait until the time of a GPU's stage is over, which `--prior` and `--decoder`
give in seconds for an image. What is measured is therefore the road: Ray, queues, copies, files. Runs of different
numbers of actors alternate. With 0 for both, stages only compute. On few cores let one stage be slow and grow then:

    python tools/scaling/measure.py demo/bundle results.json --actors 1,2 --prior 0 --decoder 0 --grow decoder \
        --size 512 --decoder-steps 20 --images 12 --rounds 3
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cascadekit.runtime.batch.batch_log import BatchLog
from cascadekit.runtime.batch.batch_runner import BatchRunner
from cascadekit.runtime.batch.generate_batch import BatchSettings, draft_batch
from cascadekit.runtime.batch.image_jobs import bundle_identity
from cascadekit.runtime.cluster.actor_pools import ActorPool
from cascadekit.runtime.cluster.cluster_groups import ClusterGroups
from cascadekit.runtime.cluster.connect import connected
from cascadekit.runtime.cluster.stage_actors import BatchPiece, ClusterBundle, DecoderActor, PriorActor, TextActor
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

SETTINGS = {"prior_steps": 2, "seed": 3}
OPTIONS = {"engine": "onnxruntime", "device": "cpu", "threads": 1, "memory": "resident"}
GROW = (Stage.PRIOR, Stage.DECODER)
PRIOR_SECONDS, DECODER_SECONDS = "CASCADEKIT_PRIOR_SECONDS", "CASCADEKIT_DECODER_SECONDS"


def rest(began: float, seconds: float) -> None:
    time.sleep(max(0.0, began + seconds - time.perf_counter()))


def ended(stage: Stage) -> dict[str, float]:
    """Beside the seconds of an image: when the stage ended, and in which process."""
    return {f"{stage}_ended": time.time(), f"{stage}_process": os.getpid()}


class WaitingPrior(PriorActor):
    """Computes, then waits until a GPU would be done."""

    def work(self, piece: BatchPiece) -> BatchPiece:
        began = time.perf_counter()
        done = super().work(piece)
        rest(began, float(os.environ[PRIOR_SECONDS]))
        return replace(done, seconds={**done.seconds, **ended(Stage.PRIOR)})


class WaitingDecoder(DecoderActor):
    """Computes, then waits until a GPU would be done."""

    def work(self, piece: BatchPiece) -> BatchPiece:
        began = time.perf_counter()
        done = super().work(piece)
        rest(began, float(os.environ[DECODER_SECONDS]))
        return replace(done, seconds={**done.seconds, **ended(Stage.DECODER)})


ACTORS = {Stage.TEXT_ENCODER: TextActor, Stage.PRIOR: WaitingPrior, Stage.DECODER: WaitingDecoder}


def one_run(
    ray: Any, bundle: Path, actors: int, images: int, grow: Sequence[Stage], making: Mapping[str, Any]
) -> dict[str, Any]:
    """Generate the images with `actors` actors of each stage in `grow`, and one of the others.

    The rate is that of the first of these stages, the slowest, while all its actors have work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p.txt").write_text("\n".join(f"picture {number}" for number in range(images)))
        manifest = open_bundle(bundle).manifest
        draft = draft_batch(manifest, BatchSettings(folder / "p.txt", folder / "out"), making)
        pools = {stage: ActorPool(actors if stage in grow else 1, 0.05, 0.0) for stage in ACTORS}
        opened = ClusterBundle(bundle.resolve(), OPTIONS, bundle_identity(manifest))
        groups = ClusterGroups(ray, opened, manifest, pools, actors=ACTORS)
        ends, worked, slowest = [], [], defaultdict(list)  # seconds and CPU seconds of this process after each image
        began = time.perf_counter()
        with BatchLog(folder / "log") as log:
            for outcome in BatchRunner(groups, log).run(draft.plan.jobs):
                slowest[outcome.seconds[f"{grow[0]}_process"]].append(outcome.seconds[f"{grow[0]}_ended"])
                ends.append(time.perf_counter() - began)
                worked.append(time.process_time())
        assert len(list((folder / "out").glob("*.png"))) == images
        shutil.rmtree(folder / "out")
    assert len(slowest) == actors
    first, last = max(map(min, slowest.values())), min(map(max, slowest.values()))
    between = [end for mine in slowest.values() for end in mine if first < end <= last]
    found = groups.report.to_json()
    return {
        "actors": actors,
        "images": images,
        "rate": len(between) / (last - first),
        "first": ends[0],
        "wall": ends[-1],
        "ends": [round(each, 3) for each in ends],
        "driver": (worked[-1] - worked[0]) / (images - 1),  # CPU seconds of this process for an image
        "seconds": {stage: each["busy_seconds"] / each["images"] for stage, each in found.items()},
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--actors", default="1,2,4")
    parser.add_argument("--images", type=int, default=60, help="for one actor; more actors get as many more")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prior", type=float, default=0.54)
    parser.add_argument("--decoder", type=float, default=0.38)
    parser.add_argument("--grow", action="append", choices=GROW, help="stages with more actors, the slowest first")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--decoder-steps", type=int, default=1)
    given = parser.parse_args()
    making = {**SETTINGS, "width": given.size, "height": given.size, "decoder_steps": given.decoder_steps}
    os.environ[PRIOR_SECONDS], os.environ[DECODER_SECONDS] = str(given.prior), str(given.decoder)
    runs = []
    with connected("local") as ray:
        for _ in range(given.rounds):
            for actors in map(int, given.actors.split(",")):
                runs.append(one_run(ray, given.bundle, actors, given.images * actors, given.grow or GROW, making))
                print(json.dumps({name: value for name, value in runs[-1].items() if name != "ends"}), flush=True)
    facts = {"prior": given.prior, "decoder": given.decoder, "cores": len(os.sched_getaffinity(0)), "runs": runs}
    given.output.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

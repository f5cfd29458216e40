"""Measures how a batch on a Ray cluster scales with the number of actors, and writes the numbers as JSON.

    python tools/scaling/measure.py demo/bundle results.json --actors 1,2,4 --prior 0.54 --decoder 0.38

Stages compute the example model and then wait until the time of a GPU's stage is over, which `--prior` and `--decoder`
give in seconds for an image. What is measured is therefore the road: Ray, queues, copies, files. With 0 for both,
stages only compute. Runs of different numbers of actors alternate.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
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
from cascadekit.runtime.cluster.stage_actors import ClusterBundle, DecoderActor, Piece, PriorActor, TextActor
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

SETTINGS = {"width": 64, "height": 64, "prior_steps": 2, "decoder_steps": 1, "seed": 3}
OPTIONS = {"engine": "onnxruntime", "device": "cpu", "threads": 1, "memory": "resident"}
ENDED, BY = "prior_ended", "prior_process"  # beside the seconds of an image: when its prior ended, and where
PRIOR_SECONDS, DECODER_SECONDS = "CASCADEKIT_PRIOR_SECONDS", "CASCADEKIT_DECODER_SECONDS"


def rest(began: float, seconds: float) -> None:
    time.sleep(max(0.0, began + seconds - time.perf_counter()))


class WaitingPrior(PriorActor):
    """Computes, then waits until a GPU would be done."""

    def work(self, piece: Piece) -> Piece:
        began = time.perf_counter()
        done = super().work(piece)
        rest(began, float(os.environ[PRIOR_SECONDS]))
        return replace(done, seconds={**done.seconds, ENDED: time.time(), BY: os.getpid()})


class WaitingDecoder(DecoderActor):
    """Computes, then waits until a GPU would be done."""

    def work(self, piece: Piece) -> Piece:
        began = time.perf_counter()
        done = super().work(piece)
        rest(began, float(os.environ[DECODER_SECONDS]))
        return done


ACTORS = {Stage.TEXT_ENCODER: TextActor, Stage.PRIOR: WaitingPrior, Stage.DECODER: WaitingDecoder}


def one_run(ray: Any, bundle: Path, actors: int, images: int) -> dict[str, Any]:
    """Generate the images with `actors` priors and as many decoders.

    The rate is that of the priors, which are the slowest stage, while all of them have work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p.txt").write_text("\n".join(f"picture {number}" for number in range(images)))
        manifest = open_bundle(bundle).manifest
        draft = draft_batch(manifest, BatchSettings(folder / "p.txt", folder / "out"), SETTINGS)
        pools = {stage: ActorPool(actors, 0.05, 0.0) for stage in ACTORS}
        pools[Stage.TEXT_ENCODER] = replace(pools[Stage.TEXT_ENCODER], size=1)
        opened = ClusterBundle(bundle.resolve(), OPTIONS, bundle_identity(manifest))
        groups = ClusterGroups(ray, opened, manifest, pools, actors=ACTORS)
        ends, worked, priors = [], [], defaultdict(list)  # seconds and CPU seconds of this process after each image
        began = time.perf_counter()
        with BatchLog(folder / "log") as log:
            for outcome in BatchRunner(groups, log).run(draft.plan.jobs):
                priors[outcome.seconds[BY]].append(outcome.seconds[ENDED])
                ends.append(time.perf_counter() - began)
                worked.append(time.process_time())
        assert len(list((folder / "out").glob("*.png"))) == images
        shutil.rmtree(folder / "out")
    assert len(priors) == actors
    first, last = max(map(min, priors.values())), min(map(max, priors.values()))
    between = [end for mine in priors.values() for end in mine if first < end <= last]
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
    given = parser.parse_args()
    os.environ[PRIOR_SECONDS], os.environ[DECODER_SECONDS] = str(given.prior), str(given.decoder)
    runs = []
    with connected("local") as ray:
        for _ in range(given.rounds):
            for actors in map(int, given.actors.split(",")):
                runs.append(one_run(ray, given.bundle, actors, given.images * actors))
                print(json.dumps({name: value for name, value in runs[-1].items() if name != "ends"}), flush=True)
    facts = {"prior": given.prior, "decoder": given.decoder, "cores": len(os.sched_getaffinity(0)), "runs": runs}
    given.output.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

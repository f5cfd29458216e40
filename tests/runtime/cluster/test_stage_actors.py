"""The actors of a cluster in this process: what they hand on, and that images are those without a cluster."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascadekit import Cascade
from cascadekit.runtime.batch.file_names import NameTemplate
from cascadekit.runtime.batch.image_jobs import BatchPlanner, ImageJob, bundle_identity
from cascadekit.runtime.batch.job_groups import job_groups
from cascadekit.runtime.batch.local_groups import LocalGroups
from cascadekit.runtime.batch.prompt_files import read_prompt_file
from cascadekit.runtime.cluster.actor_pools import DEFAULT_POOLS, fitted_pools, parse_pools
from cascadekit.runtime.cluster.stage_actors import (
    ACTORS,
    PIECES,
    BatchPiece,
    ClusterBundle,
    PriorActor,
    write_files,
)
from cascadekit.runtime.cluster.stage_report import BusyTime, StageReport
from cascadekit.runtime.result import Result
from cascadekit.runtime.text.prompts import PromptEmbeds
from cascadekit.schemas.errors import EngineError, UsageError
from cascadekit.schemas.manifest import Manifest
from cascadekit.schemas.stages import Stage
from helpers.whole import Whole

QUICK = {"width": 64, "height": 72, "prior_steps": 2, "decoder_steps": 2, "decoder_guidance": 1.5}
OPTIONS = {"threads": 1, "engine": "onnxruntime", "memory": "resident"}


@pytest.fixture(scope="module")
def cascade(whole: Whole) -> Cascade:
    return Cascade.open(whole.bundle, **OPTIONS)


@pytest.fixture
def bundle(whole: Whole, cascade: Cascade) -> ClusterBundle:
    return ClusterBundle(whole.bundle, OPTIONS, bundle_identity(cascade.manifest))


def planned(manifest: Manifest, folder: Path, rows: Sequence[object]) -> Sequence[ImageJob]:
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    planner = BatchPlanner(manifest, folder / "out", NameTemplate("{name}"), base_seed=3, common=QUICK)
    plan = planner.plan(read_prompt_file(folder / "p.jsonl"))
    assert not plan.problems
    return plan.jobs


def through(actors: Sequence[Any], group: Sequence[ImageJob]) -> list[BatchPiece]:
    """The pieces that come out of the actors and the task that writes; each takes what the one before gave as bytes."""
    row: dict[str, Any] = {PIECES: [BatchPiece(group).pack()]}
    for actor in (*actors, write_files):
        row = actor(pickle.loads(pickle.dumps(row)))
    return [BatchPiece.unpack(packed) for packed in row[PIECES]]


@pytest.mark.parametrize("together", [1, 3])
def test_the_same_bytes_as_without_a_cluster(
    cascade: Cascade, bundle: ClusterBundle, tmp_path: Path, together: int
) -> None:
    """Text of several kinds, images of one generator, and every kind of picture, alone and three at a time."""
    rng = np.random.default_rng(1)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (80, 96, 3), np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[20:50, 30:70] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rows = [
        "a fox",
        {"prompt": "a (red:1.3) fox", "negative": "blue", "weighted": True},
        {"prompt": "three", "images": 3},
        {"prompt": "varied", "init_image": "a.png", "strength": 0.6},
        {"prompt": "mended", "init_image": "a.png", "mask": "mask.png"},
        {"prompt": "followed", "image_prompts": ["b.png", "c.png"], "controls": ["canny=b.png:0.7"]},
        {"prompt": "gdf", "sampler": "gdf", "height": 64},
    ]
    jobs = planned(cascade.manifest, tmp_path, rows)
    expected = {
        job.number: file
        for group in LocalGroups(cascade, together)(jobs)
        for job, file in zip(group.jobs, group.files, strict=True)
    }
    assert sorted(expected) == list(range(9))
    actors = [actor(bundle) for actor in ACTORS.values()]
    found = {}
    for group in job_groups(jobs, together, lambda request: 0):
        for piece in through(actors, group):
            assert piece.error is None
            assert {busy.stage for busy in piece.busy} == {"text_encoder", "prior", "decoder", "write"}
            found |= dict(zip((job.number for job in piece.jobs), piece.files, strict=True))
    for number, file in expected.items():
        assert found[number] == file, rows


def test_what_fails_together_is_tried_alone(
    cascade: Cascade, bundle: ClusterBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out in the decoder of three, and for one image whatever is done."""
    jobs = planned(cascade.manifest, tmp_path, ["a", "b", "c"])
    alone = {group.jobs[0].number: group.files[0] for group in LocalGroups(cascade, 1)(jobs)}
    actors = [actor(bundle) for actor in ACTORS.values()]
    decode = actors[2].cascade.decode

    def failing(latents: Any, *arguments: Any, **more: Any) -> Any:
        for step in decode(latents, *arguments, **more):  # the noise is drawn before the failure
            yield step
            if len(latents) == 3:
                raise EngineError("out of\nmemory")

    monkeypatch.setattr(actors[2].cascade, "decode", failing)
    images = through(actors, jobs)
    assert [piece.files == [alone[piece.jobs[0].number]] for piece in images] == [True] * 3
    prior = actors[1].cascade.prior

    def never_b(embeds: PromptEmbeds, **more: Any) -> Any:
        if len(embeds) > 1 or np.array_equal(embeds.pooled, cascade.encode_prompt("b").pooled):
            raise EngineError("out of\nmemory")
        return prior(embeds, **more)

    monkeypatch.setattr(actors[1].cascade, "prior", never_b)
    pieces = through(actors, jobs)
    assert [(piece.jobs[0].number, piece.error) for piece in pieces] == [(0, None), (1, "out of memory"), (2, None)]
    assert pieces[2].files == [alone[2]]


def test_the_decoder_gets_little(bundle: ClusterBundle, cascade: Cascade, tmp_path: Path) -> None:
    """No hidden states of the text go from prior to decoder: latents and pooled vectors."""
    jobs = planned(cascade.manifest, tmp_path, ["a"])
    row: dict[str, Any] = {PIECES: [BatchPiece(jobs).pack()]}
    for actor in list(ACTORS.values())[:2]:
        row = actor(bundle)(row)
    made = BatchPiece.unpack(row[PIECES][0]).made
    assert isinstance(made, Result)
    assert made.embeds.clip_text.size == made.embeds.negative_clip_text.size == 0
    assert made.prior_latents.shape[:2] == (1, 16)


def test_another_bundle_on_a_node(bundle: ClusterBundle, cascade: Cascade, tmp_path: Path) -> None:
    row = {PIECES: [BatchPiece(planned(cascade.manifest, tmp_path, ["a"])).pack()]}
    with pytest.raises(UsageError, match="another bundle than on the machine"):
        PriorActor(replace(bundle, identity={}))(row)
    with pytest.raises(UsageError, match=r"node .*none"):
        PriorActor(replace(bundle, path=tmp_path / "none"))(row)


def test_after_needs_the_prior_alone(cascade: Cascade) -> None:
    whole = cascade.generate("a", seed=1, **QUICK)
    with pytest.raises(UsageError, match='output="prior"'):
        cascade.generate("a", after=whole, **QUICK)
    early = cascade.generate("a", seed=1, output="prior", **QUICK)
    for _ in range(2):  # the noise of an earlier result is not used up
        again = cascade.generate("a", after=early, **QUICK)
        assert np.array_equal(again.pixels, whole.pixels)  # type: ignore[arg-type]


class TestPools:
    def test_the_command_line(self) -> None:
        pools = parse_pools(["prior=4,cpus=2,gpus=0.5", "decoder=1"])
        assert (pools[Stage.PRIOR].size, pools[Stage.PRIOR].cpus, pools[Stage.PRIOR].gpus) == (4, 2.0, 0.5)
        assert (pools[Stage.DECODER].size, pools[Stage.DECODER].gpus) == (1, None)
        assert pools[Stage.TEXT_ENCODER] == DEFAULT_POOLS[Stage.TEXT_ENCODER]

    @pytest.mark.parametrize("text", ["prior", "prior=", "prior=0", "prior=1,gpu=1", "prior=1,cpus=-1", "vqgan=1"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(UsageError, match="actors "):
            parse_pools([text])

    def test_gpus_are_shared(self) -> None:
        on_gpus = fitted_pools(DEFAULT_POOLS, {"CPU": 8, "GPU": 1}, use_gpus=True)
        assert sum(pool.gpus or 0 for pool in on_gpus.values()) == pytest.approx(1)
        for cluster, use in (({"CPU": 8}, True), ({"CPU": 8, "GPU": 1.0}, False)):
            assert not any(pool.gpus for pool in fitted_pools(DEFAULT_POOLS, cluster, use_gpus=use).values())

    @pytest.mark.parametrize(("given", "said"), [("prior=4", r"need 4 CPUs.* has 2"), ("prior=2,gpus=1", "2 GPUs")])
    def test_a_cluster_that_is_too_small(self, given: str, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            fitted_pools(parse_pools([given]), {"CPU": 2.0 if "gpus" not in given else 9.0}, use_gpus=True)


def test_report() -> None:
    report = StageReport()
    report.add([BusyTime("prior", "a/1", 2.0, 2), BusyTime("decoder", "a/2", 1.0, 2)], 5.0)
    report.add([BusyTime("prior", "b/1", 2.0, 2)], 8.0)
    assert report.to_json() == {
        "prior": {"images": 4, "workers": 2, "busy_seconds": 4.0, "images_per_second": 1.0, "utilisation": 0.25},
        "decoder": {"images": 2, "workers": 1, "busy_seconds": 1.0, "images_per_second": 2.0, "utilisation": 0.125},
    }
    assert report.lines()[0] == "prior: 4 images by 2 workers, 1.00 images/s each, busy 25% of 8 s"

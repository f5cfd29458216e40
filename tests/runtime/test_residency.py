"""When stages are loaded and freed: every memory policy, over whole generations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascadekit import Cascade
from cascadekit.runtime.memory.residency import MemoryPolicy, Residency
from cascadekit.runtime.sampling.controlnets import ControlPicture
from cascadekit.runtime.sampling.loop import Step
from cascadekit.schemas.errors import EngineError, UsageError
from cascadekit.schemas.stages import Stage
from helpers.whole import Loads, Whole, counted, picture

QUICK: dict[str, Any] = {"seed": 0, "width": 128, "height": 64, "prior_steps": 2, "decoder_steps": 2}
PATH = [Stage.TEXT_ENCODER, Stage.PRIOR, Stage.PRIOR, Stage.DECODER, Stage.VQGAN]  # the prior is in two graphs


@pytest.fixture
def opened(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function for a cascade with a memory policy, and what its engine loads."""

    def with_policy(memory: str) -> Any:
        return Cascade.open(whole.bundle, threads=1, memory=memory, stages={Stage.PRIOR: whole.lite})

    with counted(monkeypatch) as loads:
        yield with_policy, loads


Opened = tuple[Callable[[str], Cascade], Loads]


def test_resident_loads_each_once(opened: Opened) -> None:
    with opened[0]("resident") as cascade:
        for prompt in ("a", "b", "a"):
            cascade.generate(prompt, **QUICK)
        assert opened[1].loaded == PATH
        assert len(opened[1].alive) == 5
    assert not opened[1].alive


def test_staged_holds_one_at_a_time(opened: Opened) -> None:
    most = 0
    with opened[0]("staged") as cascade:

        def on_step(stage: Stage, step: Step) -> None:
            nonlocal most
            most = max(most, len(opened[1].alive))

        cascade.generate("a", on_step=on_step, **QUICK)
        assert opened[1].loaded == PATH
        assert most == 1
        assert len(opened[1].alive) == 1
        cascade.close()
        assert not opened[1].alive
        cascade.generate("a", **QUICK)  # known prompt: all but the text encoder are loaded again
        assert opened[1].loaded == [*PATH, *PATH[1:]]
    assert not opened[1].alive


def test_the_text_encoder_is_loaded_once_for_many_prompts(opened: Opened) -> None:
    """Prompts are known by their tokens; negatives count, repeated ones cost nothing."""
    with opened[0]("staged") as cascade:
        cascade.encode_prompt([f"prompt {number}" for number in range(40)], "no")
        assert opened[1].loaded == [Stage.TEXT_ENCODER]
        cascade.generate("a", negative="b", output="prior", **QUICK)  # neither known
        assert opened[1].loaded.count(Stage.TEXT_ENCODER) == 1  # it was still there
        for prompt, negative in (("prompt 7", "no"), ("a", "no"), ("b", "prompt 39"), ("PROMPT 3", "a")):
            cascade.generate(prompt, negative=negative, output="prior", **QUICK)
        assert opened[1].loaded.count(Stage.TEXT_ENCODER) == 1
        cascade.generate("c", output="prior", **QUICK)
        assert opened[1].loaded.count(Stage.TEXT_ENCODER) == 2


def test_embeddings_and_prior_alone_load_nothing_else(opened: Opened) -> None:
    with opened[0]("staged") as cascade:
        embeds = cascade.encode_prompt("a")
        opened[1].events.clear()
        cascade.residency.close()
        opened[1].events.clear()
        cascade.generate(embeds=embeds, output="prior", **QUICK)
        assert opened[1].loaded == [Stage.PRIOR, Stage.PRIOR]


def test_previews_while_a_stage_is_in_use(opened: Opened) -> None:
    """The previewer comes beside the prior, which must not go; it goes when the decoder comes."""
    seen: list[set[Stage]] = []

    def on_step(stage: Stage, step: Step) -> None:
        assert len(step.preview()) == 1
        seen.append({stage for stage, _ in opened[1].alive})

    with opened[0]("staged") as cascade:
        with_previews = cascade.generate("a", on_step=on_step, **QUICK)
        without = cascade.generate("a", **QUICK)
    assert seen == [{Stage.PRIOR, Stage.PREVIEWER}] * 2 + [{Stage.DECODER, Stage.VQGAN}] * 2
    assert opened[1].loaded.count(Stage.PREVIEWER) == 1
    assert with_previews.images[0].tobytes() == without.images[0].tobytes()


def test_pictures_and_controls_are_encoded_before_the_prior_is_loaded(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(128, 64)
    with counted(monkeypatch) as loads, Cascade.open(whole.bundle, threads=1, memory="staged") as cascade:
        controls = [ControlPicture("canny", image), ControlPicture("edges", image)]
        call: dict[str, Any] = {"image_prompts": [image], "init_image": image, "controls": controls}
        cascade.generate("a", on_step=lambda stage, step: _one(loads), **call, **QUICK)
        before = loads.loaded[: loads.loaded.index(Stage.PRIOR)]
        assert sorted(before) == sorted(
            [Stage.TEXT_ENCODER, Stage.EFFNET_ENCODER, Stage.IMAGE_ENCODER, Stage.CONTROLNET_CANNY]
        )


def _one(loads: Loads) -> None:
    assert len(loads.alive) == 1


def test_cancelled_and_failed_runs_leave_a_cascade_that_works(opened: Opened) -> None:
    with opened[0]("staged") as cascade:
        expected = cascade.generate("a", **QUICK).images[0].tobytes()

        def cancel(stage: Stage, step: Step) -> None:
            if stage is Stage.DECODER:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cascade.generate("a", on_step=cancel, **QUICK)
        embeds = cascade.encode_prompt("a")
        steps = cascade.prior(embeds, height=64, width=128, steps=5)
        next(steps)
        steps.close()  # one who leaves the loop
        assert not cascade.residency._in_use
        with pytest.raises(EngineError):
            cascade.pixels(embeds.clip_text)
        assert not cascade.residency._in_use
        assert cascade.generate("a", **QUICK).images[0].tobytes() == expected


class Runner:
    def __init__(self, key: object, closed: list[object]) -> None:
        self.key, self.closed = key, closed

    def close(self) -> None:
        self.closed.append(self.key)


class Counting:
    name, precision = "counting", None

    def __init__(self) -> None:
        self.loads: list[object] = []
        self.closed: list[object] = []

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return ("model",)

    def load(self, stage: Stage, graph: str = "model") -> Any:
        self.loads.append(stage)
        return Runner(stage, self.closed)


SIZES = {Stage.TEXT_ENCODER: 3, Stage.PRIOR: 7, Stage.DECODER: 4, Stage.VQGAN: 1, Stage.PREVIEWER: 2}


def residency(budget: int) -> tuple[Residency, Counting]:
    engine = Counting()
    return Residency(engine, MemoryPolicy("budget", budget), lambda stage, graph: SIZES[stage]), engine


def test_a_budget_frees_what_was_unused_for_longest() -> None:
    stages, engine = residency(10)
    for stage in (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.TEXT_ENCODER, Stage.DECODER):
        with stages.use(stage):
            pass
    assert engine.loads == [Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER]
    assert engine.closed == [Stage.PRIOR]  # 3 + 7 fit; for 4 more the prior goes, not the text encoder used since
    with stages.use(Stage.VQGAN), stages.use(Stage.PREVIEWER):
        pass
    assert engine.closed == [Stage.PRIOR]  # 3 + 4 + 1 + 2 fit exactly


def test_a_budget_that_is_too_small_still_runs() -> None:
    stages, engine = residency(5)
    with stages.use(Stage.PRIOR), stages.use(Stage.PREVIEWER):
        assert not engine.closed  # in use: over the budget rather than gone
    with stages.use(Stage.VQGAN):
        pass
    assert engine.closed == [Stage.PRIOR]
    with stages.use(Stage.PRIOR):
        assert engine.closed == [Stage.PRIOR, Stage.PREVIEWER, Stage.VQGAN]


def test_a_stage_used_twice_at_once_stays_until_both_are_done() -> None:
    stages, engine = residency(7)
    with stages.use(Stage.PRIOR):
        with stages.use(Stage.PRIOR):
            pass
        with stages.use(Stage.VQGAN):
            assert not engine.closed
    assert engine.loads == [Stage.PRIOR, Stage.VQGAN]


def test_a_budget_over_a_whole_generation(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as loads:
        with Cascade.open(tiny / "bundle", threads=1, memory="8GB") as cascade:
            cascade.generate("a", **QUICK)
            cascade.generate("b", **QUICK)
        assert loads.loaded == PATH
        with Cascade.open(tiny / "bundle", threads=1, memory="1MB") as cascade:
            cascade.generate("a", **QUICK)
            assert len(loads.alive) == 1


@pytest.mark.parametrize(
    ("text", "budget"), [("8GB", 8 << 30), ("8", 8 << 30), ("1.5 GiB", 3 << 29), ("500mb", 500 << 20)]
)
def test_budgets(text: str, budget: int) -> None:
    assert MemoryPolicy.parse(text).budget == budget


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "8TB", "8GBs", "1e3MB"])
def test_policies_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected auto, resident, staged, or a size"):
        MemoryPolicy.parse(text)

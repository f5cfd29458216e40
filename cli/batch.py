"""The part of `generate` that draws what a file of prompts says."""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import CascadeError, UsageError
from ..schemas.stages import Stage
from .console import FAILED, batch_progress, note, say
from .drawing import open_cascade, require_previewer, steps_shown, tell_memory, warn_of_cuts
from .signals import stoppable

if TYPE_CHECKING:
    from ..runtime.batch.jobs import Job, Plan
    from ..runtime.batch.log import Journal
    from ..runtime.batch.run import Outcome
    from ..runtime.cascade import Cascade
    from ..runtime.sampling.ddpm import Step

LOG_NAME = "log.jsonl"
SHOWN = 20  # problems, of what may be thousands
PIXEL_BYTES = 3  # what a PNG takes at most


@dataclass(frozen=True)
class Drawing:
    """How a file of prompts is drawn; the options of the same names."""

    prompt_file: Path
    output: Path
    name: str | None
    log: Path | None
    images: int
    batch: int | None
    preview_every: int | None
    force: bool
    keep_going: bool

    @property
    def log_path(self) -> Path:
        return self.log or self.output / LOG_NAME


def draw_batch(bundle: Path, engine: Mapping[str, Any], common: Mapping[str, Any], how: Drawing) -> None:
    """Draw the images of a file of prompts that are not there yet. `common` is what its lines leave unsaid.

    Exits with 1 when some could not be drawn."""
    from ..runtime.batch.log import Journal
    from ..runtime.batch.run import alone, conflicts

    with open_cascade(bundle, **engine) as cascade:
        require_previewer(cascade, how.preview_every)
        seed, plan = _plan(cascade, common, how)
        if plan.problems:
            _tell_problems(plan, keep_going=how.keep_going)
        _require_apart(plan.jobs, bundle, how)
        with alone(how.output), Journal(how.log_path) as journal:
            if not how.force and (others := conflicts(plan.jobs)):
                todo = "move them away, choose another -o or --name, or replace what is there with --force"
                raise UsageError(_listed(f"{len(others)} files are in the way; {todo}", others))
            started = {"prompts": str(how.prompt_file), "bundle": str(bundle), "images": len(plan.jobs)}
            journal.write("started", {**started, "base_seed": seed, **_used(cascade, common)})
            journal.write("failed", *({"error": problem} for problem in plan.problems))
            _tell_needs(cascade, plan.jobs, how)
            failed = _draw(cascade, plan.jobs, journal, how) + len(plan.problems)
    if failed:
        click.get_current_context().exit(FAILED)


def _plan(cascade: "Cascade", common: Mapping[str, Any], how: Drawing) -> tuple[int, "Plan"]:
    """The base seed, the one a former run chose when none is given, and the jobs."""
    from ..runtime.batch.file_names import DEFAULT_NAME, NameTemplate
    from ..runtime.batch.jobs import Planner
    from ..runtime.batch.prompt_files import read_prompt_file
    from ..runtime.batch.run import last_seed

    if how.output.suffix.lower() == ".png":
        raise UsageError(f"{how.output}: expected a folder for the images of {how.prompt_file}")
    template = NameTemplate.parse(how.name or DEFAULT_NAME)
    file = read_prompt_file(how.prompt_file)
    shared = {name: value for name, value in common.items() if name not in ("seed", "index", "batch")}
    seed = common.get("seed", last_seed(how.log_path))
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    return seed, Planner(cascade.manifest, how.output, template, seed, how.images, shared).plan(file)


def _tell_problems(plan: "Plan", *, keep_going: bool) -> None:
    if not keep_going:
        todo = "nothing was drawn; mend them, or draw the others with --keep-going"
        raise UsageError(_listed(f"{len(plan.problems)} wrong in the file of prompts; {todo}", plan.problems))
    for problem in plan.problems:
        note(f"left out: {problem}")


def _require_apart(jobs: "Sequence[Job]", bundle: Path, how: Drawing) -> None:
    """Raise UsageError when an image, a preview or the log would replace what the images are made from."""
    from ..runtime.batch.jobs import pictures_of
    from ..runtime.images.png import require_free_previews
    from ..storage.output_rules import require_apart, require_none_is

    sources: list[str | Path] = [how.prompt_file, *pictures_of(job.request for job in jobs)]
    require_none_is([how.log_path, *(job.path for job in jobs)], sources)
    for example in {job.path.parent: job.path for job in jobs}.values():
        require_apart(example, [bundle])
    require_apart(how.log_path, [bundle])
    if how.preview_every:
        require_free_previews(job.path for job in jobs)


def _listed(text: str, lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([f"{text}:", *lines[:SHOWN], *more])


def _used(cascade: "Cascade", common: Mapping[str, Any]) -> dict[str, Any]:
    """For the log: what was drawn with."""
    from ..runtime.batch.jobs import bundle_identity

    return {
        "settings": dict(common),
        "stages": bundle_identity(cascade.manifest),
        "engine": cascade.engine.name,
        "created_by": cascade.manifest.created_by,
    }


def _draw(cascade: "Cascade", jobs: "Sequence[Job]", journal: "Journal", how: Drawing) -> int:
    """Draw and tell; how many failed."""
    from ..runtime.batch.run import Runner
    from ..runtime.images.png import remove_preview

    count = {"drawn": 0, "copied": 0, "skipped": 0, "failed": 0}
    paths: list[Path] = []  # of the images in work
    with stoppable() as stop, batch_progress(len(jobs)) as bars:

        def on_step(group: "Sequence[Job]", stage: Stage, step: "Step") -> None:
            paths[:] = [job.path for job in group]
            steps_shown(bars.step, paths, how.preview_every)(stage, step)
            stop()

        runner = Runner(cascade, journal, how.batch, how.force, on_step, stop)
        try:
            for outcome in runner.run(jobs):
                count[outcome.kind] += 1
                bars.image(sum(count.values()))
                if line := _line(outcome):
                    bars.say(f"[{sum(count.values())}/{len(jobs)}] {line}")
                if how.preview_every:
                    remove_preview(outcome.job.path)
        except BaseException as error:
            with suppress(CascadeError):
                journal.write("stopped", {**count, "reason": str(error) or type(error).__name__})
            raise
        finally:
            for path in paths if how.preview_every else ():
                remove_preview(path)
    journal.write("finished", count)
    say(", ".join(f"{number} {kind}" for kind, number in count.items() if number) + f"; log: {how.log_path}")
    return count["failed"]


def _line(outcome: "Outcome") -> str | None:
    """What to say of it; None of what was there before."""
    job = outcome.job
    if outcome.kind == "skipped":
        return None
    if outcome.kind == "failed":
        return f"failed: line {job.line}: {outcome.error}"
    size = f"{job.request.settings.width}x{job.request.settings.height}"
    copied = f", the same as line {outcome.of.line}" if outcome.of else ""
    return f"wrote {job.path} ({size}, seed {job.request.seed}{copied})"


def _tell_needs(cascade: "Cascade", jobs: "Sequence[Job]", how: Drawing) -> None:
    """Say what is cut off, how much memory will be taken, and so when the disk may become full: images are mostly
    smaller than their pixels."""
    from ..runtime.batch.run import images_together

    left = [job.request for job in jobs if how.force or not job.path.exists()]
    if not left:
        return
    warn_of_cuts(left, cascade)
    sizes = [request.settings for request in left]
    tell_memory(left, cascade, how.batch or min(map(images_together, sizes)))
    needed = sum(PIXEL_BYTES * size.width * size.height for size in sizes)
    free = shutil.disk_usage(how.output).free
    if needed > free:
        text = f"up to {needed / 1e9:.1f} GB are needed for {len(left)} images, {free / 1e9:.1f} GB are free"
        note(f"{how.output}: {text}")

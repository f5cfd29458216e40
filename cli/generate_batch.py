"""The part of `generate` that reads a file of prompts (`--prompts`)."""

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
from .generate_common import note_cut_prompts, note_memory, open_cascade, require_previewer, steps_shown
from .signals import stoppable
from .translate import in_options

if TYPE_CHECKING:
    from ..runtime.batch.image_jobs import Job, Plan
    from ..runtime.batch.log import Journal
    from ..runtime.batch.run import Outcome
    from ..runtime.cascade import Cascade
    from ..runtime.sampling.loop import Step

LOG_NAME = "log.jsonl"
SHOWN = 20  # problems; there may be thousands
PIXEL_BYTES = 3  # what a PNG takes at most


@dataclass(frozen=True)
class BatchOptions:
    """The options of `generate` that concern a file of prompts."""

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


def generate_batch(bundle: Path, engine: Mapping[str, Any], common: Mapping[str, Any], how: BatchOptions) -> None:
    """Generate the images of a file of prompts that do not exist yet.

    `common` has the fields that lines of the file leave out. The command ends with exit code 1 when an image failed."""
    from ..runtime.batch.log import Journal
    from ..runtime.batch.run import alone, conflicts

    with open_cascade(bundle, **engine) as cascade:
        require_previewer(cascade, how.preview_every)
        seed, plan = _plan(cascade, common, how)
        if plan.problems:
            _report_problems(plan, keep_going=how.keep_going)
        _require_apart(plan.jobs, bundle, how)
        with alone(how.output), Journal(how.log_path) as journal:
            if not how.force and (others := conflicts(plan.jobs)):
                todo = "move them away, choose another -o or --name, or replace what is there with --force"
                raise UsageError(_listed(f"{len(others)} files are in the way; {todo}", others))
            started = {"prompts": str(how.prompt_file), "bundle": str(bundle), "images": len(plan.jobs)}
            journal.write("started", {**started, "base_seed": seed, **_used(cascade, common)})
            journal.write("failed", *({"error": problem} for problem in plan.problems))
            _note_needs(cascade, plan.jobs, how)
            failed = _generate(cascade, plan.jobs, journal, how) + len(plan.problems)
    if failed:
        click.get_current_context().exit(FAILED)


def _plan(cascade: "Cascade", common: Mapping[str, Any], how: BatchOptions) -> tuple[int, "Plan"]:
    """The base seed and the jobs. Without a seed in `common`, the seed of an earlier run in the log is used."""
    from ..runtime.batch.file_names import DEFAULT_NAME, NameTemplate
    from ..runtime.batch.image_jobs import Planner
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


def _report_problems(plan: "Plan", *, keep_going: bool) -> None:
    if not keep_going:
        todo = "nothing was generated; correct the lines, or generate the others with --keep-going"
        raise UsageError(_listed(f"{len(plan.problems)} wrong lines in the file of prompts; {todo}", plan.problems))
    for problem in plan.problems:
        note(f"left out: {problem}")


def _require_apart(jobs: "Sequence[Job]", bundle: Path, how: BatchOptions) -> None:
    """Raise UsageError when an image, a preview or the log would replace a source of the images."""
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
    """Settings, weights, engine and version that the images are generated with, for the log."""
    from ..runtime.batch.jobs import bundle_identity

    return {
        "settings": dict(common),
        "stages": bundle_identity(cascade.manifest),
        "engine": cascade.engine.name,
        "created_by": cascade.manifest.created_by,
    }


def _generate(cascade: "Cascade", jobs: "Sequence[Job]", journal: "Journal", how: BatchOptions) -> int:
    """Generate all jobs and print a line for each. Returns the number of jobs that failed."""
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
    """The line to print about an outcome; None for an image that existed before."""
    job = outcome.job
    if outcome.kind == "skipped":
        return None
    if outcome.kind == "failed":
        return f"failed: line {job.line}: {in_options(str(outcome.error))}"
    size = f"{job.request.settings.width}x{job.request.settings.height}"
    copied = f", the same as line {outcome.of.line}" if outcome.of else ""
    return f"wrote {job.path} ({size}, seed {job.request.seed}{copied})"


def _note_needs(cascade: "Cascade", jobs: "Sequence[Job]", how: BatchOptions) -> None:
    """Note prompts that are cut off, the memory that will be needed, and a disk that may become full."""
    from ..runtime.batch.run import images_together

    left = [job.request for job in jobs if how.force or not job.path.exists()]
    if not left:
        return
    note_cut_prompts(left, cascade)
    sizes = [request.settings for request in left]
    note_memory(left, cascade, how.batch or min(map(images_together, sizes)))
    needed = sum(PIXEL_BYTES * size.width * size.height for size in sizes)
    free = shutil.disk_usage(how.output).free
    if needed > free:
        text = f"up to {needed / 1e9:.1f} GB are needed for {len(left)} images, {free / 1e9:.1f} GB are free"
        note(f"{how.output}: {text}")

"""The part of `generate` that generates the images of a file of prompts (`--prompts`)."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..runtime.batch.batch_runner import Outcome
from ..runtime.batch.generate_batch import BatchObserver, BatchSettings, draft_batch, generate_batch
from ..runtime.batch.generate_requests import images_together
from ..runtime.batch.image_files import with_previews
from ..runtime.batch.image_jobs import BatchPlan, ImageJob
from ..runtime.images.png import remove_preview
from ..schemas.callbacks import ignored
from ..schemas.messages import shown_bytes
from ..schemas.stages import Stage
from ..storage.bucket import BucketPath
from .console import FAILED, detail, finish, note, say
from .generate_common import manifest_of, note_cut_prompts, note_memory, open_cascade, require_previewer
from .progress import batch_progress
from .signals import stoppable
from .translate import in_options

if TYPE_CHECKING:
    from ..runtime.cascade import Cascade

PIXEL_BYTES = 3  # the most that one pixel takes in a PNG


def generate_prompt_file(
    engine: Mapping[str, Any],
    settings: BatchSettings,
    defaults: Mapping[str, Any],
    *,
    as_json: bool,
    ray: str | None,
    actors: Sequence[str],
) -> None:
    """Generate the images of a file of prompts that do not exist yet, and print a line for each, or JSON at the end.

    `defaults` has the fields that lines of the file leave out. `ray` is a cluster that generates them, with `actors`.
    The command ends with exit code 1 when an image failed or a line was left out."""
    assert settings.bundle is not None
    manifest = manifest_of(settings.bundle, engine)
    require_previewer(manifest, settings.preview_every)
    draft = draft_batch(manifest, settings, defaults)
    with ExitStack() as stack:
        shown = _Shown(settings, stack, as_json=as_json)
        if ray:
            from .generate_on_ray import on_ray

            counts, more = on_ray(draft, settings, engine, defaults, address=ray, actors=actors, observer=shown)
        else:
            cascade = stack.enter_context(open_cascade(settings.bundle, **engine))
            shown.notes = lambda jobs: _note_needs(cascade, jobs, settings)
            counts = generate_batch(cascade, settings, defaults, shown, draft=draft)
            detail(cascade.timings.line())
            more = {"timings": cascade.timings.to_json()}
    kinds = {name: number for name, number in asdict(counts).items() if number and name != "left_out"}
    line = ", ".join(f"{number} {kind}" for kind, number in kinds.items()) + f"; log: {settings.log_path}"
    facts = {**asdict(counts), "log": str(settings.log_path), "images": [each.to_json() for each in shown.outcomes]}
    finish(line, {**facts, **more}, as_json=as_json)
    if counts.failed or counts.left_out:
        click.get_current_context().exit(FAILED)


class _Shown(BatchObserver):
    """Shows a batch on the terminal, and previews beside the images in work. `stack` ends both.

    `notes` is called with the jobs of images that are not there yet."""

    notes: Callable[[Sequence[ImageJob]], object] = ignored

    def __init__(self, settings: BatchSettings, stack: ExitStack, *, as_json: bool) -> None:
        self.outcomes: list[Outcome] = []
        self._prints = not as_json
        self._settings = settings
        self._stack = stack
        self._in_work: list[Path] = []
        self._done = self._total = 0

    def planned(self, plan: BatchPlan) -> None:
        for problem in plan.problems:
            note(f"left out: {problem}")
        in_bucket = isinstance(self._settings.output, BucketPath)  # asking it for each image would take long
        if left := [job for job in plan.jobs if in_bucket or self._settings.force or not job.path.exists()]:
            self.notes(left)
            if not in_bucket:
                _note_disk(left, self._settings)
        self._total = len(plan.jobs)
        self._stack.callback(self._remove_previews)
        self._stop = self._stack.enter_context(stoppable())
        self._bars = self._stack.enter_context(batch_progress(self._total))

    def step(self, jobs: Sequence[ImageJob], stage: Stage, step: Any) -> None:
        self._in_work[:] = [job.path for job in jobs]
        with_previews(self._bars.step, self._in_work, self._settings.preview_every)(stage, step)
        self.check()

    def check(self) -> None:
        self._stop()

    def finished(self, outcome: Outcome) -> None:
        self._done += 1
        self._bars.image(self._done)
        self.outcomes.append(outcome)
        if self._prints and (line := _line(outcome)):
            say(f"[{self._done}/{self._total}] {line}")
        if self._settings.preview_every:
            remove_preview(outcome.job.path)

    def _remove_previews(self) -> None:
        for path in self._in_work if self._settings.preview_every else ():
            remove_preview(path)


def _line(outcome: Outcome) -> str | None:
    """The line to print about an outcome; None for an image that existed before."""
    job = outcome.job
    if outcome.kind == "skipped":
        return None
    if outcome.kind == "failed":
        return f"failed: line {job.line}: {in_options(str(outcome.error))}"
    size = f"{job.request.settings.width}x{job.request.settings.height}"
    copied = f", the same as line {outcome.source.line}" if outcome.source else ""
    took = f", {sum(outcome.seconds.values()) / outcome.together:.1f} s" if outcome.seconds else ""
    return f"wrote {job.path} ({size}, seed {job.request.seed}{took}{copied})"


def _note_needs(cascade: "Cascade", jobs: Sequence[ImageJob], settings: BatchSettings) -> None:
    """Note prompts that are cut off, and the memory that will be needed."""
    requests = [job.request for job in jobs]
    note_cut_prompts(requests, cascade.tokenizer)
    together = settings.batch or min(images_together(request.settings) for request in requests)
    note_memory(requests, cascade, together, previews=bool(settings.preview_every))


def _note_disk(jobs: Sequence[ImageJob], settings: BatchSettings) -> None:
    """Note a disk that may become full. The estimate is an upper bound: most images are smaller than their pixels."""
    sizes = [job.request.settings for job in jobs]
    needed = sum(PIXEL_BYTES * size.width * size.height for size in sizes)
    free = shutil.disk_usage(settings.output).free
    if needed > free:
        text = f"up to {shown_bytes(needed)} are needed for {len(jobs)} images, {shown_bytes(free)} are free"
        note(f"{settings.output}: {text}")

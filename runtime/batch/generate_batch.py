"""Generates all images of a file of prompts; a second run generates only the images that are not finished."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.errors import CascadeError, UsageError
from ...schemas.manifest import Manifest
from ...schemas.messages import listed_below
from ...schemas.request import parse_request
from ...schemas.stages import Stage
from ...storage.bucket import BucketPath, on_disk
from ...storage.output_rules import require_apart, require_none_is, require_writable
from ..cascade import Cascade
from ..images.photo import FORMATS, OTHERS
from ..images.png import Sign, require_free_previews
from .batch_log import open_log
from .batch_runner import BatchRunner, GenerateGroups, Outcome, foreign_files, last_seed, locked_folder
from .file_names import DEFAULT_NAME, NameTemplate
from .image_jobs import BatchPlan, BatchPlanner, ImageJob, bundle_identity, output_states
from .local_groups import LocalGroups
from .picture_hashes import pictures_of
from .prompt_files import PromptFile, read_prompt_file

LOG_NAME = "log.jsonl"
SHOWN = 20  # problems that a message lists
UNSHARED = ("seed", "index", "batch")  # fields of a request that differ between the images of a batch


@dataclass(frozen=True)
class BatchSettings:
    """The settings of a batch. Its fields are the options of `cascadekit generate`.

    `prompt_file` ends in .txt, .jsonl or .csv; "-" is standard input. `output` is a folder, or one in a bucket, a
    `BucketPath`. `name` is the template of the images' names (see `NameTemplate`). `log` is a file of JSON lines (None:
    log.jsonl in `output`). `images` is the number of images of each prompt that gives no number. `batch` images are
    computed together (None: as many as 4 of 1024x1024). `preview_every` is the number of steps between previews, which
    the observer writes. `force` replaces finished images and other files. `keep_going` generates the good entries of a
    file that has bad ones. `sign` signs each file, see `images.provenance`. `bundle` is the folder of the cascade's
    bundle: the log names it, and nothing is written into it."""

    prompt_file: Path
    output: Path
    name: str | None = None
    log: Path | None = None
    images: int = 1
    batch: int | None = None
    preview_every: int | None = None
    force: bool = False
    keep_going: bool = False
    sign: Sign | None = None
    bundle: Path | None = None

    @property
    def log_path(self) -> Path:
        return self.log or self.output / LOG_NAME


@dataclass(frozen=True)
class BatchCounts:
    """The number of images that ended in each way, and of bad entries that `keep_going` left out."""

    generated: int
    copied: int
    skipped: int
    failed: int
    left_out: int


@dataclass(frozen=True)
class BatchDraft:
    """A batch as `draft_batch` plans it: the file, the seed of its first entry, and the jobs with `manifest`."""

    file: PromptFile
    seed: int
    manifest: Manifest
    plan: BatchPlan


class BatchObserver:
    """Follows a batch: its methods are called as the batch proceeds. They do nothing; override those of interest.

    `step` and `check` may raise an exception to stop the batch, other than CascadeError, OSError and MemoryError."""

    def planned(self, plan: BatchPlan) -> None:
        """Called once, before the first image. `plan.problems` are the entries that are left out."""

    def step(self, jobs: Sequence[ImageJob], stage: Stage, step: Any) -> None:
        """Called after each step of sampling (a `Step`) of the images of `jobs`, which are computed together."""

    def check(self) -> None:
        """Called wherever the batch can stop without losing finished work."""

    def finished(self, outcome: Outcome) -> None:
        """Called when an image is on disk and in the log, or has failed."""


def generate_batch(
    cascade: Cascade,
    settings: BatchSettings,
    defaults: Mapping[str, Any] | None = None,
    observer: BatchObserver | None = None,
    *,
    draft: BatchDraft | None = None,
) -> BatchCounts:
    """Generate the images of a file of prompts that are not there yet, and count how each of them ended.

    `defaults` are fields of a request, such as "prior_steps" or "seed", for the entries that leave them out. Without a
    seed, the seed of the last batch in the same log is used, else a random one. A job that fails is counted and does
    not stop the others. `draft` is that of `draft_batch` for the same settings and defaults, if it was called before.

    Raises UsageError before anything is generated: for wrong entries (unless `keep_going`), for files in the way
    (unless `force`), and for outputs that would replace an input. Raises CascadeError when an image or the log cannot
    be written.

    Example: `generate_batch(cascade, BatchSettings(Path("prompts.txt"), Path("images")), {"prior_steps": 10})`"""
    given = dict(defaults or {})
    observer = observer or BatchObserver()
    if draft is None:
        draft = draft_batch(cascade.manifest, settings, given)
    elif draft.manifest != cascade.manifest:  # LoRAs were merged since, which the keys of images tell
        draft = _drafted(cascade.manifest, settings, given, draft.file, draft.seed)
    groups = LocalGroups(cascade, settings.batch, settings.sign, observer.step, observer.check)
    return run_batch(draft, settings, groups, {"settings": given, "engine": cascade.engine.name}, observer=observer)


def run_batch(
    draft: BatchDraft,
    settings: BatchSettings,
    generate: GenerateGroups,
    started: Mapping[str, Any],
    *,
    observer: BatchObserver,
    ended: Callable[[], Mapping[str, Any]] = dict,
) -> BatchCounts:
    """Take the images of `draft` from `generate`, wherever it computes them, and keep them as `generate_batch` does.

    `started` and `ended` are further fields of the log's first and last line. Raises what `generate_batch` raises."""
    plan, manifest = draft.plan, draft.manifest
    with locked_folder(settings.output), open_log(settings.log_path) as log:
        states = [] if settings.force else output_states(plan.jobs)
        if not settings.force and (others := foreign_files(plan.jobs, states)):
            todo = "move them away, choose another output or name, or replace what is there with force=True"
            raise UsageError(f"{len(others)} files are in the way; {todo}:{listed_below(others, SHOWN)}")
        begun = {"prompts": str(settings.prompt_file), "bundle": str(settings.bundle), "images": len(plan.jobs)}
        made_with = {"stages": bundle_identity(manifest), "created_by": manifest.created_by}
        log.write("started", {**begun, "base_seed": draft.seed, **made_with, **started})
        log.write("failed", *({"error": problem} for problem in plan.problems))
        observer.planned(plan)
        counts = {"generated": 0, "copied": 0, "skipped": 0, "failed": 0}
        try:
            for outcome in BatchRunner(generate, log, settings.force).run(plan.jobs, states):
                counts[outcome.kind] += 1
                observer.finished(outcome)
        except BaseException as error:
            with suppress(CascadeError):
                log.write("stopped", {**counts, **ended(), "reason": str(error) or type(error).__name__})
            raise
        log.write("finished", {**counts, **ended()})
    return BatchCounts(**counts, left_out=len(plan.problems))


def draft_batch(manifest: Manifest, settings: BatchSettings, defaults: Mapping[str, Any]) -> BatchDraft:
    """Read the file of prompts and plan its images, before a cascade with this manifest is opened.

    Raises UsageError for wrong entries (unless `keep_going`), and for an output that would replace an input or cannot
    be written."""
    _require_folder(settings.output)
    NameTemplate.parse(settings.name or DEFAULT_NAME)
    parse_request({"prompt": "", "seed": 0, **defaults}, manifest.default_size)
    file = read_prompt_file(settings.prompt_file)
    seed = defaults.get("seed", last_seed(settings.log_path))
    return _drafted(manifest, settings, defaults, file, secrets.randbelow(1 << 32) if seed is None else seed)


def _require_folder(output: Path) -> None:
    if isinstance(output, BucketPath):
        output.names()  # raises without keys, bucket or store
        return
    if output.suffix.lower() in (".png", *FORMATS, *OTHERS) and not output.is_dir():
        raise UsageError(f"{output}: expected a folder for the images; choose another output")
    require_writable(output)


def _drafted(
    manifest: Manifest, settings: BatchSettings, defaults: Mapping[str, Any], file: PromptFile, seed: int
) -> BatchDraft:
    """The jobs of the file, whose first entry has `seed`."""
    template = NameTemplate.parse(settings.name or DEFAULT_NAME)
    common = {name: value for name, value in defaults.items() if name not in UNSHARED}
    planner = BatchPlanner(manifest, settings.output, template, base_seed=seed, images=settings.images, common=common)
    plan = planner.plan(file)
    if plan.problems and not settings.keep_going:
        todo = "nothing was generated; correct the lines, or generate the others with keep_going=True"
        raise UsageError(
            f"wrong lines in the file of prompts: {len(plan.problems)}; {todo}:{listed_below(plan.problems, SHOWN)}"
        )
    _require_outputs_apart(plan.jobs, settings)
    return BatchDraft(file, seed, manifest, plan)


def _require_outputs_apart(jobs: Sequence[ImageJob], settings: BatchSettings) -> None:
    """Raise UsageError when an image, a preview or the log would replace an input of the batch."""
    sources: list[str | Path] = [settings.prompt_file, *pictures_of(job.request for job in jobs)]
    images, log = [job.path for job in jobs], settings.log_path
    require_none_is(on_disk([log, *images]), sources)
    if settings.bundle is not None:
        for path in on_disk([*{path.parent: path for path in images}.values(), log]):
            require_apart(path, [settings.bundle])
    if settings.preview_every:
        if isinstance(settings.output, BucketPath):
            raise UsageError("preview_every: previews are not put into a bucket; leave it out")
        require_free_previews(job.path for job in jobs)

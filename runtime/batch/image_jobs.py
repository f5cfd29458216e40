"""Turns a file of prompts into jobs, one for each image. A job's key identifies its finished image.

The number, the seed and the name of a job depend on its place among all entries of the file, bad ones included. After a
bad entry is corrected, all other jobs are the same as before.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_IMAGES
from ...schemas.manifest import ENCODER_GRAPH, Manifest
from ...schemas.request import Request, parse_request
from ...schemas.stages import EVERY_IMAGE, Stage
from ...storage.bucket import BucketPath
from ..generate_inputs import check_settings
from ..images.png_text import BEGINS, read_png_text
from ..sampling.controlnets import INPAINTING, require_control
from ..text.prompt_weights import check_length, parse_weights
from .file_names import NameTemplate
from .picture_hashes import PICTURE_FIELDS, with_hashes
from .prompt_files import PromptEntry, PromptFile

KEY = "key"  # in an image's metadata
ASKED_TOGETHER = 32  # files of a bucket
MAX_DIGITS = 20  # of a count of images; Python refuses to read numbers of thousands


@dataclass(frozen=True)
class ImageJob:
    """One image of a batch: its number, from 0, and its line in the file."""

    number: int
    line: int
    request: Request  # its pictures have their SHA-256, and paths that need no folder
    key: str
    path: Path


@dataclass(frozen=True)
class BatchPlan:
    """The jobs of all good entries, and one message for each bad entry, which names the file and the line."""

    jobs: tuple[ImageJob, ...]
    problems: tuple[str, ...]


class OutputState(StrEnum):
    """The state of the file at the path of a job's image."""

    NOTHING = "nothing"
    DONE = "the image"
    DAMAGED = "a damaged image"
    OTHER = "another file"


@dataclass(frozen=True)
class BatchPlanner:
    """Turns entries into jobs. `common` are fields of a request that an entry may override. `images` is the number of
    images of an entry. `base_seed` is the seed of entry 0; the seeds of later entries count on from it."""

    manifest: Manifest
    output: Path
    template: NameTemplate
    base_seed: int
    images: int = 1
    common: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, file: PromptFile) -> BatchPlan:
        """The jobs of `file`. All entries are checked for everything that can be known before images are generated.

        Raises UsageError for more images than `MAX_IMAGES`."""
        self._require_number(file)
        jobs: list[ImageJob] = []
        problems: list[str] = []
        number = 0
        for place, entry in enumerate(file.entries):
            count = 1
            try:
                count = self._count(entry)
                jobs += self._jobs(entry, file.folder, place, number, count)
            except UsageError as error:
                problems.append(f"{file.name}:{entry.line}: {error}")
            number += count
        kept, clashes = _without_clashes(jobs, file.name)
        return BatchPlan(tuple(kept), (*problems, *clashes))

    def _require_number(self, file: PromptFile) -> None:
        """Raise UsageError if the good entries ask for more than MAX_IMAGES images."""
        total = 0
        for entry in file.entries:
            with suppress(UsageError):  # reported with the entry
                total += self._count(entry)
        if total > MAX_IMAGES:
            raise UsageError(
                f"{file.name}: {total} images: expected at most {MAX_IMAGES}; divide it into several files"
            )

    def _count(self, entry: PromptEntry) -> int:
        if entry.problem:
            raise UsageError(entry.problem)
        text = str(entry.given.get("images", self.images))
        if not text.isdecimal() or len(text) > MAX_DIGITS or not 1 <= int(text) <= MAX_IMAGES:
            raise UsageError(f"images: {text!r}: expected a number from 1 to {MAX_IMAGES}")
        return int(text)

    def _jobs(self, entry: PromptEntry, folder: Path, place: int, number: int, count: int) -> list[ImageJob]:
        fields = {name: value for name, value in entry.given.items() if name not in ("images", "name")}
        if "loras" in fields:
            raise UsageError("loras: all images of a batch share them; give them once for all lines, as loras=...")
        if count > 1 and fields.keys() & {"index", "batch"}:
            raise UsageError("index and batch describe one image; leave out images, or leave out both")
        given = {"seed": self.base_seed + place, **self.common, **fields}
        first = with_hashes(parse_request(given, self.manifest.default_size), folder, fields.keys())
        check_request(first, self.manifest)
        places = [{}] if count == 1 else [{"index": index, "batch": count} for index in range(count)]
        requests = [first.model_copy(update=changes) for changes in places]
        return [
            self._job(entry, request, number + index, f"-{index}" if count > 1 else "")
            for index, request in enumerate(requests)
        ]

    def _job(self, entry: PromptEntry, request: Request, number: int, suffix: str) -> ImageJob:
        key = content_key(request, self.manifest)
        name = entry.given.get("name")
        values = {
            "number": number,
            "seed": request.seed,
            "prompt": request.prompt,
            "width": request.settings.width,
            "height": request.settings.height,
            "name": f"{number:04d}" if name is None else f"{name}{suffix}",
            "key": key,
        }
        return ImageJob(number, entry.line, request, key, self.output / self.template.path(values))


def check_request(request: Request, manifest: Manifest) -> None:
    """Raise UsageError for a size, schedule, prompt or stage that `generate` would refuse."""
    chosen = request.settings
    check_settings(chosen, varies=request.init_image is not None)
    if request.batch > MAX_IMAGES:
        raise UsageError(f"batch {request.batch:.4g}: expected at most {MAX_IMAGES}")
    for text in (request.prompt, request.negative):
        (parse_weights if chosen.weighted else check_length)(text)
    inpaints = any(control.name == INPAINTING for control in request.controls)
    if request.mask and not request.init_image and not inpaints:
        raise UsageError("the mask needs a picture; give init_image=..., or the control inpainting with its picture")
    missing = [stage for stage in used_stages(request, manifest) if stage not in manifest.stages]
    if missing:
        raise UsageError(f"the bundle has no {', '.join(missing)}; export the model with it")
    if request.mask and request.init_image and ENCODER_GRAPH not in manifest.stages[Stage.VQGAN].graphs:
        raise UsageError("mask: the bundle's vqgan has no encoder; export the vqgan again from weights that have one")


def used_stages(request: Request, manifest: Manifest) -> tuple[Stage, ...]:
    """The stages that the image goes through. Raises UsageError for a control that the bundle cannot run."""
    used = [*EVERY_IMAGE]
    used += [Stage.IMAGE_ENCODER] if request.image_prompts else []
    used += [Stage.EFFNET_ENCODER] if request.init_image else []
    used += [stage for control in request.controls for stage in require_control(manifest, control.name)]
    return tuple(dict.fromkeys(used))


def content_key(request: Request, manifest: Manifest) -> str:
    """The key of an image: a SHA-256, in hexadecimal, of the request, its pictures and the stages it goes through.

    Pictures count by their SHA-256, stages by their fingerprints with LoRAs merged in. File names and the engine are
    not part of the key.

    Raises UsageError for numbers that are not finite."""
    fields = {name: value for name, value in request.to_json().items() if name != "loras"}
    for name in PICTURE_FIELDS:
        if name in fields:
            refs = [fields[name]] if isinstance(fields[name], Mapping) else fields[name]
            fields[name] = [{key: value for key, value in ref.items() if key != "path"} for ref in refs]
    stages = {str(stage): _fingerprints(manifest, stage) for stage in used_stages(request, manifest)}
    try:
        text = json.dumps([fields, stages], sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise UsageError("settings: expected finite numbers, found NaN or infinity") from error
    return hashlib.sha256(text.encode()).hexdigest()


def bundle_identity(manifest: Manifest) -> dict[str, str]:
    """One digest of the files of each stage, by which the log identifies the bundle."""
    digests = {stage: hashlib.sha256("".join(_fingerprints(manifest, stage)).encode()) for stage in manifest.stages}
    return {str(stage): digest.hexdigest() for stage, digest in digests.items()}


def output_state(job: ImageJob) -> OutputState:
    """The state of the file at the job's path. Only its metadata and its end are read, not its pixels."""
    try:
        with job.path.open("rb") as file:
            begins = file.read(len(BEGINS))
    except FileNotFoundError:
        return OutputState.NOTHING
    except OSError:
        return OutputState.OTHER
    if any(begins) and not BEGINS.startswith(begins):
        return OutputState.OTHER
    try:
        png = read_png_text(job.path)
        settings = png.settings()
    except OSError:  # a file that cannot be read may be whole
        return OutputState.OTHER
    except ValueError:
        return OutputState.DAMAGED
    if not png.whole:
        return OutputState.DAMAGED
    return OutputState.DONE if settings and settings.get(KEY) == job.key else OutputState.OTHER


def output_states(jobs: Sequence[ImageJob]) -> list[OutputState]:
    """The state of the file of each job. A bucket is listed first, and then asked for many files at a time.

    Raises CascadeError when a bucket does not answer."""
    buckets = [folder for folder in {job.path.parent for job in jobs} if isinstance(folder, BucketPath)]
    if not buckets:
        return [output_state(job) for job in jobs]
    there = {name for folder in buckets for name in folder.names()}

    def state(job: ImageJob) -> OutputState:
        assert isinstance(job.path, BucketPath)
        return output_state(job) if job.path.key in there else OutputState.NOTHING

    with ThreadPoolExecutor(ASKED_TOGETHER) as pool:
        return list(pool.map(state, jobs))


def _fingerprints(manifest: Manifest, stage: Stage) -> list[str]:
    entry = manifest.stages.get(stage)
    return sorted(file.fingerprint for file in entry.files) if entry else []


def _without_clashes(jobs: Sequence[ImageJob], file: str) -> tuple[list[ImageJob], list[str]]:
    """The first job of each file name, and a message for each other job.

    Names that differ in capitals alone count as one, as on some file systems."""
    firsts: dict[str, ImageJob] = {}
    problems = []
    for job in jobs:
        first = firsts.setdefault(str(job.path).casefold(), job)
        if first is not job:
            problems.append(
                f"{file}:{job.line}: {job.path.name}: also the name for line {first.line}; put {{number}} into name=..."
            )
    return list(firsts.values()), problems

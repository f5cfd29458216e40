"""From a file of prompts to jobs: one for each image, with the key that tells a finished image from all others.

A job's number, its seed and its name depend on its place among the entries of the file, bad ones included, so that the
same file leads to the same jobs after a bad entry was mended.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...schemas.bundle import Manifest
from ...schemas.errors import UsageError
from ...schemas.limits import MAX_IMAGES
from ...schemas.request import Request, parse_request
from ...schemas.sizes import latent_sizes
from ...schemas.stages import Stage
from ...storage.file_hashes import sha256_unless_changed
from ..images.png import read_settings
from ..sampling.controlnets import INPAINTING, require_control
from ..sampling.samplers import check_schedules
from ..text.prompts import check_length, parse_weights
from .file_names import NameTemplate
from .prompt_files import Entry, PromptFile

KEY = "key"  # in an image's metadata
PICTURES = ("image_prompts", "init_image", "mask", "controls")

MAX_DIGITS = 20  # of a count of images; Python refuses to read numbers of thousands

PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Job:
    """One image: number `number` of the batch, from 0, said on line `line` of the file."""

    number: int
    line: int
    request: Request  # its pictures with their SHA-256, their paths usable as they are
    key: str
    path: Path


@dataclass(frozen=True)
class Plan:
    """The jobs of all entries that are good, and what is wrong with the others, each with its file and line."""

    jobs: tuple[Job, ...]
    problems: tuple[str, ...]


class Found(StrEnum):
    """What lies where a job's image belongs."""

    NOTHING = "nothing"
    DONE = "the image"
    DAMAGED = "a damaged image"
    OTHER = "another file"


@dataclass(frozen=True)
class Planner:
    """What all entries of a batch share. `common` are fields of a request that an entry may override, `images` how
    many of each, `base_seed` the seed of entry 0; the entries after it count on from there."""

    manifest: Manifest
    output: Path
    template: NameTemplate
    base_seed: int
    images: int = 1
    common: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, file: PromptFile) -> Plan:
        """Everything that can be known without drawing is checked here, for all entries.

        Raises UsageError for more images than `MAX_IMAGES`."""
        self._require_number(file)
        jobs: list[Job] = []
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
        return Plan(tuple(kept), (*problems, *clashes))

    def _require_number(self, file: PromptFile) -> None:
        """Raise UsageError for more images than a file may ask for, those of bad entries left out."""
        total = 0
        for entry in file.entries:
            with suppress(UsageError):  # told with the entry
                total += self._count(entry)
        if total > MAX_IMAGES:
            raise UsageError(
                f"{file.name}: {total} images, where {MAX_IMAGES} are the most; divide it into several files"
            )

    def _count(self, entry: Entry) -> int:
        if entry.problem:
            raise UsageError(entry.problem)
        text = str(entry.given.get("images", self.images))
        if not text.isdecimal() or len(text) > MAX_DIGITS or not 1 <= int(text) <= MAX_IMAGES:
            raise UsageError(f"images: {text!r}: expected a number from 1 to {MAX_IMAGES}")
        return int(text)

    def _jobs(self, entry: Entry, folder: Path, place: int, number: int, count: int) -> list[Job]:
        said = {name: value for name, value in entry.given.items() if name not in ("images", "name")}
        if "loras" in said:
            raise UsageError("loras: all images of a batch share them; give them with --lora")
        if count > 1 and said.keys() & {"index", "batch"}:
            raise UsageError("index, batch: of one image; leave out images")
        given = {"seed": self.base_seed + place, **self.common, **said}
        first = _with_hashes(parse_request(given, self.manifest.default_size), said, folder)
        check_request(first, self.manifest)
        places = [{}] if count == 1 else [{"index": index, "batch": count} for index in range(count)]
        requests = [first.model_copy(update=changes) for changes in places]
        return [
            self._job(entry, request, number + index, f"-{index}" if count > 1 else "")
            for index, request in enumerate(requests)
        ]

    def _job(self, entry: Entry, request: Request, number: int, suffix: str) -> Job:
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
        return Job(number, entry.line, request, key, self.output / self.template.path(values))


def check_request(request: Request, manifest: Manifest) -> None:
    """Raise UsageError for a size, schedule, prompt or stage that `generate` would refuse."""
    chosen = request.settings
    latent_sizes(chosen.height, chosen.width, chosen.size_policy)
    check_schedules(chosen, varies=request.init_image is not None)
    if request.batch > MAX_IMAGES:
        raise UsageError(f"batch {request.batch:.4g}: expected at most {MAX_IMAGES}")
    for text in (request.prompt, request.negative):
        check_length(text)
    if chosen.weighted:
        for text in (request.prompt, request.negative):
            parse_weights(text)
    inpaints = any(control.name == INPAINTING for control in request.controls)
    if request.mask and not request.init_image and not inpaints:
        raise UsageError("mask: says what to draw anew of an initial image; give init_image with it")
    missing = [stage for stage in used_stages(request, manifest) if stage not in manifest.stages]
    if missing:
        raise UsageError(f"the bundle has no {', '.join(missing)}; export the model with it")
    if request.mask and request.init_image and "encoder" not in manifest.stages[Stage.VQGAN].graphs:
        raise UsageError("mask: the bundle's vqgan has no encoder; export the vqgan again from weights that have one")


def used_stages(request: Request, manifest: Manifest) -> tuple[Stage, ...]:
    """The stages that decide what the image looks like. Raises UsageError for a control the bundle cannot run."""
    used = [Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN]
    used += [Stage.IMAGE_ENCODER] if request.image_prompts else []
    used += [Stage.EFFNET_ENCODER] if request.init_image else []
    used += [stage for control in request.controls for stage in require_control(manifest, control.name)]
    return tuple(dict.fromkeys(used))


def content_key(request: Request, manifest: Manifest) -> str:
    """SHA-256, in hexadecimal, over what decides about the image: the request, its pictures by their SHA-256, and the
    fingerprints of the stages it goes through, LoRAs merged in; neither names of files nor the engine.

    Raises UsageError for numbers that are not finite."""
    said = {name: value for name, value in request.to_json().items() if name != "loras"}
    for name in PICTURES:
        if name in said:
            refs = [said[name]] if isinstance(said[name], Mapping) else said[name]
            said[name] = [{field: value for field, value in ref.items() if field != "path"} for ref in refs]
    stages = {str(stage): _fingerprints(manifest, stage) for stage in used_stages(request, manifest)}
    try:
        text = json.dumps([said, stages], sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise UsageError("settings: expected finite numbers, found NaN or infinity") from error
    return hashlib.sha256(text.encode()).hexdigest()


def bundle_identity(manifest: Manifest) -> dict[str, str]:
    """For the log: one digest for each stage."""
    digests = {stage: hashlib.sha256("".join(_fingerprints(manifest, stage)).encode()) for stage in manifest.stages}
    return {str(stage): digest.hexdigest() for stage, digest in digests.items()}


def pictures_of(requests: Iterable[Request]) -> list[str]:
    """The files of all pictures that images are made from, each once."""
    values = [getattr(request, name) for request in requests for name in PICTURES]
    refs = [ref for value in values for ref in (value if isinstance(value, tuple) else (value,)) if ref is not None]
    return list(dict.fromkeys(ref.path for ref in refs))


def look(job: Job) -> Found:
    """What lies at the job's path; of an image only what comes before its pixels is read, and its end."""
    try:
        with job.path.open("rb") as file:
            begins = file.read(len(PNG_BEGINS))
            length = file.seek(0, 2)
            file.seek(max(0, length - len(PNG_ENDS)))
            ends = file.read()
    except FileNotFoundError:
        return Found.NOTHING
    except OSError:
        return Found.OTHER
    if begins and not PNG_BEGINS.startswith(begins) and any(begins):
        return Found.OTHER
    try:
        settings = read_settings(job.path) if ends == PNG_ENDS else None
    except (OSError, ValueError, SyntaxError):
        return Found.DAMAGED
    if ends != PNG_ENDS:
        return Found.DAMAGED
    return Found.DONE if isinstance(settings, dict) and settings.get(KEY) == job.key else Found.OTHER


def _fingerprints(manifest: Manifest, stage: Stage) -> list[str]:
    entry = manifest.stages.get(stage)
    return sorted(file.fingerprint for file in entry.files) if entry else []


def _without_clashes(jobs: Sequence[Job], file: str) -> tuple[list[Job], list[str]]:
    """The first job of each name, and what is wrong with the others; names that only differ in capitals are one on
    some file systems."""
    firsts: dict[str, Job] = {}
    problems = []
    for job in jobs:
        first = firsts.setdefault(str(job.path).casefold(), job)
        if first is not job:
            problems.append(
                f"{file}:{job.line}: {job.path.name}: also the name for line {first.line}; put {{number}} into --name"
            )
    return list(firsts.values()), problems


def _with_hashes(request: Request, said: Mapping[str, Any], folder: Path) -> Request:
    """Pictures with the SHA-256 they have now; paths the entry said are relative to `folder`."""
    changes: dict[str, Any] = {}
    for name in PICTURES:
        value = getattr(request, name)
        base = folder if name in said else Path()
        if isinstance(value, tuple):
            changes[name] = tuple(_hashed(name, ref, base) for ref in value)
        elif value is not None:
            changes[name] = _hashed(name, value, base)
    return request.model_copy(update=changes)


def _hashed(name: str, ref: Any, base: Path) -> Any:
    path = base / ref.path
    try:
        found = sha256_unless_changed(path)
    except OSError as error:
        raise UsageError(f"{name}: {path}: {error.strerror}; check the path") from error
    if ref.sha256 not in (None, found):
        raise UsageError(f"{name}: {path}: another picture: SHA-256 {found[:12]}..., not {ref.sha256[:12]}...")
    return ref.model_copy(update={"path": str(path), "sha256": found})

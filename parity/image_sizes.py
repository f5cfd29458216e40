"""Chooses the image sizes that stages are compared at: those named, and those that test the profiles of plans."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from ..schemas.manifest import Manifest, StageEntry
from ..schemas.plan_entries import ImageSize, ProfileEntry
from ..schemas.precision import Backend
from ..schemas.sizes import SIZE_STEP, SMALLEST_SIDE
from ..schemas.stages import Stage
from .sample_inputs import SampleSize, Size

IMAGE: Size = (256, 256)  # the image that is generated for the trajectory
IMAGE_STAGES = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN)  # the stages whose inputs depend on the size of an image
AFFORDABLE = 640 * 640  # pixels; larger images are compared on request only
LEAST, BETWEEN, LIKELIEST, LARGEST, OUTSIDE = (
    "least of its profile", "between sizes of its profile", "likeliest of its profile", "largest of its profile",
    "outside its profile",
)  # fmt: skip
AWKWARD = (SIZE_STEP, 3 * SIZE_STEP)  # pixels added to the least width and height: multiples of 8 but not of 16


@dataclass(frozen=True)
class SizeChoice:
    """The image sizes of one comparison, as (width, height) in pixels.

    `by_stage` are compared in addition to the small inputs that every stage is compared on. `image` is the size of the
    image that the trajectory generates. `left_out` are sizes of the plans' profiles that would take long."""

    by_stage: Mapping[Stage, Sequence[SampleSize]] = field(default_factory=dict)
    image: Size = IMAGE
    left_out: tuple[Size, ...] = ()


def choose_sizes(
    manifest: Manifest, engine: str, named: Size | None = None, *, every: bool = False, stages: Sequence[Stage] = ()
) -> SizeChoice:
    """Choose the sizes for each of `stages`, or for all stages of the manifest when none are named.

    The sizes are `named` and those that test the profiles of the stage's plans. An engine that runs plans is compared
    inside the profiles of its own plans only. Other engines are compared at the profiles of all plans and outside of
    them. Without `every`, sizes of more than AFFORDABLE pixels are left out unless they are the least of a profile."""
    by_stage: dict[Stage, Sequence[SampleSize]] = {}
    left_out: list[Size] = []
    for stage in stages or tuple(manifest.stages):
        profiles = _profiles(manifest.stages[stage], engine)
        found: dict[Size, SampleSize] = {}
        for sample in _samples(profiles, bound=_runs_plans(engine)):
            found.setdefault(sample.size, sample)
        kept = [p for p in found.values() if every or p.place == LEAST or p.size[0] * p.size[1] <= AFFORDABLE]
        left_out += found.keys() - {sample.size for sample in kept}
        by_stage[stage] = [*([SampleSize(named)] if named else ()), *kept]
    return SizeChoice(by_stage, _image(manifest, engine), tuple(sorted(set(left_out))))


def _runs_plans(engine: str) -> bool:
    return engine in get_args(Backend)


def _profiles(entry: StageEntry, engine: str) -> list[ProfileEntry]:
    plans = [plan for plan in entry.plans if plan.backend == engine or not _runs_plans(engine)]
    return [profile for plan in plans for profile in plan.profiles]


def _samples(profiles: Sequence[ProfileEntry], *, bound: bool) -> Iterator[SampleSize]:
    for profile in profiles:
        least, largest = _size(profile.min), _size(profile.max)
        yield SampleSize(least, LEAST)
        between = _each(
            max(low, min(low + more, high - SIZE_STEP)) for low, high, more in zip(least, largest, AWKWARD, strict=True)
        )
        if between != least:
            yield SampleSize(between, BETWEEN)
        yield SampleSize(_size(profile.opt), LIKELIEST)
        yield SampleSize(largest, LARGEST)
    if profiles and not bound:
        yield SampleSize(_outside(profiles), OUTSIDE)


def _outside(profiles: Sequence[ProfileEntry]) -> Size:
    """The size outside all profiles with the fewest pixels: smaller than all, or wider if none may be smaller."""
    least = _each(min(sides) for sides in zip(*(_size(profile.min) for profile in profiles), strict=True))
    if min(least) > SMALLEST_SIDE:
        return least[0] - SIZE_STEP, least[1] - SIZE_STEP
    return max(profile.max.width for profile in profiles) + SIZE_STEP, least[1]


def _image(manifest: Manifest, engine: str) -> Size:
    """IMAGE; on an engine that runs plans, the nearest size that the plans of all stages accept."""
    if not _runs_plans(engine):
        return IMAGE
    entries = [manifest.stages[stage] for stage in IMAGE_STAGES if stage in manifest.stages]
    ranges = [profiles for profiles in (_profiles(entry, engine) for entry in entries) if profiles]
    sides = list(IMAGE)
    for axis in range(2):
        for profiles in ranges:
            sides[axis] = min(sides[axis], max(_size(profile.max)[axis] for profile in profiles))
        for profiles in ranges:
            sides[axis] = max(sides[axis], min(_size(profile.min)[axis] for profile in profiles))
    return sides[0], sides[1]


def _size(size: ImageSize) -> Size:
    return size.width, size.height


def _each(sides: Iterator[int]) -> Size:
    width, height = sides
    return width, height

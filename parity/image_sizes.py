"""Which sizes of images stages are compared at: those named, and those at, between and off the points of profiles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from ..schemas.bundle import Backend, ImageSize, Manifest, ProfileEntry, StageEntry
from ..schemas.sizes import SIZE_STEP, SMALLEST_SIDE
from ..schemas.stages import Stage
from .sample_inputs import Point, Size

IMAGE: Size = (256, 256)  # the one that is drawn
DRAWING = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN)  # the stages that have to take its size
AFFORDABLE = 640 * 640  # pixels that a CPU is asked to compute unasked
LEAST, BETWEEN, LIKELIEST, LARGEST, OUTSIDE = (
    "least of its profile", "between points of its profile", "likeliest of its profile", "largest of its profile",
    "outside its profile",
)  # fmt: skip
AWKWARD = (SIZE_STEP, 3 * SIZE_STEP)  # pixels beyond the least width and height: multiples of 8 and of no more


@dataclass(frozen=True)
class Sizes:
    """Sizes that each stage is compared at beside the usual small ones, the size of the image that is drawn, and what
    was left out because it takes long."""

    points: Mapping[Stage, Sequence[Point]] = field(default_factory=dict)
    image: Size = IMAGE
    left_out: tuple[Size, ...] = ()


def choose_sizes(
    manifest: Manifest, engine: str, named: Size | None = None, *, every: bool = False, stages: Sequence[Stage] = ()
) -> Sizes:
    """Of each of `stages` (all, when none are named) the size `named`, and those that the profiles of its plans tell:
    of all plans, or on an engine that runs plans of its own alone, and nothing outside them. Without `every`, no images
    larger than AFFORDABLE but the least of a profile."""
    points: dict[Stage, Sequence[Point]] = {}
    left_out: list[Size] = []
    for stage in stages or tuple(manifest.stages):
        profiles = _profiles(manifest.stages[stage], engine)
        found: dict[Size, Point] = {}
        for point in _points(profiles, bound=_runs_plans(engine)):
            found.setdefault(point.size, point)
        kept = [p for p in found.values() if every or p.place == LEAST or p.size[0] * p.size[1] <= AFFORDABLE]
        left_out += found.keys() - {point.size for point in kept}
        points[stage] = [*([Point(named)] if named else ()), *kept]
    return Sizes(points, _image(manifest, engine), tuple(sorted(set(left_out))))


def _runs_plans(engine: str) -> bool:
    return engine in get_args(Backend)


def _profiles(entry: StageEntry, engine: str) -> list[ProfileEntry]:
    plans = [plan for plan in entry.plans if plan.backend == engine or not _runs_plans(engine)]
    return [profile for plan in plans for profile in plan.profiles]


def _points(profiles: Sequence[ProfileEntry], *, bound: bool) -> Iterator[Point]:
    for profile in profiles:
        least, largest = _size(profile.min), _size(profile.max)
        yield Point(least, LEAST)
        between = _each(
            max(low, min(low + more, high - SIZE_STEP)) for low, high, more in zip(least, largest, AWKWARD, strict=True)
        )
        if between != least:
            yield Point(between, BETWEEN)
        yield Point(_size(profile.opt), LIKELIEST)
        yield Point(largest, LARGEST)
    if profiles and not bound:
        yield Point(_outside(profiles), OUTSIDE)


def _outside(profiles: Sequence[ProfileEntry]) -> Size:
    """Smaller than all of them, or where no image is, wider: as few pixels as there can be outside."""
    least = _each(min(sides) for sides in zip(*(_size(profile.min) for profile in profiles), strict=True))
    if min(least) > SMALLEST_SIDE:
        return least[0] - SIZE_STEP, least[1] - SIZE_STEP
    return max(profile.max.width for profile in profiles) + SIZE_STEP, least[1]


def _image(manifest: Manifest, engine: str) -> Size:
    """IMAGE, or on an engine that runs plans the nearest size that those of all stages take."""
    if not _runs_plans(engine):
        return IMAGE
    entries = [manifest.stages[stage] for stage in DRAWING if stage in manifest.stages]
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

"""Gathers everything that a parity run has to tell into one plain record, and writes it as JSON, HTML or JUnit XML."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ...schemas.bundle import Manifest
from ...schemas.errors import UsageError
from ...schemas.report import (
    ComparisonEntry,
    DepthEntry,
    FileEntry,
    HistogramEntry,
    ImageEntry,
    ParityReport,
    RangeEntry,
    StageFacts,
)
from ...schemas.stages import Stage
from ...storage.atomic_file import whole_file
from ..compare import HISTOGRAM_EDGES, Comparison
from ..image_metrics import ssim, window
from .html import to_html
from .junit import to_junit

# "prior: noise_pred (batch 1, ...)", "trajectory: prior step 2", "teacher-forced: prior pass 2, noise_pred"
ALONG = re.compile(r"(?P<kind>[^:]+): (?P<stage>[\w/]+) (?:step|pass) (?P<step>\d+)")
SUFFIXES = (".html", ".json", ".xml")

Images = tuple[NDArray[Any], NDArray[Any]]  # found and expected, (B, 3, height, width) in 0..1


class Verified(Protocol):
    """What `verify.Report` has to say."""

    @property
    def engine(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def comparisons(self) -> tuple[Comparison, ...]: ...
    @property
    def image_psnr(self) -> float | None: ...
    @property
    def image_psnr_needed(self) -> float: ...
    @property
    def image_failed(self) -> bool: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
    def __bool__(self) -> bool: ...


class DepthPoint(Protocol):
    """What `bisect.PointError` has to say of one part of a graph."""

    @property
    def label(self) -> str: ...
    @property
    def relative_l2(self) -> float: ...
    @property
    def floor(self) -> float: ...
    @property
    def accumulated(self) -> float | None: ...
    @property
    def faulty(self) -> bool: ...


@dataclass(frozen=True)
class Circumstances:
    """What a run was of, beside its figures: the bundle's name, the exact command, versions and machine, files."""

    bundle: str
    command: str
    environment: Mapping[str, str]
    files: tuple[FileEntry, ...] = ()
    date: str = ""  # now, when left out


def build_report(
    verified: Verified,
    manifest: Manifest,
    circumstances: Circumstances,
    *,
    images: Images | None = None,
    depth: Iterable[DepthEntry] = (),
    ranges: Iterable[RangeEntry] = (),
) -> ParityReport:
    """Everything of one run as plain values."""
    comparisons = tuple(describe(comparison) for comparison in verified.comparisons)
    compared = {entry.stage for entry in comparisons} - {None}
    return ParityReport(
        passed=bool(verified),
        engine=verified.engine,
        reference=verified.reference,
        bundle=circumstances.bundle,
        date=circumstances.date or datetime.now(UTC).isoformat(timespec="seconds"),
        command=circumstances.command,
        environment=dict(circumstances.environment),
        stages={
            stage: StageFacts(variant=entry.variant, precision=entry.precision, quantization=entry.quantization)
            for stage, entry in manifest.stages.items()
            if stage in compared
        },
        comparisons=comparisons,
        image=_image(verified, images),
        depth=tuple(depth),
        ranges=tuple(ranges),
        left_out=verified.left_out,
        files=circumstances.files,
    )


def describe(comparison: Comparison) -> ComparisonEntry:
    """A comparison as plain values, with the stage and step that its name speaks of."""
    kind, stage, step = place(comparison.name)
    histogram = HistogramEntry(edges=HISTOGRAM_EDGES, **asdict(comparison.histogram))
    figures = {**asdict(comparison), "histogram": histogram, "passed": bool(comparison)}
    return ComparisonEntry(kind=kind, stage=stage, step=step, failures=comparison.failures, **figures)


def place(name: str) -> tuple[str, Stage | None, int | None]:
    """Kind, stage and step of a comparison, from its name."""
    match = ALONG.match(name)
    if match and match["stage"] in list(Stage):
        return match["kind"], Stage(match["stage"]), int(match["step"])
    head = name.partition(":")[0]
    return ("stage", Stage(head), None) if head in list(Stage) else (head, None, None)


def depth_entries(stage: Stage, points: Iterable[DepthPoint]) -> list[DepthEntry]:
    """The parts of a stage's graph that a bisection went through."""
    return [
        DepthEntry(
            stage=stage,
            name=point.label,
            own=point.relative_l2,
            floor=point.floor,
            accumulated=point.accumulated,
            faulty=point.faulty,
        )
        for point in points
    ]


def bundle_files(manifest: Manifest, stages: Sequence[Stage]) -> tuple[FileEntry, ...]:
    """The files of the stages that were compared, as the manifest has them."""
    return tuple(
        FileEntry(role="bundle", path=file.path, bytes=file.bytes, fingerprint=file.fingerprint, sha256=file.sha256)
        for stage in stages
        for file in manifest.stages[stage].files
    )


def write_report(path: Path, report: ParityReport, images: Images | None = None) -> None:
    """Write `report` as the suffix of `path` says: .html, .json or .xml (JUnit). The file appears whole or not at all.

    Raises UsageError for another suffix, or when it cannot be written."""
    match path.suffix.lower():
        case ".html":
            text = to_html(report, images)
        case ".json":
            text = report.model_dump_json(indent=2) + "\n"
        case ".xml":
            text = to_junit(report)
        case _:
            raise UsageError(f"{path}: a report is one of {', '.join(SUFFIXES)}; end its name so")
    _write_whole(path, text)


def _write_whole(path: Path, text: str) -> None:
    try:
        with whole_file(path) as file:
            file.write(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"{path}: the report cannot be written: {error.strerror}; choose another name") from error


def _image(verified: Verified, images: Images | None) -> ImageEntry | None:
    if verified.image_psnr is None:
        return None
    comparable = images is not None and min(images[0].shape[-2:]) >= window().size
    return ImageEntry(
        passed=not verified.image_failed,
        psnr_db=verified.image_psnr,
        psnr_needed_db=verified.image_psnr_needed,
        ssim=ssim(*images) if images is not None and comparable else None,
    )

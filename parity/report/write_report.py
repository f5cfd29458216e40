"""Builds the report of a parity run, and writes it as JSON, HTML or JUnit XML."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ...schemas.errors import UsageError
from ...schemas.manifest import Manifest
from ...schemas.report import DepthEntry, ImageEntry, ParityReport, RangeEntry, StageFacts
from ...schemas.stages import Stage
from ...storage.atomic_file import whole_file
from ...storage.output_rules import require_apart, require_free, require_writable
from ..image_metrics import ssim, window
from ..results import Report
from .circumstances import Circumstances
from .html import to_html
from .junit import to_junit

if TYPE_CHECKING:
    from ..inside.bisection import PartError

Images = tuple[NDArray[Any], NDArray[Any]]  # found and expected, (B, 3, height, width) in 0..1
ReportWriter = Callable[[ParityReport, Images | None], str]

# The functions that turn a report into text, by the suffix of its file.
WRITERS: Mapping[str, ReportWriter] = {
    ".html": to_html,
    ".json": lambda report, images: report.model_dump_json(indent=2) + "\n",
    ".xml": lambda report, images: to_junit(report),
}


def build_report(report: Report, manifest: Manifest, circumstances: Circumstances) -> ParityReport:
    """Everything of one run as plain values."""
    compared = {comparison.stage for comparison in report.comparisons}
    return ParityReport(
        passed=report.comparisons_passed,
        engine=report.engine,
        reference=report.reference,
        bundle=circumstances.bundle,
        date=circumstances.date or datetime.now(UTC).isoformat(timespec="seconds"),
        command=circumstances.command,
        environment=dict(circumstances.environment),
        stages={
            stage: StageFacts(variant=entry.variant, precision=entry.precision, quantization=entry.quantization)
            for stage, entry in manifest.stages.items()
            if stage in compared
        },
        comparisons=report.comparisons,
        image=_image(report),
        depth=tuple(_depth_entry(found.stage, part) for found in report.bisections for part in found.parts),
        ranges=tuple(
            RangeEntry(stage=advice.stage, name=block.name, max_abs=block.max_abs, precision=advice.computed)
            for advice in report.ranges
            for block in advice.blocks
        ),
        left_out=report.left_out,
        files=circumstances.files,
    )


def check_report_names(paths: Sequence[Path], *, force: bool, sources: Sequence[Path]) -> None:
    """Raise UsageError for a report that could not be written, before anything takes time.

    A report must not replace one of `sources`, and an existing file only with `force`."""
    for path in paths:
        _writer(path)
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent} to write it in; make it first")
        require_apart(path, sources)
        require_free(path, force=force)
        require_writable(path)


def write_report(path: Path, report: ParityReport, images: Images | None = None) -> None:
    """Write `report` in the format that the suffix of `path` names: .html, .json or .xml (JUnit).

    The file appears whole or not at all. Raises UsageError for another suffix, or when the file cannot be written."""
    text = _writer(path)(report, images)
    try:
        with whole_file(path) as file:
            file.write(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"{path}: the report cannot be written: {error.strerror}; choose another name") from error


def _writer(path: Path) -> ReportWriter:
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise UsageError(f"{path}: a report is one of {', '.join(WRITERS)}; choose a name that ends so")
    return WRITERS[suffix]


def _depth_entry(stage: Stage, part: "PartError") -> DepthEntry:
    return DepthEntry(
        stage=stage,
        name=part.label,
        own=part.relative_l2,
        floor=part.floor,
        accumulated=part.accumulated,
        faulty=part.faulty,
    )


def _image(report: Report) -> ImageEntry | None:
    if report.image_psnr is None:
        return None
    images = report.images
    large_enough = images is not None and min(images[0].shape[-2:]) >= window().size
    return ImageEntry(
        passed=not report.image_failed,
        psnr_db=report.image_psnr,
        psnr_needed_db=report.image_psnr_needed,
        ssim=ssim(*images) if images is not None and large_enough else None,
    )

"""Records the verdict of a parity run in the bundle's manifest, and reads whether it still holds."""

from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from ..schemas.errors import CheckpointError, ConversionError
from ..schemas.manifest import Manifest, StageEntry, StageVerdict, VerdictEntry
from ..schemas.stages import Stage
from ..storage.bundle import Bundle, update_manifest

if TYPE_CHECKING:  # of the modules that compare, which import numpy: `inspect` only reads verdicts
    from .comparison import Comparison
    from .results import Report

KEPT = 16  # the most verdicts in a manifest; the oldest are removed first


class Verdict(StrEnum):
    """The state of a bundle's verification, the worst first."""

    FAILED = "failed"
    STALE = "stale"  # the bundle was verified, and its files have changed since
    NEVER = "never"
    PASSED = "passed"


def make_verdict(report: "Report", manifest: Manifest, created_by: str, date: str = "") -> VerdictEntry:
    """The entry that the manifest keeps of a parity run; an empty `date` stands for today in UTC."""
    return VerdictEntry(
        engine=report.engine,
        reference=report.reference,
        date=date or datetime.now(UTC).date().isoformat(),
        created_by=created_by,
        passed=report.comparisons_passed,
        image_psnr_db=report.image_psnr,
        stages=_stages(report.comparisons, manifest),
    )


def record_verdict(bundle: Bundle, verdict: VerdictEntry) -> Manifest:
    """Add `verdict` to the bundle's manifest, remove the verdicts it makes obsolete, and return the new manifest.

    Verdicts that other processes recorded since `bundle` was opened are kept. Raises CheckpointError when the manifest
    cannot be written."""

    def added(manifest: Manifest) -> Manifest:
        others = [old for old in manifest.parity if not _obsolete(old, verdict)]
        return manifest.model_copy(update={"parity": (*others, verdict)[-KEPT:]})

    try:
        return update_manifest(bundle.root, added)
    except ConversionError as error:
        raise CheckpointError(f"{error}, so the verdict is not recorded; give verdict=False to leave it out") from error


def verdict_of(manifest: Manifest, engine: str | None = None) -> Verdict:
    """The verdict on the bundle run by `engine`, or by any engine when left out.

    The latest verdict on each stage counts. The verdict on the bundle is the worst of its stages'."""
    found = stage_verdicts(manifest, engine).values()
    return next((verdict for verdict in Verdict if verdict in found), Verdict.NEVER)


def stage_verdicts(manifest: Manifest, engine: str | None = None) -> dict[Stage, Verdict]:
    """The latest verdict on each stage run by `engine`, or by any engine when left out."""
    return {stage: _of_stage(stage, entry, manifest.parity, engine) for stage, entry in manifest.stages.items()}


def warning(manifest: Manifest, engine: str | None = None) -> str | None:
    """A line to show before a bundle is used; None when the bundle was verified and passed."""
    on = f" on {engine}" if engine else ""
    todo = "compare it with its model: cascadekit verify BUNDLE --against MODEL"
    match verdict_of(manifest, engine):
        case Verdict.FAILED:
            return f"this bundle failed its parity check{on}: images may be wrong; {todo} --report report.html"
        case Verdict.STALE:
            return f"this bundle has changed since it was verified{on}; {todo}"
        case Verdict.NEVER:
            return f"this bundle was never verified{on}; {todo}"
    return None


def _stages(comparisons: "Iterable[Comparison]", manifest: Manifest) -> dict[Stage, StageVerdict]:
    by_stage: dict[Stage, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.stage is not None and comparison.stage in manifest.stages:
            by_stage.setdefault(comparison.stage, []).append(comparison)
    return {
        stage: StageVerdict(
            passed=all(found),
            worst_relative_l2=max(comparison.relative_l2 for comparison in found),
            files=_files(manifest.stages[stage]),
        )
        for stage, found in by_stage.items()
    }


def _files(entry: StageEntry) -> dict[str, str]:
    return {file.path: file.fingerprint for file in entry.files}


def _obsolete(old: VerdictEntry, new: VerdictEntry) -> bool:
    """True when `new` is about the same engine and reference, and about every stage of `old`."""
    return (old.engine, old.reference) == (new.engine, new.reference) and old.stages.keys() <= new.stages.keys()


def _of_stage(stage: Stage, entry: StageEntry, verdicts: Iterable[VerdictEntry], engine: str | None) -> Verdict:
    latest = None
    for verdict in verdicts:
        if stage in verdict.stages and engine in (None, verdict.engine):
            latest = verdict
    if latest is None:
        return Verdict.NEVER
    found = latest.stages[stage]
    if found.files != _files(entry):
        return Verdict.STALE
    # A verdict whose stages all passed has failed elsewhere, such as in the final image.
    elsewhere = not latest.passed and all(other.passed for other in latest.stages.values())
    return Verdict.PASSED if found.passed and not elsewhere else Verdict.FAILED

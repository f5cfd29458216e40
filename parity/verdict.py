"""Records the verdict of a parity run in the bundle's manifest, and reads whether it still holds."""

from collections.abc import Iterable
from datetime import UTC, datetime

from ..runtime.engines.engine_table import DEFAULT, ENGINES
from ..schemas.errors import CheckpointError, ConversionError
from ..schemas.manifest import Manifest, StageVerdict, VerdictEntry
from ..schemas.report import Comparison
from ..schemas.stages import Stage
from ..schemas.verdicts import Verdict, files_of, verdict_of
from ..storage.bundle import Bundle, update_manifest
from .results import Report

KEPT = 16  # the most verdicts in a manifest; the oldest are removed first


def make_verdict(report: Report, manifest: Manifest, created_by: str, date: str = "") -> VerdictEntry:
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


def warning(manifest: Manifest, engine: str | None = None) -> str | None:
    """A line to show before a bundle is used; None when the bundle was verified and passed."""
    on = f" on {engine}" if engine else ""
    chosen = f" --engine {engine}" if engine in ENGINES and engine != DEFAULT else ""
    todo = f"compare it with its model: cascadekit verify BUNDLE --against MODEL{chosen}"
    match verdict_of(manifest, engine):
        case Verdict.FAILED:
            return f"this bundle failed its parity check{on}: images may be wrong; {todo} --report report.html"
        case Verdict.STALE:
            return f"this bundle has changed since it was verified{on}; {todo}"
        case Verdict.NEVER:
            return f"this bundle was never verified{on}; {todo}"
    return None


def _stages(comparisons: Iterable[Comparison], manifest: Manifest) -> dict[Stage, StageVerdict]:
    by_stage: dict[Stage, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.stage is not None and comparison.stage in manifest.stages:
            by_stage.setdefault(comparison.stage, []).append(comparison)
    return {
        stage: StageVerdict(
            passed=all(found),
            worst_relative_l2=max(comparison.relative_l2 for comparison in found),
            files=files_of(manifest.stages[stage]),
        )
        for stage, found in by_stage.items()
    }


def _obsolete(old: VerdictEntry, new: VerdictEntry) -> bool:
    """True when `new` is about the same engine and reference, and about every stage of `old`."""
    return (old.engine, old.reference) == (new.engine, new.reference) and old.stages.keys() <= new.stages.keys()

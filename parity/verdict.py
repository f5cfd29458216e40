"""The verdict of a parity run in the bundle's manifest, and what it is worth later."""

from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum

from ..schemas.bundle import MANIFEST_NAME, Manifest, StageEntry, StageVerdict, VerdictEntry, to_text
from ..schemas.errors import CheckpointError
from ..schemas.stages import Stage
from ..storage.atomic_file import whole_file
from ..storage.bundle import Bundle
from .compare import Comparison
from .report.build import Verified, place

KEPT = 16  # verdicts in a manifest; the oldest go first


class Verdict(StrEnum):
    """What is known of a bundle, the worst first."""

    FAILED = "failed"
    STALE = "stale"  # it was verified, and something in it has changed since
    NEVER = "never"
    PASSED = "passed"


def make_verdict(verified: Verified, manifest: Manifest, created_by: str, date: str = "") -> VerdictEntry:
    """What the manifest keeps of a parity run; `date` is today's in UTC when left out."""
    return VerdictEntry(
        engine=verified.engine,
        reference=verified.reference,
        date=date or datetime.now(UTC).date().isoformat(),
        created_by=created_by,
        passed=bool(verified),
        image_psnr_db=verified.image_psnr,
        stages=_stages(verified.comparisons, manifest),
    )


def record_verdict(bundle: Bundle, verdict: VerdictEntry) -> Manifest:
    """Put `verdict` into the bundle's manifest in the place of those it makes obsolete; returns the new manifest.

    The file is replaced whole. Raises CheckpointError when it cannot be written."""
    path = bundle.root / MANIFEST_NAME
    others = [old for old in bundle.manifest.parity if not _obsolete(old, verdict)]
    manifest = bundle.manifest.model_copy(update={"parity": (*others, verdict)[-KEPT:]})
    try:
        with whole_file(path, path.stat().st_mode & 0o777) as file:
            file.write(to_text(manifest).encode())
    except OSError as error:
        raise CheckpointError(f"{path}: the verdict cannot be recorded: {error.strerror}; see --no-verdict") from error
    return manifest


def verdict_of(manifest: Manifest, engine: str | None = None) -> Verdict:
    """What is known of the bundle on `engine` (on any, when left out): of every stage the latest verdict counts, of
    the bundle the worst of its stages'."""
    found = [_of_stage(stage, entry, manifest.parity, engine) for stage, entry in manifest.stages.items()]
    return next((verdict for verdict in Verdict if verdict in found), Verdict.NEVER)


def warning(manifest: Manifest, engine: str | None = None) -> str | None:
    """A line for who is about to use a bundle; None when it was verified and passed."""
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


def _stages(comparisons: Iterable[Comparison], manifest: Manifest) -> dict[Stage, StageVerdict]:
    by_stage: dict[Stage, list[Comparison]] = {}
    for comparison in comparisons:
        stage = place(comparison.name)[1]
        if stage is not None and stage in manifest.stages:
            by_stage.setdefault(stage, []).append(comparison)
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
    """Whether all that `old` says, `new` says anew."""
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
    elsewhere = not latest.passed and all(other.passed for other in latest.stages.values())  # the image, say
    return Verdict.PASSED if found.passed and not elsewhere else Verdict.FAILED

"""Reads from a bundle's manifest whether its verification still holds."""

from collections.abc import Sequence
from enum import StrEnum

from .manifest import Manifest, StageEntry, VerdictEntry
from .stages import Stage


class Verdict(StrEnum):
    """The state of a bundle's verification, the worst first."""

    FAILED = "failed"
    STALE = "stale"  # the bundle was verified, and its files have changed since
    NEVER = "never"
    PASSED = "passed"


def verdict_of(manifest: Manifest, engine: str | None = None) -> Verdict:
    """The verdict on the bundle run by `engine`, or by any engine when left out.

    The latest verdict on each stage counts. The verdict on the bundle is the worst of its stages'."""
    found = stage_verdicts(manifest, engine).values()
    return next((verdict for verdict in Verdict if verdict in found), Verdict.NEVER)


def stage_verdicts(manifest: Manifest, engine: str | None = None) -> dict[Stage, Verdict]:
    """The latest verdict on each stage run by `engine`, or by any engine when left out."""
    return {stage: _of_stage(stage, entry, manifest.parity, engine) for stage, entry in manifest.stages.items()}


def files_of(entry: StageEntry) -> dict[str, str]:
    """The fingerprint of each file of a stage, by its path."""
    return {file.path: file.fingerprint for file in entry.files}


def _of_stage(stage: Stage, entry: StageEntry, verdicts: Sequence[VerdictEntry], engine: str | None) -> Verdict:
    of_stage = (each for each in reversed(verdicts) if stage in each.stages and engine in (None, each.engine))
    latest = next(of_stage, None)
    if latest is None:
        return Verdict.NEVER
    found = latest.stages[stage]
    if found.files != files_of(entry):
        return Verdict.STALE
    # A verdict whose stages all passed has failed elsewhere, such as in the final image.
    elsewhere = not latest.passed and all(other.passed for other in latest.stages.values())
    return Verdict.PASSED if found.passed and not elsewhere else Verdict.FAILED

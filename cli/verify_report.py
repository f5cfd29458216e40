"""What verify leaves behind: reports, and the verdict in the bundle's manifest."""

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas.errors import CascadeError, UsageError
from ..schemas.json_text import well_formed
from .common import local
from .console import note

if TYPE_CHECKING:
    from ..parity.verify import Report
    from ..schemas.report import DepthEntry, FileEntry, RangeEntry

LIBRARIES = (
    "cascadekit", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch",
    "diffusers", "transformers", "onnx",
)  # fmt: skip


def check_names(reports: Iterable[Path], *, force: bool, sources: Sequence[Path]) -> None:
    """Raise UsageError for a report that could not be written, or not there, before anything takes time."""
    from ..parity.report.build import SUFFIXES
    from ..storage.output_rules import require_apart, require_free

    for path in reports:
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path}: a report is one of {', '.join(SUFFIXES)}; end its name so")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent} to write it in; make it first")
        require_apart(path, sources)
        require_free(path, force=force)


def keep(
    report: "Report",
    bundle: Path,
    against: Path,
    reports: Sequence[Path],
    *,
    record: bool,
    depth: "Iterable[DepthEntry]" = (),
    ranges: "Iterable[RangeEntry]" = (),
) -> None:
    """Write the reports, then the verdict; a manifest that cannot be written is worth a note, not the verdict."""
    from ..parity.report.build import Circumstances, build_report, bundle_files, place, write_report
    from ..parity.verdict import make_verdict, record_verdict
    from ..storage.bundle import open_bundle

    opened = open_bundle(bundle)
    if reports:
        compared = {place(comparison.name)[1] for comparison in report.comparisons}
        stages = [stage for stage in opened.manifest.stages if stage in compared]
        files = (*bundle_files(opened.manifest, stages), *_reference_files(against))
        circumstances = Circumstances(well_formed(bundle.absolute().name), _command(), _environment(), files)
        images = report.images
        whole = build_report(report, opened.manifest, circumstances, images=images, depth=depth, ranges=ranges)
        for path in reports:
            write_report(path, whole, images)
            note(f"wrote {path}")
    if record:
        try:
            record_verdict(opened, make_verdict(report, opened.manifest, f"cascadekit {version('cascadekit')}"))
        except CascadeError as error:
            note(str(error))


def _command() -> str:
    return well_formed(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def _environment() -> dict[str, str]:
    from ..storage.machine import cpu_model

    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{cpu_model()}, {len(os.sched_getaffinity(0))} threads",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _reference_files(against: Path) -> "list[FileEntry]":
    """The files that were compared with: of a model its weights."""
    from ..converters.checkpoints.open_model import open_model
    from ..schemas.report import FileEntry
    from ..storage.file_hashes import fingerprint

    try:
        model = open_model([local(against)])
        paths = {tensor.path for component in model.components.values() for tensor in component.tensors.values()}
    except CascadeError:  # a recorded reference, which is no model
        paths = {against} if against.is_file() else set()
    return [
        FileEntry(
            role="reference",
            path=well_formed(path.name if against.is_file() else path.relative_to(local(against)).as_posix()),
            bytes=path.stat().st_size,
            fingerprint=fingerprint(path),
            sha256=None,
        )
        for path in sorted(paths)
    ]

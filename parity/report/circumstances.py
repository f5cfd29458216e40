"""Collects the facts that a reader needs to repeat a parity run: the command, the software, the machine, the files."""

import os
import platform
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...converters.checkpoints.open_model import open_model
from ...schemas.errors import CascadeError
from ...schemas.json_text import well_formed
from ...schemas.report import ComparedFile
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ...storage.file_hashes import fingerprint

LIBRARIES = (
    "cascadekit", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch",
    "diffusers", "transformers", "onnx",
)  # fmt: skip


@dataclass(frozen=True)
class Circumstances:
    """The facts that a reader needs to repeat a run: bundle, command, versions and machine, and the files."""

    bundle: str
    command: str
    environment: Mapping[str, str]
    files: tuple[ComparedFile, ...] = ()
    date: str = ""  # UTC, ISO 8601; now when empty


def circumstances_of(bundle: Bundle, stages: Collection[Stage | None], against: Path) -> Circumstances:
    """The circumstances of this process, in which `stages` of `bundle` were compared with a model or recording.

    The command line is quoted for a shell. The files are those of the stages, as the manifest lists them, and those
    of `against`."""
    command = well_formed(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    own = [
        ComparedFile(role="bundle", path=file.path, bytes=file.bytes, fingerprint=file.fingerprint, sha256=file.sha256)
        for stage, entry in bundle.manifest.stages.items()
        if stage in stages
        for file in entry.files
    ]
    name = well_formed(bundle.root.absolute().name)
    return Circumstances(name, command, _software(), (*own, *_reference_files(against)))


def _software() -> dict[str, str]:
    """System, processor, Python, and the version of each of LIBRARIES that is installed."""
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


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown")


def _reference_files(against: Path) -> list[ComparedFile]:
    """The weights of a model, or the file of a recording."""
    try:
        model = open_model([against])
        paths = {tensor.path for component in model.components.values() for tensor in component.tensors.values()}
    except CascadeError:  # a recording is not a model
        paths = {against} if against.is_file() else set()
    return [
        ComparedFile(
            role="reference",
            path=well_formed(path.name if against.is_file() else path.relative_to(against).as_posix()),
            bytes=path.stat().st_size,
            fingerprint=fingerprint(path),
            sha256=None,
        )
        for path in sorted(paths)
    ]

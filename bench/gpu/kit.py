"""Packs what a machine with a GPU, Python and no network needs to measure.

The kit has wheels, this checkout's `bench/`, which no wheel has, and `install.py`, which needs only Python. Files may
be cut into parts, for transfers with a limit. The machine must have CUDA's libraries and cuDNN; torch for CUDA brings
them.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...schemas.errors import ConversionError, UsageError
from .one_architecture import slim_wheel

BENCH = Path(__file__).parents[1]
INSTALLER = Path(__file__).with_name("install.py")
INDEX = "kit.json"
BLOCK = 1 << 20

# Packages that the kit brings. torch and its libraries for CUDA are expected on the machine, if wanted.
PACKAGES = ("onnx", "safetensors", "diffusers", "transformers")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(output: Path, wheels: Iterable[Path], part_bytes: int = 0) -> dict[str, Any]:
    """Write the kit into the new folder `output`; returns its index: SHA-256 and parts of every file.

    Files of more than `part_bytes` are cut into parts; 0 leaves them whole."""
    output.mkdir(parents=True)
    shutil.copyfile(INSTALLER, output / INSTALLER.name)
    files = [_place(output, wheel, part_bytes) for wheel in sorted(wheels)]
    with TemporaryDirectory() as folder:
        files.append(_place(output, _bench_zip(Path(folder)), part_bytes))
    index = {"format": "cascadekit-gpu-kit", "version": 1, "files": files}
    (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


def _place(output: Path, file: Path, part_bytes: int) -> dict[str, Any]:
    """Copy a file into the kit, in parts if it is large."""
    digest, left = hashlib.sha256(), file.stat().st_size
    parts: list[str] = []
    cut = part_bytes and left > part_bytes
    with file.open("rb") as source:
        while left > 0:
            name = f"{file.name}.part-{len(parts):03d}" if cut else file.name
            length = min(left, part_bytes) if cut else left
            with (output / name).open("wb") as target:
                _copy(source, target, length, digest)
            parts.append(name)
            left -= length
    return {"name": file.name, "sha256": digest.hexdigest(), "parts": parts}


def _copy(source: Any, target: Any, length: int, digest: Any) -> None:
    while length > 0:
        block = source.read(min(BLOCK, length))
        digest.update(block)
        target.write(block)
        length -= len(block)


def _bench_zip(folder: Path) -> Path:
    """`bench/` of this checkout, where Python finds it beside the package of the wheel."""
    path = folder / "cascadekit-bench.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(BENCH.rglob("*.py")):
            archive.write(file, f"cascadekit/bench/{file.relative_to(BENCH).as_posix()}")
    return path


def download(folder: Path, python: str, onnxruntime: str, more: Sequence[str]) -> list[Path]:
    """Build the wheel of this checkout and download the others into `folder`, for `python` on Linux, x86-64.

    pip resolves what the wheel requires. onnxruntime, which shares files with onnxruntime-gpu, is not among them."""
    pip = (sys.executable, "-m", "pip")
    subprocess.run((*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(BENCH.parent)), check=True)
    (own,) = folder.glob("cascadekit-*.whl")
    target = ("--only-binary", ":all:", "--python-version", python, "--implementation", "cp")
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    get = (*pip, "download", "--quiet", "--dest", str(folder), *target, *platforms)
    subprocess.run((*get, str(own), *PACKAGES, *more), check=True)
    subprocess.run((*get, "--no-deps", onnxruntime), check=True)
    return sorted(folder.glob("*.whl"))


@dataclass(frozen=True)
class Kit:
    """The machine that a kit is for, and the parts of the kit.

    Attributes:
        python: Version of Python on the machine with the GPU.
        onnxruntime: The requirement for pip, such as "onnxruntime-gpu==1.31.1".
        more: Further packages.
        without: Packages that are there already.
        part_mib: Files above this size are cut; 0 leaves them whole.
        sm: The GPU's architecture, such as 90, if onnxruntime is to have code for it alone; None keeps all.
    """

    python: str
    onnxruntime: str
    more: Sequence[str] = ()
    without: Sequence[str] = ()
    part_mib: int = 0
    sm: int | None = None


def make_kit(output: Path, kit: Kit) -> list[str]:
    """Download what the kit needs, and pack it. Returns the names of the files.

    Raises UsageError if `output` exists or a name of `without` is of no package, and ConversionError if pip fails,
    whose reason it has printed."""
    if output.exists():
        raise UsageError(f"{output}: exists already; remove it, or give another output")
    with TemporaryDirectory() as folder:
        try:
            found = download(Path(folder), kit.python, kit.onnxruntime, kit.more)
        except subprocess.CalledProcessError as error:
            raise ConversionError(f"{' '.join(error.cmd)[:200]}: failed with status {error.returncode}") from error
        wheels = {package_of(wheel.name): wheel for wheel in found}
        if unknown := sorted(set(kit.without) - wheels.keys()):
            raise UsageError(f"without {', '.join(unknown)}: expected names of {', '.join(wheels)}")
        ort = package_of(kit.onnxruntime)
        if kit.sm is not None:
            wheels[ort] = slim_wheel(wheels[ort], kit.sm, Path(folder))
        chosen = [wheel for name, wheel in wheels.items() if name not in kit.without]
        return [file["name"] for file in pack(output, chosen, kit.part_mib << 20)["files"]]


def package_of(text: str) -> str:
    """The package's name, of a wheel's file name or of a requirement with "==", as the registry spells it."""
    return re.split(r"==|-(?=\d)", text)[0].replace("_", "-").lower()

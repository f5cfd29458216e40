"""The two files of onnxruntime-web that a page needs, from the package as npm delivers it."""

import json
import tarfile
from pathlib import Path

from ...schemas.errors import UsageError
from ...schemas.messages import reason

NAME = "onnxruntime-web"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of the package's folder dist
MAX_BYTES = 1 << 28  # of one file; those of 1.30 have up to 14 MB
HOW = f"npm pack {NAME}"


def read_onnxruntime_web(package: Path) -> dict[str, bytes]:
    """The content of `FILES` by name, from the archive of `npm pack` or a folder such as node_modules/onnxruntime-web.

    Raises UsageError for anything else."""
    try:
        read = _from_folder(package) if package.is_dir() else _from_archive(package)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"{package}: cannot be read as {NAME}: {reason(error)}; get its archive with `{HOW}`"
        ) from error
    try:
        found = json.loads(read.pop("package.json", b"{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("name") != NAME:
        raise UsageError(f"{package}: not the package {NAME}; get its archive with `{HOW}`")
    missing = [name for name in FILES if name not in read]
    if missing:
        raise UsageError(
            f"{package}: {NAME} {found.get('version')} has no dist/{missing[0]} of up to {MAX_BYTES >> 20} MiB; "
            f"get a newer one with `{HOW}`"
        )
    return read


def _from_folder(folder: Path) -> dict[str, bytes]:
    paths = {"package.json": folder / "package.json", **{name: folder / "dist" / name for name in FILES}}
    return {
        name: path.read_bytes() for name, path in paths.items() if path.is_file() and path.stat().st_size <= MAX_BYTES
    }


def _from_archive(archive: Path) -> dict[str, bytes]:
    wanted = {"package/package.json": "package.json", **{f"package/dist/{name}": name for name in FILES}}
    found = {}
    with tarfile.open(archive, "r:gz") as package:
        for member in package:
            if member.name in wanted and member.isfile() and member.size <= MAX_BYTES:
                content = package.extractfile(member)
                assert content is not None  # it is a file
                found[wanted[member.name]] = content.read()
    return found

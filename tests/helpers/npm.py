"""A stand-in for the archive that `npm pack onnxruntime-web` fetches."""

import json
import tarfile
from pathlib import Path

from cascadekit.converters.site.onnxruntime_web import FILES


def packed(archive: Path, name: str = "onnxruntime-web", files: tuple[str, ...] = FILES) -> Path:
    """The archive, and beside it the folder `package` that is in it; the files have the names of npm's and no content
    of use."""
    package = archive.parent / "package"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": name, "version": "1.0.0"}))
    for file in files:
        (package / "dist" / file).write_text(file)
    with tarfile.open(archive, "w:gz") as made:
        made.add(package, "package")
    return archive

"""Unpack the kit of the GPU benchmark: `python install.py SITE`. It needs Python alone: no pip, no network.

Afterwards: PYTHONPATH=SITE python -m cascadekit bench gpu --work /dev/shm
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryFile

HERE = Path(__file__).parent
BLOCK = 1 << 20


def install(kit: Path, site: Path) -> None:
    """Join the parts of each file, compare its SHA-256, and unpack it into `site`."""
    files = json.loads((kit / "kit.json").read_text(encoding="utf-8"))["files"]
    missing = [part for file in files for part in file["parts"] if not (kit / part).is_file()]
    if missing:
        sys.exit(f"{kit}: not there: {', '.join(missing)}; copy them and start again")
    site.mkdir(parents=True, exist_ok=True)
    for file in files:
        with TemporaryFile() as joined:
            digest = hashlib.sha256()
            for part in file["parts"]:
                with (kit / part).open("rb") as source:
                    while block := source.read(BLOCK):
                        digest.update(block)
                        joined.write(block)
            if digest.hexdigest() != file["sha256"]:
                sys.exit(f"{file['name']}: damaged; expected SHA-256 {file['sha256']}, found {digest.hexdigest()}")
            with zipfile.ZipFile(joined) as archive:
                archive.extractall(site)
        print(f"unpacked {file['name']}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    install(HERE, Path(sys.argv[1]))

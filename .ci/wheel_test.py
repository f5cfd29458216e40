"""Run in an environment that holds the wheel with its base and cpu extras alone; the argument is the demo's folder.

Checks that the libraries the runtime must do without are absent, then draws the demo's image again.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ABSENT = ("torch", "diffusers", "transformers", "onnx")


def main() -> None:
    demo = Path(sys.argv[1]).resolve()
    present = [name for name in ABSENT if importlib.util.find_spec(name)]
    if present:
        sys.exit(f"installed although the runtime should not need them: {', '.join(present)}")
    program = Path(sys.executable).with_name("cascadekit")
    with tempfile.TemporaryDirectory() as folder:  # away from the checkout, which must not be imported
        arguments = ["generate", demo / "bundle", "a tiny cascade", "--seed", "0", "-o", "image.png"]
        subprocess.run([program, *arguments], cwd=folder, check=True)
        drawn = Image.open(Path(folder) / "image.png")
        wanted = Image.open(demo / "image.png")
        if drawn.size != wanted.size or drawn.tobytes() != wanted.tobytes():
            sys.exit("the image differs from the demo's")
    print("the wheel alone draws the demo's image")


if __name__ == "__main__":
    main()

"""The example model: a small trained Stable Cascade that is part of the package.

It generates pictures of 128x128 pixels: 114 kinds of objects in three styles of icons, and coloured shapes. The files
are in Stability's layout and in 16 bits. `tools/train_tiny` trains them; the folder has the licences of the pictures.
"""

import shutil
from pathlib import Path

EXAMPLE_MODEL = Path(__file__).with_name("data") / "example_model"
EXAMPLE_PROMPT = "a fox, glossy style"
EXAMPLE_PROMPTS = (
    "a strawberry, glossy style",
    "a rocket, flat style",
    "a turtle, classic style on a light blue background",
    "a slice of pizza, flat style",
    "a purple star in the center",
    "a red heart above a blue square",
    "a small yellow circle inside a large green square",
    "a panda, classic style on a light pink background",
)


def copy_example_model(folder: Path) -> None:
    """Copy the files of the example model into `folder`, which must not exist."""
    shutil.copytree(EXAMPLE_MODEL, folder, copy_function=shutil.copyfile)

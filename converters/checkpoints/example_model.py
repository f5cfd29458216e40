"""The example model: a small trained Stable Cascade that is part of the package, and a LoRA for it.

It generates pictures of 128x128 pixels: 114 kinds of objects in three styles of icons, and coloured shapes. The LoRA
makes them cyanotypes, prints in blue. The files are in Stability's layout and in 16 bits, the LoRA also in kohya's.
`tools/train_tiny` trains them; the model's folder has the licences of the pictures.
"""

import shutil
from pathlib import Path

EXAMPLE_MODEL = Path(__file__).with_name("data") / "example_model"
EXAMPLE_LORA = EXAMPLE_MODEL.with_name("example_lora") / "cyanotype.safetensors"
EXAMPLE_PROMPT = "a fox, glossy style"
EXAMPLE_PROMPTS = (
    "a strawberry, glossy style",
    "a rocket, flat style",
    "a turtle, classic style on a light blue background",
    "a slice of pizza, flat style",
    "a purple star in the center",
    "a red heart above a blue square",
    "a blue diamond left of a yellow circle",
    "a panda, classic style on a light pink background",
)


def copy_example_model(model: Path, loras: Path) -> None:
    """Copy the files of the example model into `model`, and its LoRAs into `loras`. Both must not exist."""
    for source, target in ((EXAMPLE_MODEL, model), (EXAMPLE_LORA.parent, loras)):
        for path in filter(Path.is_file, source.rglob("*")):  # `copytree` goes on when the disk is full
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

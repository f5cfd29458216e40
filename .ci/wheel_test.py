"""Run in an environment that holds the wheel with its base and cpu extras alone; the argument is the demo's folder.

Checks that libraries which the runtime must not need are absent. Then generates the demo's image again, and uses
everything that its four stages can do: both samplers, lists of timesteps, prompts with weights and in chunks, metadata
to images, images to latents, previews, numpy output.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cascadekit.converters.checkpoints.example_model import EXAMPLE_PROMPT

ABSENT = ("torch", "diffusers", "transformers", "onnx", "safetensors.torch")
QUICK = ["--size", "128x72", "--prior-steps", "2", "--decoder-steps", "2", "--seed", "3"]
LONG = "one of many words " * 30


def main() -> None:
    demo = Path(sys.argv[1]).resolve()
    present = [name for name in ABSENT[:-1] if importlib.util.find_spec(name)]
    if present:
        sys.exit(f"installed although the runtime should not need them: {', '.join(present)}")
    with tempfile.TemporaryDirectory() as folder:  # away from the checkout, which must not be imported
        on_the_command_line(demo, Path(folder))
    in_python(demo)
    loaded = [name for name in ABSENT if name in sys.modules]
    require(not loaded, f"imported although the runtime should not need them: {', '.join(loaded)}")
    print("the wheel alone generates the demo's image, and all that four stages can")


def on_the_command_line(demo: Path, folder: Path) -> None:
    program = Path(sys.executable).with_name("cascadekit")

    def generated(name: str, *arguments: str) -> bytes:
        command = [program, "generate", demo / "bundle", *arguments, "-o", name]
        subprocess.run(command, cwd=folder, check=True)
        return pixels(folder / name)

    wanted = pixels(demo / "image.png")
    require(generated("image.png", EXAMPLE_PROMPT, "--seed", "0") == wanted, "the image differs from the demo's")
    require(generated("like.png", "--like", "image.png") == wanted, "--like generates another image")
    plain = generated("plain.png", "a cat", *QUICK)
    listed = generated("listed.png", "a cat", *QUICK, "--prior-timesteps", "1,0.5,0", "--decoder-timesteps", "1,0.5,0")
    require(listed == plain, "timesteps of one's own that are those of two steps generate another image")
    others = {
        "gdf": ("a cat", "--sampler", "gdf"),
        "timesteps": ("a cat", "--prior-timesteps", "0.9,0.4,0.1"),
        "negative": ("a cat", "--negative", "a dog"),
        "weights": ("a (cat:1.4)", "--weighted"),
        "cut": (LONG,),
        "chunks": (LONG, "--long-prompts"),
    }
    images = {plain, *(generated(f"{name}.png", *arguments, *QUICK) for name, arguments in others.items())}
    require(len(images) == len(others) + 1, f"of plain, {', '.join(others)} some are the same image")
    like = generated("again.png", "--like", "gdf.png")
    require(like == pixels(folder / "gdf.png"), "--like generates another image with gdf")


def in_python(demo: Path) -> None:
    from cascadekit import Cascade
    from cascadekit.runtime.sampling.loop import Start

    with Cascade.open(demo / "bundle", engine="onnxruntime", memory="2GB") as cascade:
        size = {"height": 72, "width": 128}
        result = cascade.generate(["a", "b"], seed=[1, 2], prior_steps=2, decoder_steps=2, **size)
        require(result.pixels is not None and result.pixels.shape == (2, 3, 72, 128), "no pixels")
        require(bool(np.isfinite(result.pixels).all()), "pixels that are no numbers")
        embeds = result.embeds
        again = cascade.generate(embeds=embeds, seed=[1, 2], prior_steps=2, decoder_steps=2, **size)
        require(np.array_equal(again.pixels, result.pixels), "embeddings given back generate other images")
        details = cascade.encode_details(result.images[0], **size)
        start = Start(details, 0.5)
        *_, last = cascade.decode(result.prior_latents, embeds, **size, steps=4, start=start, sampler="gdf")
        require(last.steps == 2 and last.latents.shape == (2, 4, 18, 32), "half of four steps are two")
        require(last.preview()[1].size == (128, 72), "no preview")


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return repr(picture.size).encode() + picture.tobytes()


def require(fact: bool, otherwise: str) -> None:
    if not fact:
        sys.exit(otherwise)


if __name__ == "__main__":
    main()

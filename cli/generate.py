"""The command that draws images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.sizes import SizePolicy
from .common import ENGINES, PATH, parse_size
from .console import note, say, step_progress

if TYPE_CHECKING:
    from ..runtime.tokenizer import ClipTokenizer


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, default=Path("images"), show_default=True, help="Folder or .png file.")
@click.option("--negative", default="", help="What the image should not be.")
@click.option("--size", metavar="WxH", callback=parse_size, help="Multiples of 8; the bundle's own size when left out.")
@click.option("--images", default=1, show_default=True, help="Images for each prompt.")
@click.option("--seed", "seeds", type=int, multiple=True, help="One for the batch, or one for each image.")
@click.option("--prior-steps", default=20, show_default=True)
@click.option("--prior-guidance", default=4.0, show_default=True)
@click.option("--decoder-steps", default=10, show_default=True)
@click.option("--decoder-guidance", default=0.0, show_default=True)
@click.option("--size-policy", type=click.Choice(["exact", "diffusers"]), default="exact", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--engine",
    type=click.Choice(["auto", *ENGINES]),
    default="auto",
    show_default=True,
    help="auto is openvino-bf16 where OpenVINO is installed and the CPU multiplies bf16, else onnxruntime. Images "
    "in bf16 differ slightly from those in fp32, which all the others compute in; -mapped is for little memory.",
)
@click.option("--threads", type=click.IntRange(1), help="The engine's own choice when left out.")
@click.option("--force", is_flag=True, help="Replace an existing .png file.")
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    output: Path,
    negative: str,
    size: tuple[int, int] | None,
    images: int,
    seeds: tuple[int, ...],
    device: str,
    engine: str,
    threads: int | None,
    force: bool,
    size_policy: str,
    **steps: Any,
) -> None:
    """Draw images from an exported bundle, without torch.

    Example: cascadekit generate bundle "an image of a shiba inu" --seed 0 -o shiba.png
    """
    from ..runtime.images import image_paths, save_png
    from ..runtime.pipeline import Cascade

    paths = image_paths(output, len(prompts) * images, force=force)
    overrides = {**steps, "size_policy": SizePolicy(size_policy)}
    if size:
        overrides |= {"width": size[0], "height": size[1]}
    seed = seeds[0] if len(seeds) == 1 else seeds or None
    bars = step_progress()
    with Cascade.open(bundle, device, engine=engine, threads=threads, keep_loaded=False) as cascade, bars as progress:
        _warn_of_cuts([*prompts, negative], cascade.tokenizer)
        result = cascade.generate(
            prompts,
            negative=negative,
            num_images=images,
            seed=seed,
            on_step=lambda stage, step: progress(stage, step.index + 1, step.steps),
            **overrides,
        )
    for path, picture, settings in zip(paths, result.images, result.settings, strict=True):
        save_png(path, picture, settings)
        say(f"wrote {path} ({picture.width}x{picture.height}, seed {settings['seed']})")


def _warn_of_cuts(texts: list[str], tokenizer: "ClipTokenizer") -> None:
    for text, cut in zip(texts, tokenizer(texts).truncated, strict=True):
        if cut:
            note(f"{text[:30]!r}...: CLIP reads 77 tokens; cut off: {cut.strip()!r}")

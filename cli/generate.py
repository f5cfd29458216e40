"""The command that draws images."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.settings import Sampler
from ..schemas.sizes import SizePolicy
from ..schemas.stages import Stage
from .common import ENGINES, PATH, parse_loras, parse_size
from .console import note, say, step_progress

if TYPE_CHECKING:
    from ..runtime.pipeline import Cascade
    from ..runtime.sampling import Step
    from ..schemas.request import Request

MOST_PIXELS = 4 << 20  # of all images drawn together, unless --batch says otherwise

Option = Callable[[Callable[..., None]], Callable[..., None]]


def _parse_ratios(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """An option such as 1,0.5,0."""
    try:
        return None if value is None else tuple(float(ratio) for ratio in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected ratios such as 1,0.75,0.5,0.25,0") from None


def _parse_stages(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[Stage, Path]:
    """STAGE=BUNDLE, each."""
    found = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in tuple(Stage) or not path:
            raise click.BadParameter(f"{value!r}: expected a stage and a bundle, such as decoder=lite-bundle")
        found[Stage(name)] = Path(path)
    return found


def _setting(*names: str, default: str = "", **more: Any) -> Option:
    """An option that says nothing unless it is given, so that --like and files can say it instead."""
    return click.option(*names, default=None, show_default=default or False, **more)


# What an image looks like: the fields of a request by their names.
LOOKS: Sequence[Option] = (
    _setting("--negative", default="nothing", help="What the image should not be."),
    click.option("--size", metavar="WxH", callback=parse_size, help="Multiples of 8.  [default: the bundle's]"),
    _setting("--prior-steps", type=int, default="20"),
    _setting("--prior-guidance", type=float, default="4.0"),
    _setting("--decoder-steps", type=int, default="10"),
    _setting("--decoder-guidance", type=float, default="0.0; 1.1 with gdf"),
    _setting("--size-policy", type=click.Choice([str(policy) for policy in SizePolicy]), default="exact"),
    _setting(
        "--sampler",
        type=click.Choice([str(sampler) for sampler in Sampler]),
        default="ddpm-wuerstchen",
        help="diffusers' or Stability's.",
    ),
    _setting("--prior-shift", type=float, default="1.0; 2.0 with gdf", help="Of the noise schedule (gdf)."),
    _setting("--decoder-shift", type=float, default="1.0", help="Of the noise schedule (gdf)."),
    _setting("--rescale", type=float, default="0.7", help="Of guidance (gdf)."),
    _setting("--prior-timesteps", metavar="1,...,0", callback=_parse_ratios, help="Ratios in place of a number."),
    _setting("--decoder-timesteps", metavar="1,...,0", callback=_parse_ratios, help="Ratios in place of a number."),
    click.option("--image-prompt", "image_prompts", multiple=True, help="A picture to follow (repeatable)."),
    _setting("--init-image", help="A picture to vary, or to draw into with --mask."),
    _setting("--strength", type=float, default="0.8", help="How far from --init-image: 0 to 1."),
    _setting("--mask", help="White where --init-image is to be drawn anew."),
    click.option(
        "--control",
        "controls",
        metavar="NAME=PICTURE[:STRENGTH]",
        multiple=True,
        help="canny, inpainting or super_resolution, and what it looks at (repeatable).",
    ),
    click.option("--weighted", is_flag=True, default=None, help="Read (words:1.2) and [words] as emphasis."),
    click.option("--long-prompts", is_flag=True, default=None, help="Read prompts beyond 77 tokens in chunks."),
)

# What draws it.
MACHINERY: Sequence[Option] = (
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option(
        "--engine",
        type=click.Choice(["auto", *ENGINES]),
        default="auto",
        show_default=True,
        help="auto is openvino-bf16 where OpenVINO is installed and the CPU multiplies bf16, else onnxruntime. Images "
        "in bf16 differ slightly from those in fp32, which all the others compute in; -mapped is for little memory.",
    ),
    click.option("--threads", type=click.IntRange(1), help="The engine's own choice when left out."),
    click.option(
        "--memory",
        metavar="resident|staged|N GB",
        default="staged",
        show_default=True,
        help="Stages that stay loaded: all, one at a time, or what fits.",
    ),
    click.option("--batch", type=click.IntRange(1), help="Images drawn together.  [default: 4 of 1024x1024]"),
    click.option(
        "--from",
        "stages",
        metavar="STAGE=BUNDLE",
        multiple=True,
        callback=_parse_stages,
        help="Take a stage from another bundle (repeatable).",
    ),
    click.option(
        "--lora",
        "loras",
        metavar="NAME[:STRENGTH]",
        multiple=True,
        callback=parse_loras,
        help="Merge a LoRA into the weights, in a cache; a file, or a name in $CASCADEKIT_LORAS (repeatable).",
    ),
)


def _all(options: Sequence[Option]) -> Option:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


looks, machinery = _all(LOOKS), _all(MACHINERY)


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("-o", "--output", type=PATH, default=Path("images"), show_default=True, help="Folder or .png file.")
@click.option("--like", type=PATH, help="A PNG made by cascadekit: draw it again, with what else is said changed.")
@click.option("--images", default=1, show_default=True, type=click.IntRange(1), help="Images for each prompt.")
@click.option("--seed", "seeds", type=int, multiple=True, help="One for the batch, or one for each image.")
@looks
@machinery
@click.option("--preview-every", type=click.IntRange(1), metavar="N", help="Show NAME.preview.png every N steps.")
@click.option("--force", is_flag=True, help="Replace an existing .png file.")
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    output: Path,
    like: Path | None,
    images: int,
    seeds: tuple[int, ...],
    batch: int | None,
    preview_every: int | None,
    force: bool,
    **options: Any,
) -> None:
    """Draw images from an exported bundle, without torch.

    Example: cascadekit generate bundle "an image of a shiba inu" --seed 0 -o shiba.png
    """
    from ..runtime.images import image_paths, save_png
    from ..runtime.requests import draw, groups

    engine = {name: options.pop(name) for name in ("device", "engine", "threads", "memory", "stages", "loras")}
    with open_cascade(bundle, **engine) as cascade:
        requests = _requests(cascade, prompts, like, images, seeds, said(options), engine["loras"])
        paths = image_paths(output, len(requests), force=force)
        warn_of_cuts(requests, cascade)
        most = batch or max(1, MOST_PIXELS // (requests[0].settings.width * requests[0].settings.height))
        left = iter(paths)
        with step_progress() as progress:
            for group in groups(requests, most):
                here = [next(left) for _ in group]
                on_step = _on_step(progress, here, preview_every)
                for path, drawn in zip(here, draw(cascade, group, Path(), on_step), strict=True):
                    save_png(path, drawn.image, drawn.metadata)
                    _preview_path(path).unlink(missing_ok=True)
                    say(f"wrote {path} ({drawn.image.width}x{drawn.image.height}, seed {drawn.request.seed})")


def open_cascade(
    bundle: Path,
    *,
    device: str,
    engine: str,
    threads: int | None,
    memory: str,
    stages: Mapping[Stage, Path],
    loras: Sequence[tuple[str, float]],
) -> "Cascade":
    """The cascade that the options of MACHINERY describe."""
    from ..runtime.pipeline import Cascade

    if loras:
        from ..converters.lora.at_load import with_loras

        bundle = with_loras(bundle, loras)
    return Cascade.open(bundle, device, engine=engine, threads=threads, memory=memory, stages=stages)


def said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request from the options of LOOKS that were given."""
    found = {name: value for name, value in options.items() if value not in (None, ()) and name != "size"}
    if options.get("size"):
        found["width"], found["height"] = options["size"]
    return found


def _requests(
    cascade: "Cascade",
    prompts: Sequence[str],
    like: Path | None,
    images: int,
    seeds: Sequence[int],
    given: Mapping[str, Any],
    loras: Sequence[tuple[str, float]],
) -> "list[Request]":
    """One request for each image: of each prompt, `images`."""
    from ..runtime.images import require_settings
    from ..schemas.request import parse_request

    base = require_settings(like) if like else {}
    if not prompts and "prompt" not in base:
        raise click.UsageError("Missing argument 'PROMPT...', or --like with an image to draw again.")
    count = (len(prompts) or 1) * images
    if len(seeds) > 1 and len(seeds) != count:
        raise click.UsageError(f"{len(seeds)} seeds for {count} images; give one, or one for each")
    merged = [{"name": name, "strength": strength} for name, strength in loras]
    common = {**base, **given, **({"loras": merged} if merged else {})}
    places = _places(seeds, count, base)
    return [
        parse_request(
            {**common, **({"prompt": prompts[number // images]} if prompts else {}), **place},
            cascade.manifest.default_size,
        )
        for number, place in enumerate(places)
    ]


def _places(seeds: Sequence[int], count: int, base: Mapping[str, Any]) -> list[dict[str, int]]:
    """Seed, index and batch for each image."""
    if len(seeds) > 1:
        return [{"seed": seed, "index": 0, "batch": 1} for seed in seeds]
    if not seeds and "seed" in base and count == 1:
        return [{}]
    seed = seeds[0] if seeds else base.get("seed", secrets.randbelow(1 << 32))
    return [{"seed": seed, "index": index, "batch": count} for index in range(count)]


def _on_step(
    progress: Callable[[str, int, int], object], paths: Sequence[Path], every: int | None
) -> "Callable[[Stage, Step], None]":
    """Moves the bars on, and puts a preview beside where each image will be."""

    def on_step(stage: Stage, step: "Step") -> None:
        progress(stage, step.index + 1, step.steps)
        if every and stage is Stage.PRIOR and (step.index + 1) % every == 0:
            for path, picture in zip(paths, step.preview(), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(_preview_path(path))

    return on_step


def _preview_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.preview.png")


def warn_of_cuts(requests: "Sequence[Request]", cascade: "Cascade") -> None:
    """Say what CLIP does not read, unless long prompts are read in chunks."""
    texts = {text for each in requests if not each.settings.long_prompts for text in (each.prompt, each.negative)}
    for text, cut in zip(sorted(texts), cascade.tokenizer(sorted(texts)).truncated, strict=True):
        if cut:
            note(f"{text[:30]!r}...: CLIP reads 77 tokens; cut off: {cut.strip()!r}; --long-prompts reads all")

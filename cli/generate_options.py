"""The options of `generate`: those that change the image, and those that choose engine and memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..runtime.engines.engine_table import AUTO, ENGINES
from ..schemas.errors import UsageError
from ..schemas.sampler import Sampler
from ..schemas.sizes import SizePolicy
from ..schemas.stages import Stage
from .options import PATH, GivenPath, choice_option, parse_lora, parse_size, parsed

Option = Callable[[Callable[..., None]], Callable[..., None]]


def _ratios(text: str) -> tuple[float, ...]:
    """The ratios in a text such as 1,0.5,0."""
    try:
        return tuple(float(ratio) for ratio in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r}: expected ratios such as 1,0.75,0.5,0.25,0") from None


def _stage_and_bundle(text: str) -> tuple[Stage, Path]:
    """The parts of STAGE=BUNDLE."""
    name, _, path = text.partition("=")
    if name not in tuple(Stage) or not path:
        raise UsageError(f"{text!r}: expected a stage and a bundle, such as decoder=lite-bundle")
    return Stage(name), Path(path)


def _setting(*names: str, default: str = "", **more: Any) -> Option:
    """An option that is None unless it is given, so that --like and files of prompts can decide."""
    return click.option(*names, default=None, show_default=default or False, **more)


# Options that change the image. Their names are those of a request's fields.
LOOKS: Sequence[Option] = (
    _setting("--negative", default="nothing", help="Text that describes what to avoid."),
    click.option("--size", metavar="WxH", callback=parsed(parse_size), help="Multiples of 8.  [default: the bundle's]"),
    _setting("--prior-steps", type=int, default="20"),
    _setting("--prior-guidance", type=float, default="4.0"),
    _setting("--decoder-steps", type=int, default="10"),
    _setting("--decoder-guidance", type=float, default="0.0; 1.1 with gdf"),
    _setting("--size-policy", type=click.Choice([str(policy) for policy in SizePolicy]), default="exact"),
    _setting(
        "--sampler",
        type=click.Choice([str(sampler) for sampler in Sampler]),
        default="ddpm-wuerstchen",
        help="ddpm-wuerstchen is the sampler of diffusers, gdf the one of Stability.",
    ),
    _setting("--prior-shift", type=float, default="1.0; 2.0 with gdf", help="Shift of the noise schedule (gdf)."),
    _setting("--decoder-shift", type=float, default="1.0", help="Shift of the noise schedule (gdf)."),
    _setting("--rescale", type=float, default="0.7", help="Rescaling of guidance (gdf)."),
    *(
        _setting(
            f"--{stage}-timesteps",
            metavar="1,...,0",
            callback=parsed(_ratios),
            help="Timestep ratios in place of a number of steps.",
        )
        for stage in ("prior", "decoder")
    ),
    click.option(
        "--image-prompt", "image_prompts", multiple=True, metavar="PICTURE", help="A picture to follow (repeatable)."
    ),
    _setting("--init-image", metavar="PICTURE", help="A picture to vary; with --mask, to inpaint."),
    _setting("--strength", type=float, default="0.8", help="How much of --init-image changes: 0 to 1."),
    _setting("--mask", metavar="PICTURE", help="A picture that is white where --init-image is replaced."),
    click.option(
        "--control",
        "controls",
        metavar="NAME=PICTURE[:STRENGTH]",
        multiple=True,
        help="A ControlNet (canny, inpainting or super_resolution) and its picture (repeatable).",
    ),
    click.option("--weighted", is_flag=True, default=None, help="Read (words:1.2) and [words] as emphasis."),
    click.option("--long-prompts", is_flag=True, default=None, help="Read prompts beyond 77 tokens in chunks."),
)

# Options that choose engine, device and memory.
MACHINERY: Sequence[Option] = (
    choice_option(
        "--device", [AUTO, "cpu", "cuda"], "auto is the GPU where there is one that works, else the CPU.", default=AUTO
    ),
    choice_option(
        "--engine",
        [AUTO, *ENGINES],
        "auto is the fastest that is installed: on a GPU TensorRT or AOTInductor if they were built, on a CPU "
        "that multiplies bf16 openvino-bf16, aotinductor or torch-bf16, else onnxruntime, as for small networks. "
        "Images in bf16 differ slightly from those in fp32, the precision of all others; -mapped needs little memory.",
        default=AUTO,
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 4096),
        help="Threads of the CPU.  [default: OMP_NUM_THREADS, else the engine's choice]",
    ),
    click.option(
        "--memory",
        metavar="auto|resident|staged|N GB",
        default=AUTO,
        show_default=True,
        help="Stages that stay loaded: all (resident), one at a time (staged), or as many as fit. auto keeps all if "
        "they fit into half of the free memory.",
    ),
    click.option(
        "--vram",
        type=click.IntRange(1, 1 << 40),
        metavar="MB",
        callback=lambda ctx, param, given: given and given << 20,
        help="GPU memory TensorRT may take.  [default: free]",
    ),
    click.option("--allow-cpu", is_flag=True, help="Let the CPU run what ONNX Runtime cannot run on the GPU."),
    click.option(
        "--cuda-graph/--no-cuda-graph",
        default=True,
        show_default=True,
        help="Let ONNX Runtime capture each step on the GPU as a CUDA graph.",
    ),
    click.option("--tf32", is_flag=True, help="Let ONNX Runtime multiply fp32 in ten bits on the GPU: faster."),
    click.option("--batch", type=click.IntRange(1), help="Images generated together.  [default: 4 of 1024x1024]"),
    click.option(
        "--from",
        "stages",
        metavar="STAGE=BUNDLE",
        multiple=True,
        callback=lambda *given: dict(parsed(_stage_and_bundle)(*given)),
        help="Take a stage from another bundle (repeatable).",
    ),
    click.option(
        "--lora",
        "loras",
        metavar="FILE[:STRENGTH]",
        multiple=True,
        callback=parsed(parse_lora),
        help="Merge a LoRA into the weights, in a cache; a file, or a name in $CASCADEKIT_LORAS (repeatable).",
    ),
)


# Options that concern --prompts.
BATCH: Sequence[Option] = (
    click.option(
        "--prompts",
        "prompt_file",
        type=GivenPath(path_type=Path, allow_dash=True),
        metavar="FILE",
        help=".txt with a prompt a line, - for standard input; .jsonl with a request a line; .csv or .parquet. Other "
        "options fill in the fields that lines leave out. A second run goes on with the images that are not finished.",
    ),
    click.option(
        "--name",
        metavar="TEMPLATE",
        help="File name of each image of --prompts, such as {number:04d}-{seed}-{prompt:.30}; there are also "
        "{width}, {height}, {key} and the line's {name}.  [default: the name, or the number]",
    ),
    click.option(
        "--log",
        type=PATH,
        help="Log of --prompts, as JSON lines.  [default: log.jsonl in the folder]",
    ),
    click.option(
        "--keep-going", is_flag=True, help="Generate the correct lines of --prompts and leave wrong lines out."
    ),
    click.option(
        "--ray",
        metavar="local|HOST:PORT",
        help="Generate the images of --prompts on a Ray cluster, with actors for each stage; local starts one here. "
        "The nodes need the bundle under the same path. Images go through the stages one by one, or --batch together.",
    ),
    click.option(
        "--actors",
        metavar="STAGE=N[,cpus=N][,gpus=N]",
        multiple=True,
        help="Actors of text_encoder, prior or decoder on --ray, and what each takes (repeatable).  [default: as many "
        "as find room and work; a prior and a decoder share a GPU]",
    ),
)


# The sections of `generate --help`, with the names of their parameters.
HELP_GROUPS = {
    "What to generate": ("output", "images", "seeds", "negative", "size", "like", "weighted", "long_prompts"),
    "Pictures and LoRAs": ("image_prompts", "init_image", "strength", "mask", "controls", "loras"),
    "Sampling": (
        "prior_steps",
        "prior_guidance",
        "decoder_steps",
        "decoder_guidance",
        "sampler",
        "prior_shift",
        "decoder_shift",
        "rescale",
        "prior_timesteps",
        "decoder_timesteps",
        "size_policy",
    ),
    "Many prompts from a file": ("prompt_file", "name", "log", "keep_going", "ray", "actors"),
    "Engine and memory": ("device", "engine", "threads", "memory", "vram", "allow_cpu", "batch", "stages"),
}


def together(options: Sequence[Option]) -> Option:
    """A decorator that puts all options of a table on a command."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


looks, machinery = together(LOOKS), together(MACHINERY)

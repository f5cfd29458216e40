"""The command line: parses, calls the library, prints. Everything heavy is imported by the command that needs it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import FAILED, CascadeGroup, byte_progress, note, say, show_table, step_progress
from .schemas.errors import UsageError
from .schemas.layouts import Layout
from .schemas.sizes import SizePolicy
from .schemas.stages import Stage

if TYPE_CHECKING:
    from .converters.identify import Component
    from .runtime.parity.verify import Report
    from .runtime.tokenizer import ClipTokenizer

PATH = click.Path(path_type=Path)
STAGES = click.Choice(["text_encoder", "prior", "decoder", "vqgan"])

INSPECT_COLUMNS = ("component", "layout", "variant", "dtype", "parameters", "problems", "file")
PARITY_COLUMNS = ("compared", "max abs", "mean abs", "relative L2", "cosine", "verdict")


def _parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        width, height = (int(side) for side in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected WIDTHxHEIGHT, such as 1024x768") from None
    return width, height


@click.group(cls=CascadeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cascadekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Convert, export, run and verify Stable Cascade."""


@main.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what a file or folder holds, from its headers alone.

    Example: cascadekit inspect stage_c_lite_bf16.safetensors
    """
    from .converters.model import open_model

    model = open_model([path])
    for text in model.notes:
        note(text)
    components = list(model.components.values())
    if as_json:
        say(json.dumps([_described(component) for component in components], indent=2))
    else:
        show_table("", INSPECT_COLUMNS, map(_inspect_row, components))
        for component in components:
            for line in component.problems.lines():
                say(f"{component.path}: {line}")
    if any(component.problems for component in components):
        raise SystemExit(FAILED)


def _described(component: "Component") -> dict[str, Any]:
    from .schemas.config_json import to_json

    return {
        "path": str(component.path),
        "component": component.stage,
        "layout": component.layout,
        "variant": component.variant,
        "dtypes": component.dtypes,
        "tensors": len(component.tensors),
        "parameters": component.parameters,
        "problems": component.problems.lines(),
        "config": to_json(component.config),
        "metadata": component.metadata,
    }


def _inspect_row(c: "Component") -> tuple[str, ...]:
    problems = str(sum(map(len, vars(c.problems).values()))) if c.problems else "none"
    return c.stage, c.layout, c.variant, ", ".join(c.dtypes), f"{c.parameters:,}", problems, str(c.path)


@main.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Folder to make, or one .safetensors file.")
@click.option("--to", required=True, type=click.Choice(["diffusers", "original"]), help="Layout to write.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder: a Hugging Face folder or file.")
@click.option("--image-encoder", type=PATH, help="CLIP L image encoder: a Hugging Face folder or file.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def convert(
    sources: tuple[Path, ...],
    output: Path,
    to: str,
    text_encoder: Path | None,
    image_encoder: Path | None,
    force: bool,
) -> None:
    """Rewrite checkpoints in another layout, bit for bit the same weights.

    Example: cascadekit convert stage_a.safetensors stage_b.safetensors stage_c.safetensors
    --text-encoder CLIP-ViT-bigG-14 -o model --to diffusers
    """
    from .converters.checkpoint import convert as run

    with byte_progress() as start_file:
        done = run(
            sources,
            output,
            Layout(to),
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            force=force,
            start_file=start_file,
        )
    for text in done.notes:
        note(text)
    say(f"wrote {output} ({', '.join(done.files) or to})")


@main.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Bundle folder to make.")
@click.option("--stage", "stages", multiple=True, type=STAGES, help="Export this stage only (repeatable).")
@click.option("--weights", type=click.Choice(["copy", "link"]), default="copy", show_default=True)
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when MODEL holds none.")
@click.option("--vqgan-scale", type=float, help="Latent scale of the vqgan (diffusers 0.3764, original 0.43).")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def export(
    model: Path,
    output: Path,
    stages: tuple[str, ...],
    weights: str,
    text_encoder: Path | None,
    vqgan_scale: float | None,
    force: bool,
) -> None:
    """Write each stage as an ONNX graph; the weights stay in safetensors files beside it.

    Example: cascadekit export model -o bundle
    """
    from .converters.export import export as run
    from .converters.model import open_model

    with byte_progress() as start_file:
        manifest = run(
            open_model([model], text_encoder=text_encoder),
            output,
            stages=[Stage(stage) for stage in stages],
            weights=weights,
            vqgan_scale=vqgan_scale,
            force=force,
            start_file=start_file,
        )
    say(f"wrote {output} ({', '.join(manifest.stages)})")


@main.command()
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, default=Path("images"), show_default=True, help="Folder or .png file.")
@click.option("--negative", default="", help="What the image should not be.")
@click.option(
    "--size", metavar="WxH", callback=_parse_size, help="Multiples of 8; the bundle's own size when left out."
)
@click.option("--images", default=1, show_default=True, help="Images for each prompt.")
@click.option("--seed", "seeds", type=int, multiple=True, help="One for the batch, or one for each image.")
@click.option("--prior-steps", default=20, show_default=True)
@click.option("--prior-guidance", default=4.0, show_default=True)
@click.option("--decoder-steps", default=10, show_default=True)
@click.option("--decoder-guidance", default=0.0, show_default=True)
@click.option("--size-policy", type=click.Choice(["exact", "diffusers"]), default="exact", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
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
    force: bool,
    size_policy: str,
    **steps: Any,
) -> None:
    """Draw images from an exported bundle, without torch.

    Example: cascadekit generate bundle "an image of a shiba inu" --seed 0 -o shiba.png
    """
    from .runtime.images import image_paths, save_png
    from .runtime.pipeline import Cascade

    paths = image_paths(output, len(prompts) * images, force=force)
    overrides = {**steps, "size_policy": SizePolicy(size_policy)}
    if size:
        overrides |= {"width": size[0], "height": size[1]}
    seed = seeds[0] if len(seeds) == 1 else seeds or None
    with Cascade.open(bundle, device, keep_loaded=False) as cascade, step_progress() as progress:
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


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--against", required=True, type=PATH, help="The model that the bundle was exported from.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when the model holds none.")
@click.option("--stage", "stages", multiple=True, type=STAGES, help="This stage only (repeatable), no trajectory.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    bundle: Path, against: Path, text_encoder: Path | None, stages: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Compare a bundle's engines with PyTorch on the same inputs; exit code 1 when they differ.

    Example: cascadekit verify bundle --against model
    """
    report = _verify(bundle, against, text_encoder, stages, device)
    if as_json:
        say(json.dumps(report.to_json(), indent=2))
    else:
        _print_report(report)
    if not report:
        raise SystemExit(FAILED)


def _verify(
    bundle: Path, against: Path, text_encoder: Path | None = None, stages: tuple[str, ...] = (), device: str = "cpu"
) -> "Report":
    from .converters.model import open_model
    from .runtime.bundle import open_bundle
    from .runtime.engines.onnxruntime import OnnxRuntimeEngine
    from .runtime.parity.verify import verify as run
    from .runtime.tokenizer import ClipTokenizer

    opened = open_bundle(bundle)
    chosen = [Stage(stage) for stage in stages]
    for stage in chosen:
        opened.entry(stage)
    engine = OnnxRuntimeEngine(opened, device)
    model = open_model([against], text_encoder=text_encoder)
    try:
        from .converters.reference import reference_engine
    except ImportError as error:
        raise UsageError(
            "verify compares with PyTorch, which is not installed: pip install 'cascadekit[parity]'"
        ) from error
    reference = reference_engine(model, chosen or list(opened.manifest.stages))
    tokenizer = ClipTokenizer.open(opened.tokenizer)
    return run(engine, reference, opened.manifest, tokenizer, chosen, lambda what: note(f"comparing {what}"))


def _print_report(report: "Report") -> None:
    rows = (
        (
            c.name,
            *(f"{figure:.2e}" for figure in (c.max_abs, c.mean_abs, c.relative_l2)),
            f"{c.cosine:.8f}",
            "; ".join(c.failures) or "ok",
        )
        for c in report.comparisons
    )
    show_table(f"{report.engine} against {report.reference}", PARITY_COLUMNS, rows)
    if report.image_psnr is not None:
        say(f"final image: PSNR {report.image_psnr:.1f} dB" + (" (too low)" if report.image_failed else ""))
    say("passed" if report else "FAILED")


@main.command()
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder to make.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def demo(output: Path, force: bool) -> None:
    """Take a tiny cascade down the whole road: original files, model folder, bundle, image, parity.

    Example: cascadekit demo -o demo
    """
    from .converters.checkpoint import convert as run_convert
    from .converters.export import export as run_export
    from .converters.model import open_model
    from .converters.outputs import staged_output
    from .converters.tiny import write_tiny_cascade
    from .runtime.images import save_png
    from .runtime.pipeline import Cascade

    with staged_output(output, force=force) as folder:
        say("original/    a tiny cascade in Stability's layout")
        write_tiny_cascade(folder / "original")
        say("model/       converted to a model folder")
        run_convert([folder / "original"], folder / "model", Layout.DIFFUSERS)
        say("bundle/      exported to ONNX")
        run_export(open_model([folder / "model"]), folder / "bundle")
        say("image.png    generated with ONNX Runtime")
        with Cascade.open(folder / "bundle") as cascade:
            result = cascade.generate("a tiny cascade", seed=0)
        save_png(folder / "image.png", result.images[0], result.settings[0])
        say("parity.json  compared with PyTorch")
        report = _verify(folder / "bundle", folder / "model")
        (folder / "parity.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    _print_report(report)
    say(f"image: {output / 'image.png'}\nparity table: {output / 'parity.json'}")
    if not report:
        raise SystemExit(FAILED)

"""Commands that make bundles and prove them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas.errors import UsageError
from ..schemas.quantization import Quantization
from ..schemas.stages import Stage
from .common import PATH, STAGES, local, maybe_local
from .console import FAILED, byte_progress, note, say, show_table

if TYPE_CHECKING:
    from ..converters.quantize_choice import Choice
    from ..converters.quantize_export import Quantize
    from ..runtime.parity.verify import Report

PARITY_COLUMNS = ("compared", "max abs", "mean abs", "relative L2", "cosine", "verdict")


@click.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Bundle folder to make.")
@click.option("--stage", "stages", multiple=True, type=STAGES, help="Export this stage only (repeatable).")
@click.option("--weights", type=click.Choice(["copy", "link"]), default="copy", show_default=True)
@click.option(
    "--quantize",
    "kind",
    type=click.Choice([str(kind) for kind in Quantization]),
    default="none",
    show_default=True,
    help="Store Linears of prior, decoder and text encoder in 8 or 4 bits, where they bear it.",
)
@click.option(
    "--quantize-threshold",
    type=click.FloatRange(min=0, min_open=True),
    help="Relative error up to which a Linear is quantised (default: twice that of normal numbers).",
)
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when MODEL holds none.")
@click.option("--vqgan-scale", type=float, help="Latent scale of the vqgan (diffusers 0.3764, original 0.43).")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def export(
    model: Path,
    output: Path,
    stages: tuple[str, ...],
    weights: str,
    kind: str,
    quantize_threshold: float | None,
    text_encoder: Path | None,
    vqgan_scale: float | None,
    force: bool,
) -> None:
    """Write each stage as an ONNX graph; the weights stay in safetensors files beside it.

    Example: cascadekit export model -o bundle
    """
    from ..converters.export import export as run
    from ..converters.model import open_model

    source = open_model([local(model)], text_encoder=maybe_local(text_encoder))
    choices: dict[Stage, Choice] = {}
    with byte_progress() as start_file:
        manifest = run(
            source,
            output,
            stages=[Stage(stage) for stage in stages],
            weights=weights,
            quantize=_quantize(Quantization(kind), quantize_threshold, choices),
            vqgan_scale=vqgan_scale,
            force=force,
            start_file=start_file,
        )
    if choices:
        _show_choices(choices)
    say(f"wrote {output} ({', '.join(manifest.stages)})")


def _quantize(kind: Quantization, threshold: float | None, choices: "dict[Stage, Choice]") -> "Quantize | None":
    """What to quantise; `choices` gets what was chosen for each stage."""
    if kind is Quantization.NONE:
        if threshold is not None:
            raise UsageError("--quantize-threshold says what --quantize tolerates: give both")
        return None
    from ..converters.quantize_export import Quantize

    return Quantize(kind, threshold, choices.__setitem__)


def _show_choices(choices: "dict[Stage, Choice]") -> None:
    from ..converters.quantize_export import COLUMNS, table_rows

    for stage, choice in choices.items():
        show_table(f"{stage} in {choice.scheme.kind}", COLUMNS, table_rows(choice))


@click.command()
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
    report = run_verify(bundle, against, text_encoder, stages, device)
    if as_json:
        say(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)
    if not report:
        raise SystemExit(FAILED)


def run_verify(
    bundle: Path, against: Path, text_encoder: Path | None = None, stages: tuple[str, ...] = (), device: str = "cpu"
) -> "Report":
    from ..converters.model import open_model
    from ..runtime.bundle import open_bundle
    from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
    from ..runtime.parity.verify import verify as run
    from ..runtime.tokenizer import ClipTokenizer

    opened = open_bundle(bundle)
    chosen = [Stage(stage) for stage in stages]
    for stage in chosen:
        opened.entry(stage)
    engine = OnnxRuntimeEngine(opened, device)
    model = open_model([local(against)], text_encoder=maybe_local(text_encoder))
    try:
        from ..converters.reference import reference_engine
    except ImportError as error:
        raise UsageError(
            "verify compares with PyTorch, which is not installed: pip install 'cascadekit[parity]'"
        ) from error
    reference = reference_engine(model, chosen or list(opened.manifest.stages))
    tokenizer = ClipTokenizer.open(opened.tokenizer)
    return run(engine, reference, opened.manifest, tokenizer, chosen, lambda what: note(f"comparing {what}"))


def print_report(report: "Report") -> None:
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

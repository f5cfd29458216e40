"""The command that compares a bundle's engines with PyTorch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas.errors import UsageError
from ..schemas.stages import Stage
from .common import ENGINES, PATH, STAGES, local, maybe_local
from .console import FAILED, note, say, show_table

if TYPE_CHECKING:
    from ..runtime.parity.verify import Report

PARITY_COLUMNS = ("compared", "max abs", "mean abs", "relative L2", "cosine", "verdict")


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--against", required=True, type=PATH, help="The model that the bundle was exported from.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when the model holds none.")
@click.option("--stage", "stages", multiple=True, type=STAGES, help="This stage only (repeatable), no trajectory.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="onnxruntime",
    show_default=True,
    help="Tolerances are those of fp32: a bf16 engine does not keep them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    bundle: Path,
    against: Path,
    text_encoder: Path | None,
    stages: tuple[str, ...],
    device: str,
    engine: str,
    as_json: bool,
) -> None:
    """Compare a bundle's engines with PyTorch on the same inputs; exit code 1 when they differ.

    Example: cascadekit verify bundle --against model
    """
    report = run_verify(bundle, against, text_encoder, stages, device, engine)
    if as_json:
        say(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)
    if not report:
        raise SystemExit(FAILED)


def run_verify(
    bundle: Path,
    against: Path,
    text_encoder: Path | None = None,
    stages: tuple[str, ...] = (),
    device: str = "cpu",
    engine: str = "onnxruntime",
) -> "Report":
    from ..converters.model import open_model
    from ..runtime.bundle import open_bundle
    from ..runtime.engines.table import make_engine
    from ..runtime.parity.verify import verify as run
    from ..runtime.tokenizer import ClipTokenizer

    opened = open_bundle(bundle)
    chosen = [Stage(stage) for stage in stages]
    for stage in chosen:
        opened.entry(stage)
    runs = make_engine(engine, opened, device)
    model = open_model([local(against)], text_encoder=maybe_local(text_encoder))
    try:
        from ..converters.reference import reference_engine
    except ImportError as error:
        raise UsageError(
            "verify compares with PyTorch, which is not installed: pip install 'cascadekit[parity]'"
        ) from error
    reference = reference_engine(model, chosen or list(opened.manifest.stages))
    tokenizer = ClipTokenizer.open(opened.tokenizer)
    return run(runs, reference, opened.manifest, tokenizer, chosen, lambda what: note(f"comparing {what}"))


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

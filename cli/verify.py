"""The command that compares a bundle's engines with a reference, or two checkpoints with each other."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas.errors import UsageError, reraise_interrupt
from ..schemas.stages import Stage
from .common import ENGINES, PATH, STAGES, local, maybe_local, parse_size
from .console import FAILED, note, say, show_table
from .verify_checkpoints import is_bundle, verify_checkpoints
from .verify_inside import Inside, look_inside, print_inside
from .verify_report import check_names, keep

if TYPE_CHECKING:
    from ..converters.checkpoints.open_model import Model
    from ..parity.image_sizes import Sizes
    from ..parity.reference.engine import TorchEngine
    from ..parity.reference_run import Expected
    from ..parity.verify import Report
    from ..storage.bundle import Bundle

PARITY_COLUMNS = ("compared", "max abs", "mean abs", "relative L2", "cosine", "verdict")
REFERENCES = ("cascadekit", "diffusers")
COMPUTE = {"fp64": "float64", "fp32": None, "bf16": "bfloat16", "fp16": "float16"}


@click.command()
@click.argument("bundle", metavar="BUNDLE|CHECKPOINT", type=PATH)
@click.option(
    "--against", type=PATH, help="The model that the bundle was exported from, or the checkpoint that should be equal."
)
@click.option("--recorded", type=PATH, help="What --record wrote, instead of the model; needs no torch.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when the model holds none.")
@click.option("--stage", "stages", multiple=True, type=STAGES, help="This stage only (repeatable), no trajectory.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--engine", type=click.Choice(ENGINES), default="onnxruntime", show_default=True)
@click.option(
    "--reference",
    type=click.Choice(REFERENCES),
    default=REFERENCES[0],
    show_default=True,
    help="PyTorch modules of cascadekit, or those of diffusers and transformers.",
)
@click.option(
    "--reference-precision",
    type=click.Choice(list(COMPUTE)),
    default="fp32",
    show_default=True,
    help="What the reference computes in.",
)
@click.option("--size", metavar="WxH", callback=parse_size, help="Compare at the latents of images so large as well.")
@click.option(
    "--sizes",
    type=click.Choice(["small", "all"]),
    default="small",
    show_default=True,
    help="Of what the bundle's plans are for: up to 640x640 pixels and the least, or all; see docs/parity.md.",
)
@click.option(
    "--record", type=PATH, help="Write what the reference gives to this file, to compare elsewhere; no engine runs."
)
@click.option(
    "--bisect",
    is_flag=True,
    help="Compare every part of each graph by itself and name those that differ; whole stages with --report only.",
)
@click.option(
    "--ranges",
    is_flag=True,
    help="Watch how large values grow, and say which precision each stage bears; whole stages with --report only.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=PATH,
    help="Write a report (repeatable): .html to look at, .json for programs, .xml (JUnit) for build servers.",
)
@click.option(
    "--verdict/--no-verdict",
    default=True,
    help="Write the verdict into the bundle's manifest, if the model is the one it was exported from; or never.",
)
@click.option("--mapping", is_flag=True, help="Of checkpoints: list every tensor and where it lies in both.")
@click.option("--force", is_flag=True, help="Replace an existing recording or report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    bundle: Path,
    against: Path | None,
    recorded: Path | None,
    text_encoder: Path | None,
    stages: tuple[str, ...],
    device: str,
    engine: str,
    reference: str,
    reference_precision: str,
    size: tuple[int, int] | None,
    sizes: str,
    record: Path | None,
    bisect: bool,
    ranges: bool,
    reports: tuple[Path, ...],
    verdict: bool,
    mapping: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Compare a bundle's engines with PyTorch on the same inputs, or two checkpoints tensor by tensor.

    Exit code 1 when they differ. Checkpoints may be in any layouts, and in two dtypes: then values must be what the
    wider ones round to.

    Example: cascadekit verify bundle --against model --report report.html
    """
    check_names(reports, force=force, sources=[path for path in (bundle, against, recorded) if path is not None])
    wanted = {"--record": record is not None, "--bisect": bisect, "--ranges": ranges}
    model = _check_options(against, recorded, wanted, reference)
    if not is_bundle(bundle):
        if not verify_checkpoints(bundle, model, stages, as_json=as_json, mapping=mapping):
            raise SystemExit(FAILED)
        return
    if record is not None:
        named = (text_encoder, stages, engine, reference, reference_precision, size, sizes)
        run_record(bundle, model, record, *named, force=force)
        say(f"wrote {record}")
        return
    inside = Inside()
    if bisect or ranges:
        opened, chosen = _opened(bundle, stages)
        chosen = chosen or list(opened.manifest.stages)
        runs = _reference(_model(model, text_encoder), chosen)
        inside = look_inside(opened, chosen, runs, bisect=bisect, ranges=ranges)
    other = _differences(bundle, against, recorded, text_encoder, stages)
    if other:
        note(f"this is not the model {bundle} was exported from, so no verdict is recorded: {'. '.join(other)}")
    report = None
    if reports or not (bisect or ranges):
        report = run_verify(
            bundle, against, text_encoder, stages, device, engine, reference, reference_precision, recorded, size, sizes
        )
    if as_json:
        differs = {"differs_from_exported": other} if other else {}
        say(json.dumps({**({} if report is None else report.to_json()), **differs, **inside.to_json()}, indent=2))
    else:
        if report is not None:
            print_report(report)
        print_inside(inside)
    if report is not None:
        depth, widths = inside.depth_entries(), inside.range_entries()
        keep(report, bundle, model, reports, record=verdict and not other, depth=depth, ranges=widths)
    if not inside or (report is not None and not report):
        raise SystemExit(FAILED)


def _differences(
    bundle: Path, against: Path | None, recorded: Path | None, text_encoder: Path | None, stages: Sequence[str]
) -> list[str]:
    """What the bundle was exported from that is not what it is compared with, a line each."""
    from ..parity.same_model import differences, recorded_differences

    opened, chosen = _opened(bundle, stages)
    if against is not None:
        return differences(opened.manifest, _model(against, text_encoder), chosen)
    assert recorded is not None
    from ..parity.recording import load_recording

    return recorded_differences(opened.manifest, load_recording(recorded).sources, chosen)


def _check_options(against: Path | None, recorded: Path | None, wanted: dict[str, bool], reference: str) -> Path:
    """The model or recording. Raises UsageError for options that do not go together."""
    if (against is None) == (recorded is None):
        raise UsageError("give --against MODEL, or --recorded FILE that was made from it")
    chosen = [name for name, given in wanted.items() if given]
    if chosen and against is None:
        raise UsageError(f"{chosen[0]} needs the model: give --against MODEL")
    if "--record" in chosen[:-1] or "--record" in chosen[1:]:
        raise UsageError(f"{' and '.join(chosen)}: one at a time")
    if reference != REFERENCES[0] and set(chosen) - {"--record"}:
        raise UsageError(f"{chosen[0]} looks into cascadekit's own modules; leave --reference away")
    given = against or recorded
    assert given is not None
    return given


def run_verify(
    bundle: Path,
    against: Path | None,
    text_encoder: Path | None = None,
    stages: Sequence[str] = (),
    device: str = "cpu",
    engine: str = "onnxruntime",
    reference: str = REFERENCES[0],
    reference_precision: str = "fp32",
    recorded: Path | None = None,
    size: tuple[int, int] | None = None,
    sizes: str = "small",
) -> "Report":
    from ..parity.verify import verify as run
    from ..runtime.engines.table import make_engine
    from ..runtime.text.tokenizer import ClipTokenizer

    opened, chosen = _opened(bundle, stages)
    runs = make_engine(engine, opened, device)
    expected: Expected | TorchEngine
    if recorded is not None:
        from ..parity.recording import load_recording

        expected = load_recording(recorded).expected
    else:
        assert against is not None
        model = _model(against, text_encoder)
        expected = _reference(model, chosen or list(opened.manifest.stages), reference, reference_precision)
    tokenizer = ClipTokenizer.open(opened.tokenizer)
    at = None if recorded else _sizes(opened, runs.name, chosen, size, sizes)
    return run(runs, expected, opened.manifest, tokenizer, chosen, lambda what: note(f"comparing {what}"), at)


def run_record(
    bundle: Path,
    against: Path,
    output: Path,
    text_encoder: Path | None = None,
    stages: Sequence[str] = (),
    engine: str = "onnxruntime",
    reference: str = REFERENCES[0],
    reference_precision: str = "fp32",
    size: tuple[int, int] | None = None,
    sizes: str = "small",
    *,
    force: bool = False,
) -> None:
    from ..parity.recording import record
    from ..parity.reference_run import expect
    from ..runtime.text.tokenizer import ClipTokenizer
    from ..storage.output_rules import require_apart, require_free

    require_apart(output, [bundle, against])
    require_free(output, force=force)
    opened, chosen = _opened(bundle, stages)
    model = _model(against, text_encoder)
    runs = _reference(model, chosen or list(opened.manifest.stages), reference, reference_precision)
    tokenizer = ClipTokenizer.open(opened.tokenizer)
    at = _sizes(opened, engine, chosen, size, sizes)
    expected = expect(
        runs, opened.manifest, tokenizer, chosen, progress=lambda what: note(f"recording {what}"), sizes=at
    )
    record(expected, model.components, output, force=force)


def _opened(bundle: Path, stages: Sequence[str]) -> "tuple[Bundle, list[Stage]]":
    from ..storage.bundle import open_bundle

    opened = open_bundle(bundle)
    chosen = [Stage(stage) for stage in stages]
    for stage in chosen:
        opened.entry(stage)
    return opened, chosen


def _sizes(
    bundle: "Bundle", engine: str, stages: Sequence[Stage], named: tuple[int, int] | None, sizes: str
) -> "Sizes":
    from ..parity.image_sizes import choose_sizes

    found = choose_sizes(bundle.manifest, engine, named, every=sizes == "all", stages=stages)
    if found.left_out:
        sides = ", ".join(f"{width}x{height}" for width, height in found.left_out)
        note(f"left out: {sides}, which plans are for as well; --sizes all compares these too")
    return found


def _model(against: Path, text_encoder: Path | None) -> "Model":
    from ..converters.checkpoints.open_model import open_model

    return open_model([local(against)], text_encoder=maybe_local(text_encoder))


def _reference(
    model: "Model", stages: list[Stage], reference: str = REFERENCES[0], precision: str = "fp32"
) -> "TorchEngine":
    """The reference for `stages`, and for the text encoder if the model has it: prompts are embedded with it."""
    try:
        from ..parity.reference.loading import independent_engine, reference_engine
    except ImportError as error:
        reraise_interrupt(error)
        raise UsageError(
            "verify compares with PyTorch, which is not installed: pip install 'cascadekit[parity]'; "
            "or give --recorded FILE"
        ) from error
    wanted = list(dict.fromkeys([*stages, *({Stage.TEXT_ENCODER} & model.components.keys())]))
    make = {"cascadekit": reference_engine, "diffusers": independent_engine}[reference]
    return make(model, wanted, compute=COMPUTE[precision])


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
    if report.left_out:
        what = "; ".join(report.left_out)
        note(f"left out, since {report.engine} was built for other sizes: {what}")
    show_table(f"{report.engine} against {report.reference}", PARITY_COLUMNS, rows)
    if report.image_psnr is not None:
        say(f"final image: PSNR {report.image_psnr:.1f} dB" + (" (too low)" if report.image_failed else ""))
    say("passed" if report else "FAILED")

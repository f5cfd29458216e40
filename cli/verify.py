"""The command that compares a bundle's engines with a reference, or two checkpoints with each other."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..parity.comparison_options import REFERENCE_DTYPES, REFERENCES
from ..runtime.engines.engine_table import ENGINES
from ..schemas.errors import UsageError
from .console import FAILED, finish, note, say, say_json
from .help import HelpfulCommand
from .options import AS_JSON, PATH, STAGES, choice_option, parse_size, parsed, volume_options
from .verify_checkpoints import verify_checkpoints
from .verify_print import next_steps, print_report, report_json

# The options of a bundle that do not concern `record_reference`.
NOT_RECORDED = ("recorded", "device", "bisect", "ranges", "reports", "verdict")
OF_CHECKPOINTS = ("stages", "verdict", "force")  # options that two checkpoints can be compared with


@click.command(cls=HelpfulCommand)
@click.argument("bundle", metavar="BUNDLE|CHECKPOINT", type=PATH)
@click.option(
    "--against", type=PATH, help="The model that the bundle was exported from, or the checkpoint that should be equal."
)
@click.option("--recorded", type=PATH, help="A file that --record wrote, instead of the model; needs no torch.")
@click.option("--text-encoder", type=PATH, help="CLIP bigG text encoder, when the model has none.")
@click.option(
    "--stage", "stages", multiple=True, type=STAGES, help="Compare this stage only (repeatable), and no trajectory."
)
@choice_option("--device", ["cpu", "cuda"], default="cpu")
@choice_option("--engine", [*ENGINES], default="onnxruntime")
@choice_option(
    "--reference",
    REFERENCES,
    "PyTorch modules of cascadekit, or those of diffusers and transformers.",
    default=REFERENCES[0],
)
@choice_option(
    "--reference-precision", list(REFERENCE_DTYPES), "Precision that the reference computes in.", default="fp32"
)
@choice_option("--reference-device", ["cpu", "cuda"], "Device that the reference computes on.", default="cpu")
@click.option(
    "--size", metavar="WxH", callback=parsed(parse_size), help="Also compare at the latents of images of this size."
)
@choice_option(
    "--sizes",
    ["small", "all"],
    "The plans' image sizes to compare: up to 640x640 plus each profile's minimum, or all.",
    default="small",
)
@click.option(
    "--record", type=PATH, help="Write the reference's outputs to this file, to compare elsewhere; no engine runs."
)
@click.option(
    "--bisect",
    is_flag=True,
    help="Compare every part of each graph by itself and name those that differ; whole stages with --report only.",
)
@click.option(
    "--ranges",
    is_flag=True,
    help="Measure how large activations grow, and which precision suits each stage; whole stages with --report only.",
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
    help="Write the verdict into the bundle's manifest, if the model is the one that the bundle was exported from.",
)
@click.option("--mapping", is_flag=True, help="With two checkpoints: list every tensor and its location in both.")
@click.option("--force", is_flag=True, help="Replace an existing recording or report.")
@AS_JSON
@volume_options
def verify(
    bundle: Path, against: Path | None, record: Path | None, mapping: bool, as_json: bool, **options: Any
) -> None:
    """Compare a bundle with PyTorch, or two checkpoints.

    A bundle's engines get the same inputs as PyTorch. Checkpoints are compared tensor by tensor.

    Exit code 1 when they differ. Checkpoints may have any layouts, and two dtypes: then values must be equal once the
    wider ones are rounded to the narrower dtype.

    Example: cascadekit verify bundle --against model --report report.html
    """
    from ..storage.bundle_lock import is_bundle

    _check_options(bundle, against, record, options)
    if not is_bundle(bundle):
        _refuse({*options, "record"} - {*OF_CHECKPOINTS}, f"{bundle}: is no bundle, and verify compares checkpoints")
        assert against is not None
        passed = verify_checkpoints(bundle, against, options["stages"], as_json=as_json, mapping=mapping)
    elif mapping:
        raise UsageError(f"{bundle}: is a bundle, and --mapping lists the tensors of two checkpoints; leave it out")
    elif record is not None:
        _refuse({*NOT_RECORDED} - {"verdict"}, "--record runs the reference alone,")
        assert against is not None
        passed = True
        recorded = {name: value for name, value in options.items() if name not in NOT_RECORDED}
        _record(bundle, against, record, recorded, as_json=as_json)
    else:
        passed = _verify(bundle, against, options, as_json=as_json)
    if not passed:
        raise SystemExit(FAILED)


def _refuse(names: Collection[str], why: str) -> None:
    """Raise UsageError for options of these names on the command line, where they would do nothing."""
    ctx = click.get_current_context()
    given = [
        max(param.opts + param.secondary_opts, key=len)
        for param in ctx.command.params
        if param.name in names and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(f"{why} without {', '.join(given)}; leave {'them' if given[1:] else 'it'} out")


def _check_options(bundle: Path, against: Path | None, record: Path | None, options: dict[str, Any]) -> None:
    """Raise UsageError before anything is read."""
    from ..parity.comparison_options import ComparisonOptions, check_options
    from ..parity.report.write_report import check_report_names

    recorded = options["recorded"]
    sources = [path for path in (bundle, against, recorded) if path is not None]
    check_report_names(options["reports"], force=options["force"], sources=sources)
    names = ("reference", "reference_device", "reference_precision", "engine", "device", "size")
    compared = ComparisonOptions(against=against, recorded=recorded, **{name: options[name] for name in names})
    check_options(compared, record=record is not None, bisect=options["bisect"], ranges=options["ranges"])


def _record(bundle: Path, against: Path, record: Path, options: dict[str, Any], *, as_json: bool) -> None:
    from ..parity.verify import record_reference

    record_reference(bundle, against, record, **options, say=note)
    finish(f"wrote {record}", {"output": str(record)}, as_json=as_json)


def _verify(bundle: Path, against: Path | None, options: dict[str, Any], *, as_json: bool) -> bool:
    """Verify the bundle and print the report; returns whether it passed."""
    from ..parity.verify import verify as run

    report = run(bundle, against, **options, say=note)
    if as_json:
        say_json(report_json(report))
    else:
        print_report(report)
        for line in next_steps(report, bundle, against):
            say(line)
    return bool(report)

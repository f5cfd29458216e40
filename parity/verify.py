"""Verifies a bundle: `verify` compares an engine with PyTorch, `record_reference` saves the outputs of PyTorch."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..converters.checkpoints.open_model import Model, open_model
from ..runtime.engines.table import make_engine
from ..schemas.callbacks import Say
from ..schemas.errors import CascadeError, UsageError, reraise_interrupt
from ..schemas.json_text import well_formed
from ..schemas.stages import Stage
from ..storage.bundle import Bundle, open_bundle
from ..storage.output_rules import require_apart, require_free
from .compare_engine import compare_engine
from .image_sizes import SizeChoice, choose_sizes
from .comparison_options import REFERENCE_DTYPES, REFERENCES, ComparisonOptions, check_options
from .recording import Recording, read_recording, write_recording
from .reference_run import run_reference
from .report.write_report import Circumstances, build_report, check_report_names, write_report
from .report.circumstances import running_command, software, used_files
from .results import Report
from .same_model import differences, recording_differences
from .verdict import make_verdict, record_verdict

if TYPE_CHECKING:
    from .inside.bisect import Bisection
    from .inside.ranges import RangeAdvice
    from .reference.torch_engine import TorchEngine


def verify(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    recorded: str | Path | None = None,
    text_encoder: str | Path | None = None,
    stages: Sequence[Stage | str] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    engine: str = "onnxruntime",
    reference: Literal["cascadekit", "diffusers"] = "cascadekit",
    reference_precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32",
    size: tuple[int, int] | None = None,
    sizes: Literal["small", "all"] = "small",
    bisect: bool = False,
    ranges: bool = False,
    reports: Sequence[str | Path] = (),
    verdict: bool = True,
    force: bool = False,
    say: Say = lambda text: None,
) -> Report:
    """Compare a bundle's engine with a PyTorch reference on the same inputs; the report is true when all passed.

    ```python
    report = cascadekit.verify("bundle", against="model", reports=["report.html"])
    assert report, [str(comparison) for comparison in report.comparisons if not comparison]
    ```

    Args:
        bundle: The bundle's folder.
        against: The model that the bundle was exported from: a file, a folder, or `hf://owner/repo`. Needs torch.
        recorded: A file that `record_reference` wrote, instead of the model. Needs no torch.
        text_encoder: The CLIP bigG text encoder, when the model has none.
        stages: The stages to compare. With none named, all stages and the trajectory of one image are compared.
        device: Where the engine runs.
        engine: The engine to compare, by a name in `runtime.engines.table.ENGINES`.
        reference: The networks of cascadekit, or those of diffusers and transformers.
        reference_precision: What the reference computes in.
        size: (width, height) in pixels of an image; stages are compared at its latents as well.
        sizes: Which image sizes of the plans' profiles to compare: up to 640x640 plus each profile's minimum, or all.
        bisect: Compare every part of each graph by itself. Whole stages are then compared for `reports` only.
        ranges: Measure how large activations grow. Whole stages are then compared for `reports` only.
        reports: Files to write the report to: .html, .json or .xml (JUnit).
        verdict: Write the verdict into the bundle's manifest if the model is the one the bundle was exported from.
        force: Replace existing reports.
        say: Called with each line of progress.

    Raises:
        UsageError: Arguments do not go together, a stage is missing, or a report cannot be written.
        CheckpointError: The bundle, the model or the recording is damaged.
        EngineError: A stage cannot be loaded or run.
    """
    options = ComparisonOptions(
        against=_path(against),
        recorded=_path(recorded),
        text_encoder=_path(text_encoder),
        stages=tuple(Stage(stage) for stage in stages),
        device=device,
        engine=engine,
        reference=reference,
        reference_precision=reference_precision,
        size=size,
        sizes=sizes,
    )
    paths = tuple(Path(path) for path in reports)
    check_report_names(paths, force=force, sources=_sources(Path(bundle), options))
    check_options(options, bisect=bisect, ranges=ranges)
    options = _fetched(options, say)
    opened = _open_bundle(Path(bundle), options.stages)
    source = _open_source(options)
    report = Report("", "")
    if (bisect or ranges) and isinstance(source, Model):
        reference_engine = _load_reference(source, opened, options.stages)
        report = _look_inside(opened, reference_engine, options.stages, bisect=bisect, ranges=ranges, say=say)
    differs = tuple(_differences(opened, source, options.stages))
    if differs:
        say(f"this is not the model {bundle} was exported from, so no verdict is recorded: {'. '.join(differs)}")
    if paths or not (bisect or ranges):
        compared = _compare(opened, source, options, say)
        report = replace(compared, bisections=report.bisections, ranges=report.ranges)
    report = replace(report, differs=differs)
    if report.comparisons:
        _write_reports(paths, report, opened, options, say)
        if verdict and not differs:
            _record_verdict(report, opened, say)
    return report


def record_reference(
    bundle: str | Path,
    against: str | Path,
    record: str | Path,
    *,
    text_encoder: str | Path | None = None,
    stages: Sequence[Stage | str] = (),
    engine: str = "onnxruntime",
    reference: Literal["cascadekit", "diffusers"] = "cascadekit",
    reference_precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32",
    size: tuple[int, int] | None = None,
    sizes: Literal["small", "all"] = "small",
    force: bool = False,
    say: Say = lambda text: None,
) -> None:
    """Run the reference of a bundle and write its outputs to the file `record`; no engine runs.

    `verify(bundle, recorded=...)` then compares the bundle on machines without the model and without torch. The
    arguments are those of `verify`; `engine` is the one that will be compared, whose plans decide the sizes.

    ```python
    cascadekit.record_reference("bundle", "model", "reference.safetensors")
    report = cascadekit.verify("bundle", recorded="reference.safetensors", device="cuda")
    ```

    Raises UsageError when the file exists and `force` is not set, or when a stage is missing."""
    options = ComparisonOptions(
        against=_path(against),
        text_encoder=_path(text_encoder),
        stages=tuple(Stage(stage) for stage in stages),
        engine=engine,
        reference=reference,
        reference_precision=reference_precision,
        size=size,
        sizes=sizes,
    )
    output = Path(record)
    require_apart(output, _sources(Path(bundle), options))
    require_free(output, force=force)
    options = _fetched(options, say)
    opened = _open_bundle(Path(bundle), options.stages)
    model = _open_source(options)
    assert isinstance(model, Model)
    runs = _load_reference(model, opened, options.stages, reference, reference_precision)
    chosen = _choose_sizes(opened, options.engine, options, say)
    outputs = run_reference(runs, opened, options.stages, sizes=chosen, say=lambda what: say(f"recording {what}"))
    write_recording(outputs, model.components, output, force=force)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _sources(bundle: Path, options: ComparisonOptions) -> list[Path]:
    """The files and folders that are read, which no output may replace."""
    return [path for path in (bundle, options.against, options.recorded) if path is not None]


def _fetched(options: ComparisonOptions, say: Say) -> ComparisonOptions:
    """The options with every hf:// source downloaded, and its local path in place of its name."""
    from ..converters.hub import local_path

    def local(source: Path | None) -> Path | None:
        return None if source is None else local_path(source, say)

    return replace(options, against=local(options.against), text_encoder=local(options.text_encoder))


def _open_bundle(path: Path, stages: Sequence[Stage]) -> Bundle:
    bundle = open_bundle(path)
    for stage in stages:
        bundle.entry(stage)
    return bundle


def _open_source(options: ComparisonOptions) -> Model | Recording:
    """What the bundle is compared with: a model, or a recording of its reference."""
    if options.recorded is not None:
        return read_recording(options.recorded)
    assert options.against is not None
    return open_model([options.against], text_encoder=options.text_encoder)


def _load_reference(
    model: Model, bundle: Bundle, stages: Sequence[Stage], reference: str = REFERENCES[0], precision: str = "fp32"
) -> "TorchEngine":
    """The reference for the chosen stages, and for the text encoder if the model has one: it embeds the prompts."""
    try:
        from .reference.loading import independent_engine, reference_engine
    except ImportError as error:
        reraise_interrupt(error)
        raise UsageError(
            "verify compares with PyTorch, which is not installed: pip install 'cascadekit[parity]'; "
            "or give recorded=..."
        ) from error
    chosen = stages or tuple(bundle.manifest.stages)
    wanted = list(dict.fromkeys([*chosen, *({Stage.TEXT_ENCODER} & model.components.keys())]))
    make = {"cascadekit": reference_engine, "diffusers": independent_engine}[reference]
    return make(model, wanted, compute=REFERENCE_DTYPES[precision])


def _choose_sizes(bundle: Bundle, engine: str, options: ComparisonOptions, say: Say) -> SizeChoice:
    every = options.sizes == "all"
    chosen = choose_sizes(bundle.manifest, engine, options.size, every=every, stages=options.stages)
    if chosen.left_out:
        sides = ", ".join(f"{width}x{height}" for width, height in chosen.left_out)
        say(f'left out: {sides}, which plans are for as well; sizes="all" compares these too')
    return chosen


def _compare(bundle: Bundle, source: Model | Recording, options: ComparisonOptions, say: Say) -> Report:
    engine = make_engine(options.engine, bundle, options.device)

    def progress(what: str) -> None:
        say(f"comparing {what}")

    if isinstance(source, Recording):
        return compare_engine(engine, source.outputs, bundle, options.stages, say=progress)
    reference = _load_reference(source, bundle, options.stages, options.reference, options.reference_precision)
    sizes = _choose_sizes(bundle, engine.name, options, say)
    return compare_engine(engine, reference, bundle, options.stages, sizes=sizes, say=progress)


def _look_inside(
    bundle: Bundle, reference: "TorchEngine", stages: Sequence[Stage], *, bisect: bool, ranges: bool, say: Say
) -> Report:
    """A report with bisections and ranges alone; one stage is in memory at a time."""
    from .inside.bisect import bisect_stage
    from .inside.ranges import advise

    bisections: list[Bisection] = []
    advices: list[RangeAdvice] = []
    for stage in stages or tuple(bundle.manifest.stages):
        if bisect:
            say(f"comparing the parts of {stage}")
            bisections.append(bisect_stage(bundle, stage, reference))
        if ranges:
            say(f"measuring the ranges of {stage}")
            advices.append(advise(bundle, stage, reference))
    return Report("", reference.name, bisections=tuple(bisections), ranges=tuple(advices))


def _differences(bundle: Bundle, source: Model | Recording, stages: Sequence[Stage]) -> list[str]:
    """A line for each stage in which `source` is not the model that the bundle was exported from."""
    if isinstance(source, Recording):
        return recording_differences(bundle.manifest, source.sources, stages)
    return differences(bundle.manifest, source, stages)


def _write_reports(paths: Sequence[Path], report: Report, bundle: Bundle, options: ComparisonOptions, say: Say) -> None:
    if not paths:
        return
    against = options.against or options.recorded
    assert against is not None
    compared = {comparison.stage for comparison in report.comparisons}
    files = used_files(bundle.manifest, [stage for stage in bundle.manifest.stages if stage in compared], against)
    circumstances = Circumstances(well_formed(bundle.root.absolute().name), running_command(), software(), files)
    whole = build_report(report, bundle.manifest, circumstances)
    for path in paths:
        write_report(path, whole, report.images)
        say(f"wrote {path}")


def _record_verdict(report: Report, bundle: Bundle, say: Say) -> None:
    """A manifest that cannot be written is worth a line to the user; the report stands."""
    try:
        record_verdict(bundle, make_verdict(report, bundle.manifest, f"cascadekit {version('cascadekit')}"))
    except CascadeError as error:
        say(str(error))

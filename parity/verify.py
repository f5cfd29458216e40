"""Verifies a bundle: `verify` compares an engine with PyTorch, `record_reference` saves the outputs of PyTorch."""

from __future__ import annotations  # help() shows the types as they are written here

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..converters.checkpoints.open_model import Model, open_model
from ..runtime.engines.engine_table import make_engine
from ..schemas.callbacks import Say, ignored
from ..schemas.choices import several, stages_of
from ..schemas.created_by import created_by
from ..schemas.errors import CascadeError, MissingPackageError, UsageError, reraise_interrupt
from ..schemas.messages import known_keywords
from ..schemas.stages import Stage
from ..storage.bundle import Bundle, open_bundle
from ..storage.install_hint import install_hint
from ..storage.output_rules import require_apart, require_free, require_writable
from .compare_engine import compare_engine
from .comparison_options import REFERENCE_DTYPES, ComparisonOptions, check_options
from .image_sizes import SizeChoice, choose_sizes
from .recording import Recording, read_recording, write_recording
from .reference_run import run_reference
from .report.circumstances import circumstances_of
from .report.write_report import build_report, check_report_names, write_report
from .results import Report
from .same_model import ModelDifference, cause, differences, recording_differences
from .verdict import make_verdict, record_verdict

if TYPE_CHECKING:
    from ..runtime.engines.protocol import Engine
    from .reference.torch_engine import TorchEngine


@known_keywords
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
    reference_device: Literal["cpu", "cuda"] = "cpu",
    size: tuple[int, int] | None = None,
    sizes: Literal["small", "all"] = "small",
    bisect: bool = False,
    ranges: bool = False,
    reports: Sequence[str | Path] = (),
    verdict: bool = True,
    force: bool = False,
    say: Say = ignored,
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
        device: The device that the engine runs on.
        engine: The engine to compare, by a name in `runtime.engines.engine_table.ENGINES`.
        reference: The networks of cascadekit, or those of diffusers and transformers.
        reference_precision: The precision that the reference computes in.
        reference_device: The device that the reference computes on; a GPU without TF32.
        size: (width, height) in pixels of an image; stages are compared at its latents as well.
        sizes: Compare the image sizes of the plans' profiles up to 640x640 plus each profile's minimum, or all.
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
    options = _options(
        against=against,
        recorded=recorded,
        text_encoder=text_encoder,
        stages=stages,
        device=device,
        engine=engine,
        reference=reference,
        reference_precision=reference_precision,
        reference_device=reference_device,
        size=size,
        sizes=sizes,
    )
    paths = tuple(map(Path, several(reports)))
    check_report_names(paths, force=force, sources=_sources(bundle, options))
    check_options(options, bisect=bisect, ranges=ranges)
    _require_device(options.reference_device)
    run = _open(bundle, options, say)
    whole = bool(paths) or not (bisect or ranges)
    engine_here = run.engine() if whole else None  # what cannot run here is refused before anything is compared
    inside = run.look_inside(bisect=bisect, ranges=ranges)
    others = run.differences()
    differs = tuple(other.line for other in others)
    if others:
        what = f"{cause(others)} than {bundle} was exported from, so no verdict is recorded"
        say(f"{what}: {'. '.join(differs)}")
    if engine_here is None:
        return replace(inside, differs=differs)
    report = replace(run.compare(engine_here), bisections=inside.bisections, ranges=inside.ranges, differs=differs)
    run.write_reports(paths, report)
    if verdict and not differs:
        run.record_verdict(report)
    return report


@known_keywords
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
    reference_device: Literal["cpu", "cuda"] = "cpu",
    size: tuple[int, int] | None = None,
    sizes: Literal["small", "all"] = "small",
    force: bool = False,
    say: Say = ignored,
) -> None:
    """Run the reference of a bundle and write its outputs to the file `record`; no engine runs.

    `verify(bundle, recorded=...)` then compares the bundle on machines without the model and without torch. The
    arguments are those of `verify`; `engine` is the one that will be compared, whose plans decide the sizes.

    ```python
    cascadekit.record_reference("bundle", "model", "reference.safetensors")
    report = cascadekit.verify("bundle", recorded="reference.safetensors", device="cuda")
    ```

    Raises UsageError when the file exists and `force` is not set, or when a stage is missing."""
    options = _options(
        against=against,
        text_encoder=text_encoder,
        stages=stages,
        engine=engine,
        reference=reference,
        reference_precision=reference_precision,
        reference_device=reference_device,
        size=size,
        sizes=sizes,
    )
    output = Path(record)
    check_options(options, record=True)
    _require_device(options.reference_device)
    require_writable(output)
    require_apart(output, _sources(bundle, options))
    require_free(output, force=force)
    _open(bundle, options, say).record_outputs(output, force=force)


def _options(stages: Sequence[Stage | str], **given: Any) -> ComparisonOptions:
    """The arguments of a call as options: stages by name and paths as text become values."""
    paths = {name: Path(given[name]) for name in ("against", "recorded", "text_encoder") if given.get(name) is not None}
    return ComparisonOptions(stages=stages_of(stages), **{**given, **paths})


@contextmanager
def _torch_needed() -> Iterator[None]:
    """Inside, an ImportError becomes a MissingPackageError that says how to install PyTorch."""
    try:
        yield
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(
            f"verify compares with PyTorch, which is not installed: {install_hint('parity')}; or give recorded=..."
        ) from error


def _require_device(device: str) -> None:
    """Raise UsageError when PyTorch cannot compute on `device`, before anything is read."""
    if device == "cpu":
        return
    with _torch_needed():
        from ..runtime.engines.pytorch.device import gpu_problem
    if problem := gpu_problem(device):
        raise UsageError(f'reference_device="{device}": {problem}, or set reference_device="cpu"')


def _sources(bundle: str | Path, options: ComparisonOptions) -> list[Path]:
    """The files and folders that are read, which no output may replace."""
    return [path for path in (Path(bundle), options.against, options.recorded) if path is not None]


def _open(path: str | Path, options: ComparisonOptions, say: Say) -> _Verification:
    """Download what is named hf://..., then open the bundle, and the model or the recording."""
    from ..converters.hub import local_path

    def local(source: Path | None) -> Path | None:
        return None if source is None else local_path(source, say)

    options = replace(options, against=local(options.against), text_encoder=local(options.text_encoder))
    bundle = open_bundle(Path(path))
    for stage in options.stages:
        bundle.entry(stage)
    if options.recorded is not None:
        return _Verification(bundle, read_recording(options.recorded), options, say)
    assert options.against is not None
    return _Verification(bundle, open_model([options.against], text_encoder=options.text_encoder), options, say)


@dataclass(frozen=True)
class _Verification:
    """A bundle, and the model or recording that it is compared with."""

    bundle: Bundle
    source: Model | Recording
    options: ComparisonOptions
    say: Say

    def differences(self) -> list[ModelDifference]:
        """A line for each stage in which the source is not the model that the bundle was exported from."""
        manifest, stages = self.bundle.manifest, self.options.stages
        if isinstance(self.source, Recording):
            return recording_differences(manifest, self.source.sources, stages)
        return differences(manifest, self.source, stages)

    def look_inside(self, *, bisect: bool, ranges: bool) -> Report:
        """A report with bisections and ranges alone; one stage is in memory at a time."""
        if not (bisect or ranges):
            return Report("", "")
        from .inside.bisect import bisect_stage
        from .inside.ranges import advise

        reference = self._reference()
        bisections, advices = [], []
        for stage in self.options.stages or tuple(self.bundle.manifest.stages):
            if bisect:
                self.say(f"comparing the parts of {stage}")
                bisections.append(bisect_stage(self.bundle, stage, reference))
            if ranges:
                self.say(f"measuring the ranges of {stage}")
                advices.append(advise(self.bundle, stage, reference))
        return Report("", reference.name, bisections=tuple(bisections), ranges=tuple(advices))

    def engine(self) -> Engine:
        """The engine to compare; nothing is loaded yet. Raises EngineError when it cannot run here."""
        return make_engine(self.options.engine, self.bundle, self.options.device)

    def compare(self, engine: Engine) -> Report:
        options, say = self.options, self._each("comparing")
        if isinstance(self.source, Recording):
            return compare_engine(engine, self.source.outputs, self.bundle, options.stages, say=say)
        reference, sizes = self._reference(options.reference_precision), self._sizes(engine.name)
        return compare_engine(engine, reference, self.bundle, options.stages, sizes=sizes, say=say)

    def record_outputs(self, output: Path, *, force: bool) -> None:
        """Run the reference and write its outputs."""
        assert isinstance(self.source, Model)
        reference, sizes = self._reference(self.options.reference_precision), self._sizes(self.options.engine)
        say = self._each("recording")
        outputs = run_reference(reference, self.bundle, self.options.stages, sizes=sizes, say=say)
        write_recording(outputs, self.source.components, output, force=force)

    def write_reports(self, paths: Sequence[Path], report: Report) -> None:
        """Write the report to each of `paths`."""
        if not paths:
            return
        against = self.options.against or self.options.recorded
        assert against is not None
        compared = {comparison.stage for comparison in report.comparisons}
        whole = build_report(report, self.bundle.manifest, circumstances_of(self.bundle, compared, against))
        for path in paths:
            write_report(path, whole, report.images)
            self.say(f"wrote {path}")

    def record_verdict(self, report: Report) -> None:
        """Record the verdict. When the manifest cannot be written, the user is told and the report stays valid."""
        try:
            record_verdict(self.bundle, make_verdict(report, self.bundle.manifest, created_by()))
        except CascadeError as error:
            self.say(str(error))

    def _each(self, doing: str) -> Say:
        return lambda what: self.say(f"{doing} {what}")

    def _reference(self, precision: str = "fp32") -> TorchEngine:
        """The reference for the chosen stages, and for the text encoder if the model has one: it embeds the prompts."""
        with _torch_needed():
            from .reference.loading import independent_engine, reference_engine
        assert isinstance(self.source, Model)
        chosen = self.options.stages or tuple(self.bundle.manifest.stages)
        wanted = list(dict.fromkeys([*chosen, *({Stage.TEXT_ENCODER} & self.source.components.keys())]))
        make = {"cascadekit": reference_engine, "diffusers": independent_engine}[self.options.reference]
        device = self.options.reference_device
        return make(self.source, wanted, compute=REFERENCE_DTYPES[precision], device=device)

    def _sizes(self, engine: str) -> SizeChoice:
        options = self.options
        every = options.sizes == "all"
        chosen = choose_sizes(self.bundle.manifest, engine, options.size, every=every, stages=options.stages)
        if chosen.left_out:
            sides = ", ".join(f"{width}x{height}" for width, height in chosen.left_out)
            self.say(f'left out: {sides}, for which there are plans as well; sizes="all" compares these too')
        return chosen

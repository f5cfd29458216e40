"""Compares an engine with a reference: stage by stage, step by step, and the final image."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from ..runtime.engines.protocol import Engine, StageRunner
from ..schemas.callbacks import Say, ignored
from ..schemas.errors import OutsideProfileError, UsageError
from ..schemas.manifest import Manifest
from ..schemas.precision import Precision
from ..schemas.quantization import Quantization
from ..schemas.report import Comparison
from ..schemas.stages import Stage
from ..storage.bundle import Bundle
from .compare import Kind, Subject, compare
from .image_metrics import psnr
from .image_sizes import SizeChoice
from .reference_run import ReferenceOutputs, ReferencePass, Trajectory, generate_image, reproduce_noise, run_reference
from .results import Report
from .sample_inputs import SITUATIONS
from .stage_parts import stage_loaders
from .tolerances import StageTolerance, coarser, psnr_needed, stage_tolerance, trajectory_tolerance


def compare_engine(
    engine: Engine,
    reference: Engine | ReferenceOutputs,
    bundle: Bundle,
    stages: Sequence[Stage] = (),
    *,
    sizes: SizeChoice | None = None,
    say: Say = ignored,
) -> Report:
    """Compare `engine` with a reference engine, or with the outputs that a reference gave before.

    The stages compared are `stages`, or all stages of the bundle when none are named. The trajectory is compared too
    when no stage is named and the bundle has the stages it takes. `sizes` come from `choose_sizes`. Inputs of sizes
    that the engine was not built for are left out, and the report names them.

    The reference runs first, then the engine, each with one stage in memory. Raises EngineError when a stage cannot be
    loaded or run, and OutsideProfileError when the engine accepts none of a stage's inputs. Raises UsageError when
    `reference` holds no outputs of a stage."""
    manifest = bundle.manifest
    if not isinstance(reference, ReferenceOutputs):
        kinds = floor_kinds(engine, manifest, stages)
        reference = run_reference(reference, bundle, stages, kinds=kinds, sizes=sizes, say=say)
    chosen = tuple(stages or manifest.stages)
    missing = [stage for stage in chosen if stage not in reference.stages]
    if missing:
        have = ", ".join(reference.stages)
        raise UsageError(
            f"the recording has no outputs of the {missing[0]}, only of {have}; record it, or choose stages with "
            f'stages=["{reference.stages[0]}"]'
        )
    tolerances = {
        stage: stage_tolerance(manifest.stages[stage], engine.precision, reference.floors.get(stage, {}))
        for stage in chosen
    }
    calls = reference.trajectory.calls if reference.trajectory and not stages else ()
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    for stage in chosen:
        say(f"{stage} on {engine.name}")
        passes = [each for each in (*reference.passes, *calls) if each.stage is stage]
        comparisons += _compare_stage(stage, engine, passes, tolerances[stage], left_out)
    report = Report(
        engine.name, reference.reference, tuple(comparisons), tolerances=tolerances, left_out=tuple(left_out)
    )
    if stages or reference.trajectory is None:
        return report
    say(f"trajectory on {engine.name}")
    return _with_image(report, engine, bundle, reference.trajectory)


def floor_kinds(
    engine: Engine, manifest: Manifest, stages: Sequence[Stage] = ()
) -> Collection[Precision | Quantization]:
    """The precisions and quantisations whose error floors the tolerances of these stages need on this engine.

    fp16 needs the floor of bf16 as well, which replaces it where the reference overflows in fp16."""
    entries = [manifest.stages[stage] for stage in stages or tuple(manifest.stages)]
    precisions = {coarser(entry.precision, engine.precision) for entry in entries}
    instead = {Precision.BF16} if Precision.FP16 in precisions else set()
    return precisions | instead | ({entry.quantization for entry in entries} - {Quantization.NONE})


def _with_image(report: Report, engine: Engine, bundle: Bundle, expected: Trajectory) -> Report:
    """The report with the engine's own trajectory and image, unless the engine was not built for their size."""
    tolerance = max(each.tolerance for each in report.tolerances.values())
    noise = tuple(_compare_noise(expected))
    height, width = expected.image.shape[2:]
    try:
        latents, image = generate_image(engine, bundle, (width, height))
    except OutsideProfileError as error:
        left_out = (*report.left_out, f"the image: {error}")
        return replace(report, comparisons=(*report.comparisons, *noise), left_out=left_out)
    allowed = trajectory_tolerance(expected.image_gain, tolerance)
    steps = tuple(
        compare(
            Subject(f"trajectory: {stage} step {step}", Kind.TRAJECTORY, stage, step),
            latents[stage, step],
            wanted,
            trajectory_tolerance(expected.gains[stage, step], tolerance),
        )
        for (stage, step), wanted in expected.latents.items()
    )
    final = compare(Subject("trajectory: image", Kind.TRAJECTORY), image, expected.image, allowed)
    return replace(
        report,
        comparisons=(*report.comparisons, *steps, final, *noise),
        image_psnr=psnr(image, expected.image),
        image_psnr_needed=psnr_needed(expected.image, allowed),
        images=(image, expected.image),
    )


def _compare_noise(expected: Trajectory) -> Iterator[Comparison]:
    """The noise that this machine generates, compared with the noise in a recording."""
    found = reproduce_noise(expected) if expected.noise else {}
    for (stage, number), wanted in expected.noise.items():
        yield compare(Subject(f"noise: {stage} draw {number}", Kind.NOISE), found[stage, number], wanted, 0.0)


def _compare_stage(
    stage: Stage, engine: Engine, passes: Sequence[ReferencePass], tolerance: StageTolerance, left_out: list[str]
) -> Iterator[Comparison]:
    """Compare the stage in each way the engine loads it: the first way in all passes, another in the small ones.

    The small passes come first, and are enough to find a fault in a graph."""
    for number, loader in enumerate(stage_loaders(engine, stage)):
        with loader.load() as runner:
            chosen = passes if number == 0 else passes[: len(SITUATIONS[stage])]
            yield from _compare_passes(runner, loader.name, chosen, tolerance, left_out)


def _compare_passes(
    runner: StageRunner, part: str, passes: Sequence[ReferencePass], tolerance: StageTolerance, left_out: list[str]
) -> Iterator[Comparison]:
    """Raises OutsideProfileError when the runner accepts none of `passes`."""
    half = tolerance.precision if tolerance.precision is not Precision.FP32 else None
    outside: list[str] = []
    for each in passes:
        try:
            found = runner(each.inputs)
        except OutsideProfileError:
            outside.append(each.described("", part))
            if len(outside) == len(passes):
                raise
            continue
        for port, wanted in each.outputs.items():
            yield compare(each.subject(port, part), found[port], wanted, tolerance.tolerance, half)
    left_out += outside

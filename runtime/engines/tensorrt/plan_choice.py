"""Which of a bundle's plans this machine can run, and which profile of them takes given shapes."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ....schemas.bundle import MAIN_GRAPH, Backend, ImageSize, PlanEntry, ProfileEntry, StageEntry
from ....schemas.errors import EngineError, OutsideProfileError
from ....schemas.stages import Stage
from ....storage.bundle import Bundle
from ....storage.file_hashes import SHOWN_DIGITS, sha256_of
from ...sampling.hoisting import CONDITIONING, FASTER_IN_PARTS, STEP
from .cuda import Device
from .plan_weights import has_what_is_built_in

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def build_command(
    bundle: Bundle, stage: Stage, backend: Backend, targets: Sequence[str], graph: str | None = None
) -> str:
    """What makes plans of `stage` for `targets`; of `graph` where that is none of those made unasked."""
    arch = f" --arch {','.join(targets)}" if backend == "tensorrt-rtx" else ""
    unasked = (CONDITIONING, STEP) if stage in FASTER_IN_PARTS else (MAIN_GRAPH,)
    which = f" --graph {graph}" if graph and graph not in unasked else ""
    return f"cascadekit build {bundle.root} --backend {backend} --stage {stage}{which}{arch}"


def refusal(
    root: Path, entry: StageEntry, plan: PlanEntry, version: str, device: Device, *, refits: bool = False
) -> str | None:
    """Why `plan` of the bundle at `root` cannot run on `device` with TensorRT `version`; None when it can. With
    `refits` it may be of other weights, where it takes those there are."""
    if not entry.is_current(plan) and not (refits and plan.refittable and _is_of_graph(entry, plan)):
        return "was built from other weights or graphs than the bundle has now"
    if plan.backend_version != version:
        return f"was built with {plan.backend} {plan.backend_version}, installed is {version}"
    built_for = plan.targets or ((plan.device.capability,) if plan.device else ())
    if device.capability not in built_for:
        return f"was built for {', '.join(built_for)}, this GPU is {device.capability} ({device.name})"
    if not has_what_is_built_in(root, plan):
        return "was built with other weights than the bundle has now, besides those that are its inputs"
    return None


def _is_of_graph(entry: StageEntry, plan: PlanEntry) -> bool:
    """Whether the graph is what the plan was made of, whatever the weights are."""
    graph = tuple(source for source in plan.sources if source.path == entry.graphs[plan.graph].path)
    return bool(graph) and entry.is_current(plan.model_copy(update={"sources": graph}))


def graphs_with_plans(
    root: Path, entry: StageEntry, backend: Backend, version: str, device: Device, *, refits: bool = False
) -> tuple[str, ...]:
    """The graphs of a stage of the bundle at `root` that can run, in the manifest's order."""
    plans = [plan for plan in entry.plans if plan.backend == backend]
    runnable = {plan.graph for plan in plans if refusal(root, entry, plan, version, device, refits=refits) is None}
    return tuple(graph for graph in entry.graphs if graph in runnable)


def runnable_plans(
    bundle: Bundle, stage: Stage, graph: str, backend: Backend, version: str, device: Device, *, refits: bool = False
) -> tuple[PlanEntry, ...]:
    """The plans of a graph that can run, those of the bundle's weights first, then the newest.

    Raises EngineError when there is none: why, and the command that makes one."""
    entry = bundle.entry(stage)
    command = build_command(bundle, stage, backend, [device.capability], graph)
    plans = [plan for plan in reversed(entry.plans) if (plan.backend, plan.graph) == (backend, graph)]
    if not plans:
        raise EngineError(f"{stage}: the bundle has no {backend} plan of its graph {graph!r}; make one: {command}")
    plans.sort(key=lambda plan: not entry.is_current(plan))
    reasons = {plan.path: refusal(bundle.root, entry, plan, version, device, refits=refits) for plan in plans}
    runnable = tuple(plan for plan in plans if reasons[plan.path] is None)
    if not runnable:
        newest = plans[0].path
        raise EngineError(f"{stage}: its plan {newest} {reasons[newest]}; make another: {command}")
    return runnable


def check_plan(bundle: Bundle, stage: Stage, plan: PlanEntry) -> Path:
    """Where the plan lies. Raises EngineError unless it has the size and the SHA-256 of the manifest."""
    path = bundle.root / plan.path
    problem = _problem(path, plan)
    if problem:
        command = build_command(bundle, stage, plan.backend, plan.targets, plan.graph)
        raise EngineError(f"{path}: {problem}; build it again: {command}")
    return path


def _problem(path: Path, plan: PlanEntry) -> str | None:
    if not path.is_file():
        return "the plan is missing"
    status = path.stat()
    if status.st_size != plan.bytes:
        return f"the plan is damaged: expected {plan.bytes} bytes, it has {status.st_size}"
    found = _sha256(path, status.st_size, status.st_mtime_ns)
    if found != plan.sha256:
        expected = plan.sha256[:SHOWN_DIGITS]
        return f"the plan is damaged: expected SHA-256 {expected}..., found {found[:SHOWN_DIGITS]}..."
    return None


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hashed once as long as the file does not change: a stage may be loaded anew for every image."""
    return sha256_of(path)


def choose(
    bundle: Bundle, stage: Stage, plans: Sequence[PlanEntry], shapes: Shapes, loaded: PlanEntry | None
) -> tuple[PlanEntry, int]:
    """A plan and the number of its profile that takes inputs of `shapes`: of the plan that is loaded if it has one,
    else of the first that has, and the one whose likeliest shapes are nearest.

    Raises OutsideProfileError when none does: what there is, and what would be needed."""
    order = sorted(plans, key=lambda plan: plan is not loaded)
    for plan in order:
        fitting = [number for number, profile in enumerate(plan.profiles) if _misfit(profile, shapes) is None]
        if fitting:
            return plan, min(fitting, key=lambda number: _distance(plan.profiles[number], shapes))
    newest = plans[0]
    misfit = _misfit(newest.profiles[0], shapes)
    taken = "; ".join(dict.fromkeys(sizes_of(profile) for plan in plans for profile in plan.profiles))
    command = build_command(bundle, stage, newest.backend, newest.targets, newest.graph)
    raise OutsideProfileError(
        f"{stage}: no profile of its plans takes {misfit}; they are for {taken}. Choose such a size, or build for "
        f"this one: {command} with --min, --opt and --max that hold it"
    )


def sizes_of(profile: ProfileEntry) -> str:
    """A profile in a user's words, as in "512x512 to 1536x1536 (height x width), 1 to 2 images"."""
    least, most = profile.min, profile.max
    sides = _span(f"{least.height}x{least.width}", f"{most.height}x{most.width}")
    return f"{sides} (height x width), {_span(str(least.images), str(most.images))} {_noun(most)}"


def _span(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _noun(size: ImageSize) -> str:
    return "image" if size.images == 1 else "images"


def _misfit(profile: ProfileEntry, shapes: Shapes) -> str | None:
    """The first input that `profile` does not take; None when it takes all."""
    for name, shape in shapes.items():
        ports = profile.ports.get(name)
        if ports is None:
            return f"an input {name}"
        if len(shape) != len(ports.min) or not all(
            low <= side <= high for low, side, high in zip(ports.min, shape, ports.max, strict=True)
        ):
            return f"{name} {list(shape)} (it takes {list(ports.min)} to {list(ports.max)})"
    return None


def _distance(profile: ProfileEntry, shapes: Shapes) -> float:
    """How far shapes are from the likeliest ones: the sum of the logarithms of the ratios of sides."""
    return sum(
        abs(math.log(side / likely))
        for name, shape in shapes.items()
        for side, likely in zip(shape, profile.ports[name].opt, strict=True)
    )

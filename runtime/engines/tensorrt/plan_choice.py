"""Chooses the plan of a bundle that this machine can run, and the plan's profile that takes given shapes."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ....schemas.errors import EngineError, OutsideProfileError
from ....schemas.hoisted import CONDITIONING, FASTER_IN_PARTS, STEP
from ....schemas.manifest import MAIN_GRAPH, StageEntry
from ....schemas.plan_entries import Backend, PlanEntry, ProfileEntry
from ....schemas.stages import Stage
from ....storage.bundle import Bundle
from ....storage.file_hashes import SHOWN_DIGITS, sha256_of
from .host import Host

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def build_command(
    bundle: Bundle, stage: Stage, backend: Backend, targets: Sequence[str], graph: str | None = None
) -> str:
    """The command that builds plans of `stage` for `targets`. It names `graph` if that is not built by default."""
    arch = f" --arch {','.join(targets)}" if backend == "tensorrt-rtx" else ""
    unasked = (CONDITIONING, STEP) if stage in FASTER_IN_PARTS else (MAIN_GRAPH,)
    which = f" --graph {graph}" if graph and graph not in unasked else ""
    return f"cascadekit build {bundle.root} --backend {backend} --stage {stage}{which}{arch}"


def refusal(entry: StageEntry, plan: PlanEntry, host: Host, *, refits: bool = False) -> str | None:
    """Why `plan` of a stage cannot run on `host`; None when it can. With `refits`, a refittable plan may have been
    built from other weights."""
    version, device = host.version, host.device
    if not entry.is_current(plan) and not (refits and plan.refittable and _is_of_graph(entry, plan)):
        return "was built from other weights or graphs than the bundle has now"
    if plan.backend_version != version:
        return f"was built with {plan.backend} {plan.backend_version}, installed is {version}"
    built_for = plan.targets or ((plan.device.capability,) if plan.device else ())
    if device.capability not in built_for:
        return f"was built for {', '.join(built_for)}, this GPU is {device.capability} ({device.name})"
    return None


def _is_of_graph(entry: StageEntry, plan: PlanEntry) -> bool:
    """True if the plan was built from the present graph, with any weights."""
    graph = tuple(source for source in plan.sources if source.path == entry.graphs[plan.graph].path)
    return bool(graph) and entry.is_current(plan.model_copy(update={"sources": graph}))


def graphs_with_plans(entry: StageEntry, host: Host, *, refits: bool = False) -> tuple[str, ...]:
    """The graphs of a stage that have a plan for `host`, in the manifest's order."""
    plans = [plan for plan in entry.plans if plan.backend == host.backend]
    runnable = {plan.graph for plan in plans if refusal(entry, plan, host, refits=refits) is None}
    return tuple(graph for graph in entry.graphs if graph in runnable)


def runnable_plans(
    bundle: Bundle, stage: Stage, graph: str, host: Host, *, refits: bool = False
) -> tuple[PlanEntry, ...]:
    """The plans of a graph that can run on `host`: first those of the bundle's present weights, then the newest.

    Raises EngineError, with the reason and the command that builds a plan, when there is none."""
    entry, backend = bundle.entry(stage), host.backend
    command = build_command(bundle, stage, backend, [host.device.capability], graph)
    plans = [plan for plan in reversed(entry.plans) if (plan.backend, plan.graph) == (backend, graph)]
    if not plans:
        raise EngineError(f"{stage}: the bundle has no {backend} plan of its graph {graph!r}; make one: {command}")
    plans.sort(key=lambda plan: not entry.is_current(plan))
    reasons = {plan.path: refusal(entry, plan, host, refits=refits) for plan in plans}
    runnable = tuple(plan for plan in plans if reasons[plan.path] is None)
    if not runnable:
        newest = plans[0].path
        raise EngineError(f"{stage}: its plan {newest} {reasons[newest]}; make another: {command}")
    return runnable


def check_plan(bundle: Bundle, stage: Stage, plan: PlanEntry) -> Path:
    """The path of the plan. Raises EngineError unless it has the size and the SHA-256 of the manifest."""
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
    """The SHA-256 of a file, computed once until the file changes: a stage may be loaded for every image."""
    return sha256_of(path)


def choose(
    bundle: Bundle, stage: Stage, plans: Sequence[PlanEntry], shapes: Shapes, loaded: PlanEntry | None
) -> tuple[PlanEntry, int]:
    """A plan and the number of its profile that takes inputs of `shapes`.

    The loaded plan is preferred, then the first of `plans`. Its profile with the nearest optimal shapes is chosen.
    Raises OutsideProfileError, which lists the sizes of the plans, when no profile takes the shapes."""
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
        f"this one: {command} --min WxH --opt WxH --max WxH"
    )


def sizes_of(profile: ProfileEntry) -> str:
    """A profile in words, as in "512x512 to 1536x1536, 1 to 2 images"."""
    least, most = profile.min, profile.max
    sides = _span(f"{least.width}x{least.height}", f"{most.width}x{most.height}")
    images = f"{_span(str(least.images), str(most.images))} image{'' if most.images == 1 else 's'}"
    return f"{sides}, {images}"


def _span(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _misfit(profile: ProfileEntry, shapes: Shapes) -> str | None:
    """The first input that `profile` does not take, with the reason; None when it takes all."""
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
    """The distance of shapes from the optimal ones of a profile: the sum over all sides of |log(side / optimal)|."""
    return sum(
        abs(math.log(side / best))
        for name, shape in shapes.items()
        for side, best in zip(shape, profile.ports[name].opt, strict=True)
    )

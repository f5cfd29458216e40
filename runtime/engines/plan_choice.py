"""Chooses the plan of a bundle that this machine can run, and the plan's profile that takes given shapes.

A package of AOTInductor is a plan, too."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...schemas.errors import EngineError, OutsideProfileError
from ...schemas.hoisted import CONDITIONING, FASTER_IN_PARTS, STEP
from ...schemas.manifest import MAIN_GRAPH, StageEntry
from ...schemas.plan_entries import PlanEntry, ProfileEntry
from ...schemas.precision import Backend
from ...schemas.stages import EVERY_IMAGE, Stage
from ...storage.bundle import Bundle
from ...storage.file_hashes import SHOWN_DIGITS, sha256_of

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

IN_PARTS = (CONDITIONING, STEP)
CPU_CAPABILITY = "cpu"


def build_command(bundle: Bundle, stage: Stage, backend: Backend, targets: Sequence[str], graph: str) -> str:
    """The command that builds plans of `graph` for `targets`. It names `graph` if that is not built by default."""
    unasked = IN_PARTS if stage in FASTER_IN_PARTS and backend != "aotinductor" else (MAIN_GRAPH,)
    which = "" if graph in unasked else f" --graph {graph}"
    where = {
        "tensorrt-rtx": f" --arch {','.join(targets)}",
        "aotinductor": "" if CPU_CAPABILITY in targets else " --device cuda",
    }
    return f"cascadekit build {bundle.root} --backend {backend} --stage {stage}{which}{where.get(backend, '')}"


@dataclass(frozen=True)
class RunnablePlans:
    """The plans of `bundle` for `backend` that can run on a device of `capability`.

    `refuse` says why a plan of a stage cannot run here, and returns None when it can."""

    bundle: Bundle
    backend: Backend
    capability: str
    refuse: Callable[[StageEntry, PlanEntry], str | None]

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        """The graphs of a stage that have a plan, in the manifest's order."""
        entry = self.bundle.entry(stage)
        plans = [plan for plan in entry.plans if plan.backend == self.backend]
        runnable = {plan.graph for plan in plans if self.refuse(entry, plan) is None}
        return tuple(graph for graph in entry.graphs if graph in runnable)

    def of_graph(self, stage: Stage, graph: str) -> tuple[PlanEntry, ...]:
        """The plans of a graph: first those of the bundle's present weights, then the newest.

        Raises EngineError, with the reason and the command that builds a plan, when there is none."""
        entry = self.bundle.entry(stage)
        command = build_command(self.bundle, stage, self.backend, [self.capability], graph)
        plans = [plan for plan in reversed(entry.plans) if (plan.backend, plan.graph) == (self.backend, graph)]
        if not plans:
            raise EngineError(
                f"{stage}: the bundle has no {self.backend} plan of its graph {graph!r}; make one: {command}"
            )
        plans.sort(key=lambda plan: not entry.is_current(plan))
        runnable = tuple(plan for plan in plans if self.refuse(entry, plan) is None)
        if not runnable:
            newest = plans[0]
            raise EngineError(f"{stage}: its plan {newest.path} {self.refuse(entry, newest)}; make another: {command}")
        return runnable

    def make_images(self) -> bool:
        """True if every stage that `generate` needs has plans of the graphs that it runs."""
        return all(stage in self.bundle.manifest.stages and self._suffice(stage) for stage in EVERY_IMAGE)

    def _suffice(self, stage: Stage) -> bool:
        graphs = self.graphs(stage)
        return MAIN_GRAPH in graphs or (stage in FASTER_IN_PARTS and {*IN_PARTS} <= {*graphs})


def targets_of(plan: PlanEntry) -> tuple[str, ...]:
    """The compute capabilities that a plan is for, as in "sm89", or "cpu"."""
    return plan.targets or ((plan.device.capability,) if plan.device else ())


def check_plan(bundle: Bundle, stage: Stage, plan: PlanEntry) -> Path:
    """The path of the plan. Raises EngineError unless it has the size and the SHA-256 of the manifest."""
    path = bundle.root / plan.path
    problem = _problem(path, plan)
    if problem:
        command = build_command(bundle, stage, plan.backend, targets_of(plan), plan.graph)
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
    command = build_command(bundle, stage, newest.backend, targets_of(newest), newest.graph)
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

"""Builds GPU engines of a bundle's graphs: each plan appears whole, with its entry in the manifest, or not at all."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...runtime.engines.tensorrt.plan_header import find_contradiction
from ...runtime.engines.tensorrt.plan_weights import is_current
from ...schemas.bundle import MANIFEST_NAME, PlanEntry, to_text
from ...schemas.errors import EngineError
from ...schemas.stages import Stage
from ...storage.bundle import Bundle, open_bundle
from ...storage.outputs import scratch_folder, staged_output
from . import plan_cache as cache
from .backend import Backend, find_backend
from .device import present_device
from .estimate import Estimate, estimate, require_room
from .plans_to_build import PLANS, BuildWishes, Task, tasks_for
from .worker_process import OnProgress, Outcome, run_build

SCRATCH = ".building"  # in the bundle, while a build runs

Say = Callable[[str], object]


@dataclass(frozen=True)
class Built:
    """A plan that is in the bundle now, and how it came there: built now, or found whole in the bundle ("kept") or in
    the shared cache. What building took, as estimated and as it was, is known of what was built now."""

    stage: Stage
    plan: PlanEntry
    how: Literal["built", "kept", "cached"]
    estimate: Estimate | None = None
    outcome: Outcome | None = None


def build(
    root: str | Path,
    wishes: BuildWishes,
    *,
    on_progress: OnProgress = lambda progress: None,
    say: Say = lambda text: None,
) -> list[Built]:
    """Build the engines that `wishes` ask for of the bundle at `root`, each in a process of its own.

    Plans lie in the stage's folder plans/; the manifest has each as soon as it is there. One that was made of the same
    graph, weights, options and TensorRT is not made again, one that is damaged is. `on_progress` hears some times a
    second how a build goes, `say` what a user should know.

    Raises UsageError before anything is built for what cannot be, EngineError for what TensorRT refuses and for too
    little memory or disk, CheckpointError for damaged files."""
    bundle = open_bundle(Path(root))
    backend = find_backend(wishes.backend)
    device = None if backend.builds_for_others else present_device()
    tasks = tasks_for(bundle, wishes, backend.version, device)
    with scratch_folder(bundle.root / SCRATCH, bundle.root) as scratch:
        found = {} if wishes.force else {task.key: there for task in tasks if (there := _find(task, wishes, say))}
        estimates = {
            task.key: estimate(Path(task.job.graph), task.entry.precision, len(task.profiles))
            for task in tasks
            if task.key not in found
        }
        require_room(str(root), estimates.values(), bundle.root, memory=wishes.check_memory)
        done = []
        for task in tasks:
            if task.key in found:
                built = found[task.key]
            else:
                built = _build(task, backend, estimates[task.key], scratch, wishes, on_progress)
            _record(bundle.root, built)
            done.append(built)
    return done


def _find(task: Task, wishes: BuildWishes, say: Say) -> Built | None:
    """The task's plan as it is there already, in the bundle or in the cache."""
    hows: tuple[tuple[Path | None, Literal["kept", "cached"]], ...] = (
        (task.path.parent, "kept"),
        (wishes.cache, "cached"),
    )
    for folder, how in hows:
        there = cache.find(folder, task.path.name, task.key) if folder else None
        if isinstance(there, str):
            say(f"{there}; it is built again")
        elif there is not None:
            if how == "cached":
                cache.put(there.path, task.path.parent)
            return Built(task.stage, _at_home(task, there.plan), how)
    return None


def _at_home(task: Task, plan: PlanEntry) -> PlanEntry:
    """A plan's entry as this bundle has it, wherever the plan was made."""
    same = {name: getattr(task, name) for name in ("sources", "profiles", "weight_inputs", "built_in")}
    return plan.model_copy(update={"path": _relative(task), **same})


def _relative(task: Task) -> str:
    return f"{task.stage}/{PLANS}/{task.path.name}"


def _build(
    task: Task, backend: Backend, expected: Estimate, scratch: Path, wishes: BuildWishes, on_progress: OnProgress
) -> Built:
    made = scratch / task.path.name
    task.path.parent.mkdir(exist_ok=True)
    job = replace(task.job, output=str(made.absolute()))
    outcome = run_build(job, task.name, expected.seconds, on_progress)
    plan = PlanEntry(
        graph=task.graph,
        path=_relative(task),
        bytes=outcome.bytes,
        sha256=outcome.sha256,
        backend=wishes.backend,  # type: ignore[arg-type]
        backend_version=outcome.version,
        targets=job.targets,
        device=task.device,
        precision=task.entry.precision,
        profiles=task.profiles,
        sources=task.sources,
        refittable=job.refittable,
        weight_streaming=job.weight_streaming,
        weight_inputs=task.weight_inputs,
        built_in=task.built_in,
        seconds=round(outcome.seconds, 2),
        peak_rss=outcome.peak_rss,
    )
    wrong = find_contradiction(made, plan)
    if wrong:
        raise EngineError(f"{task.name}: {backend.name} wrote a plan that contradicts itself: {wrong}; report this")
    cache.write_note(made, plan, task.key)
    try:
        for folder in filter(None, (wishes.cache, task.path.parent)):
            cache.put(made, folder)
    except OSError as error:
        raise EngineError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return Built(task.stage, plan, "built", expected, outcome)


def _record(root: Path, built: Built) -> None:
    """Put the plan's entry into the manifest, in place of one of the same name; plans that are gone leave it."""
    manifest = open_bundle(root).manifest
    entry = manifest.stages[built.stage]
    others = [plan for plan in entry.plans if plan.path != built.plan.path and (root / plan.path).is_file()]
    plans = (*others, built.plan)
    if plans == entry.plans:
        return
    stages = {**manifest.stages, built.stage: entry.model_copy(update={"plans": plans})}
    with staged_output(root / MANIFEST_NAME, force=True) as staged:
        staged.write_text(to_text(manifest.model_copy(update={"stages": stages})), encoding="utf-8")


def stale_plans(bundle: Bundle) -> Iterator[Path]:
    """Plans that were built from other graphs or weights than the bundle has now, and those no manifest knows."""
    known = {
        bundle.root / plan.path
        for entry in bundle.manifest.stages.values()
        for plan in entry.plans
        if is_current(bundle.root, entry, plan)
    }
    for stage in bundle.manifest.stages:
        for path in sorted((bundle.root / stage / PLANS).glob(f"*{cache.SUFFIX}")):
            if path not in known:
                yield path


def prune(root: str | Path) -> int:
    """Remove stale plans; returns how many bytes they had. Undoing a LoRA, or merging it again, builds anew then."""
    bundle = open_bundle(Path(root))
    freed = 0
    with scratch_folder(bundle.root / SCRATCH, bundle.root):
        stages = {
            stage: entry.model_copy(
                update={"plans": tuple(p for p in entry.plans if is_current(bundle.root, entry, p))}
            )
            for stage, entry in bundle.manifest.stages.items()
        }
        if stages != bundle.manifest.stages:
            with staged_output(bundle.root / MANIFEST_NAME, force=True) as staged:
                staged.write_text(to_text(bundle.manifest.model_copy(update={"stages": stages})), encoding="utf-8")
        for path in stale_plans(bundle):
            freed += path.stat().st_size
            path.with_suffix(".json").unlink(missing_ok=True)
            os.unlink(path)
    return freed

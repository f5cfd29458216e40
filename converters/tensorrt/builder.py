"""Builds GPU engines of a bundle's graphs: each plan appears whole, with its entry in the manifest, or not at all."""

from __future__ import annotations  # help() shows the types as they are written here

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from ...runtime.engines.pytorch.built_here import is_built_here, remember_built
from ...runtime.engines.tensorrt.plan_header import find_contradiction
from ...schemas.callbacks import Say, ignored
from ...schemas.errors import EngineError
from ...schemas.forecast import FileSize, Forecast, OnPlan
from ...schemas.manifest import Manifest
from ...schemas.messages import require_known
from ...schemas.plan_entries import DeviceEntry, PlanEntry
from ...schemas.stages import Stage
from ...schemas.targets import AOTINDUCTOR
from ...storage.atomic_output import BUILDING, scratch_folder
from ...storage.bundle import Bundle, open_bundle, update_manifest
from ...storage.file_sizes import sizes_of
from ...storage.output_rules import require_writable
from ..export.graph_files import load_graph
from . import plan_cache as cache
from .backend import InstalledTensorRT, find_backend
from .device import present_device
from .estimate import Estimate, estimate, require_room
from .plans_to_build import PLANS, BuildOptions, PlanToBuild, plans_to_build
from .worker_process import BuildOutcome, OnProgress, run_build

DEFAULT = BuildOptions()


@dataclass(frozen=True)
class Built:
    """A plan that is in the bundle now: "built" by this call, "kept" from the bundle, or copied from the cache."""

    stage: Stage
    plan: PlanEntry
    how: Literal["built", "kept", "cached"]
    estimate: Estimate | None = None  # None: not built by this call
    outcome: BuildOutcome | None = None  # None: not built by this call


def build(
    bundle: str | Path,
    options: BuildOptions = DEFAULT,
    *,
    on_progress: OnProgress = ignored,
    say: Say = ignored,
    on_plan: OnPlan | None = None,
    **changes: Any,
) -> list[Built]:
    """Build GPU engines ("plans") of the graphs of `bundle`, each in a process of its own.

    Options are given as one value or by name; a name overrides the value's field:

        build("bundle", targets=("sm89",))
        build("bundle", BuildOptions("tensorrt"), stages=(Stage.PRIOR,))

    Plans are written to the folder plans/ of their stage. A plan enters the manifest as soon as it is complete. A plan
    of the same graph, weights, options and TensorRT is kept; a damaged one is built again. `on_progress` is called
    several times a second during a build. `say` is called with each line that a user should know. `on_plan` is called
    with a Forecast once everything was checked; an exception there ends the call before the first build.

    Raises UsageError before anything is built for options that cannot work. Raises EngineError when TensorRT refuses a
    graph and for too little memory or disk, CheckpointError for damaged files."""
    require_known("build", changes, BuildOptions.__dataclass_fields__.keys() | signature(build).parameters.keys())
    options = replace(options, **changes)
    root = Path(bundle)
    opened = open_bundle(root)
    to_build = _planned(opened, options)
    with scratch_folder(opened.root / BUILDING, opened.root) as scratch:
        existing = [] if options.force else to_build
        found = {planned.key: there for planned in existing if (there := _find(planned, options, say))}
        estimates = {planned.key: _estimated(planned) for planned in to_build if planned.key not in found}
        require_room(str(root), estimates.values(), opened.root, memory=options.check_memory)
        if on_plan:
            on_plan(_forecast(opened, to_build, estimates))
        done = []
        for planned in to_build:
            if options.cache and planned.key in found and found[planned.key].how == "cached":
                cache.put(options.cache / planned.path.name, planned.path.parent)
            built = found.get(planned.key) or _build(planned, estimates[planned.key], scratch, options, on_progress)
            _record(opened.root, built)
            done.append(built)
    return done


def _planned(bundle: Bundle, options: BuildOptions) -> list[PlanToBuild]:
    """The plans that `build` makes, by the compiler that `options` name."""
    if options.backend == AOTINDUCTOR:
        from ..aotinductor.packages_to_build import packages_to_build

        return packages_to_build(bundle, options)
    backend, device = require_machine(options)
    return plans_to_build(bundle, options, backend.version, device)


def _estimated(planned: PlanToBuild) -> Estimate:
    if planned.request.backend == AOTINDUCTOR:
        from ..aotinductor.packages_to_build import estimate_package

        return estimate_package(planned)
    graph = load_graph(Path(planned.request.graph))
    return estimate(graph, planned.graph, planned.precision, len(planned.profiles))


def require_machine(options: BuildOptions) -> tuple[InstalledTensorRT, DeviceEntry | None]:
    """TensorRT, and the GPU that it builds for if it builds for no other.

    Raises EngineError where one of them is lacking, UsageError for a cache that cannot be written."""
    if options.cache is not None:
        require_writable(Path(options.cache))
    backend = find_backend(options.backend)
    return backend, None if backend.builds_for_others else present_device()


def _forecast(bundle: Bundle, to_build: Sequence[PlanToBuild], estimates: Mapping[str, Estimate]) -> Forecast:
    """The files that would be read and written; plans that exist already are noted."""
    new = [planned for planned in to_build if planned.key in estimates]
    paths = dict.fromkeys(bundle.root / source.path for planned in new for source in planned.sources)
    writes = tuple(FileSize(_relative(planned), estimates[planned.key].plan, about=True) for planned in new)
    memory = max((estimates[planned.key].memory for planned in new), default=0)
    notes = [f"{planned.name}: there already" for planned in to_build if planned.key not in estimates]
    notes += [f"about {memory / 1e9:.1f} GB of memory at the peak"] if new else []
    seconds = sum(estimates[planned.key].seconds for planned in new)
    return Forecast(bundle.root, sizes_of(paths), writes, seconds, tuple(notes))


def _find(planned: PlanToBuild, options: BuildOptions, say: Say) -> Built | None:
    """The plan that exists already, in the bundle or in the shared cache; None when it has to be built."""
    hows: tuple[tuple[Path | None, Literal["kept", "cached"]], ...] = (
        (planned.path.parent, "kept"),
        (options.cache, "cached"),
    )
    for folder, how in hows:
        there = cache.find(folder, planned.path.name, planned.key) if folder else None
        if isinstance(there, str):
            say(f"{there}; it is built again")
        elif there is not None and options.backend == AOTINDUCTOR and not is_built_here(there.sha256):
            say(f"{folder}/{planned.path.name}: was not built by you on this machine; it is built again")
        elif there is not None:
            return Built(planned.stage, _at_home(planned, there), how)
    return None


def _at_home(planned: PlanToBuild, plan: PlanEntry) -> PlanEntry:
    """The entry in this bundle's manifest for `plan`, which may have been built for another bundle."""
    here = {"path": _relative(planned), "sources": planned.sources, "profiles": planned.profiles}
    return plan.model_copy(update=here)


def _relative(planned: PlanToBuild) -> str:
    return f"{planned.stage}/{PLANS}/{planned.path.name}"


def _build(
    planned: PlanToBuild, expected: Estimate, scratch: Path, options: BuildOptions, on_progress: OnProgress
) -> Built:
    made = scratch / planned.path.name
    planned.path.parent.mkdir(exist_ok=True)
    request = replace(planned.request, output=str(made.absolute()))
    outcome = run_build(request, planned.name, expected.seconds, on_progress)
    plan = PlanEntry(
        graph=planned.graph,
        path=_relative(planned),
        bytes=outcome.bytes,
        sha256=outcome.sha256,
        backend=options.backend,  # type: ignore[arg-type]
        backend_version=outcome.version,
        targets=request.targets,
        device=planned.device,
        precision=planned.precision,
        profiles=planned.profiles,
        sources=planned.sources,
        refittable=request.refittable,
        weight_streaming=request.weight_streaming,
        seconds=round(outcome.seconds, 2),
        peak_rss=outcome.peak_rss,
    )
    problem = find_contradiction(made, plan)
    if problem:
        raise EngineError(
            f"{planned.name}: {options.backend} wrote a plan that contradicts itself: {problem}; report this"
        )
    cache.write_note(made, plan, planned.key)
    try:
        if options.backend == AOTINDUCTOR:
            remember_built(plan.sha256)
        for folder in filter(None, (options.cache, planned.path.parent)):
            cache.put(made, folder)
    except OSError as error:
        raise EngineError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return Built(planned.stage, plan, "built", expected, outcome)


def _record(root: Path, built: Built) -> None:
    """Put the plan's entry into the manifest, replacing one of the same path; entries of missing plans are removed."""

    def added(manifest: Manifest) -> Manifest:
        entry = manifest.stages[built.stage]
        others = [plan for plan in entry.plans if plan.path != built.plan.path and (root / plan.path).is_file()]
        stages = {**manifest.stages, built.stage: entry.model_copy(update={"plans": (*others, built.plan)})}
        return manifest.model_copy(update={"stages": stages})

    update_manifest(root, added)


def stale_plans(bundle: Bundle) -> Iterator[Path]:
    """Paths of plans of other graphs or weights than the bundle has now, and of plans that the manifest lacks."""
    known = {
        bundle.root / plan.path
        for entry in bundle.manifest.stages.values()
        for plan in entry.plans
        if entry.is_current(plan)
    }
    for stage in bundle.manifest.stages:
        for path in sorted((bundle.root / stage / PLANS).glob(f"*{cache.SUFFIX}")):
            if path not in known:
                yield path


def prune(root: str | Path) -> int:
    """Remove stale plans from the bundle at `root`; returns their size in bytes.

    When a merged LoRA is undone later, or merged again, its plans have to be built again."""
    bundle = open_bundle(Path(root))
    freed = 0
    with scratch_folder(bundle.root / BUILDING, bundle.root):
        bundle = replace(bundle, manifest=update_manifest(bundle.root, _without_stale_plans))
        for path in stale_plans(bundle):
            freed += path.stat().st_size
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()
    return freed


def _without_stale_plans(manifest: Manifest) -> Manifest:
    stages = {
        stage: entry.model_copy(update={"plans": tuple(plan for plan in entry.plans if entry.is_current(plan))})
        for stage, entry in manifest.stages.items()
    }
    return manifest.model_copy(update={"stages": stages})

"""Lists the plans that a build makes: graphs, GPUs and shapes. Refuses what cannot be built, with all reasons."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from ...schemas.choices import several, stages_of
from ...schemas.config_json import from_json
from ...schemas.errors import CheckpointError, UsageError
from ...schemas.hoisted import CONDITIONING, FASTER_IN_PARTS, STEP
from ...schemas.manifest import MAIN_GRAPH, FileEntry, StageEntry
from ...schemas.messages import changed_fields, known_fields
from ...schemas.plan_entries import DeviceEntry, PlanSource, ProfileEntry
from ...schemas.precision import Precision, Target
from ...schemas.profiles import DEFAULT, Bounds, profile_for
from ...schemas.quantization import Quantization
from ...schemas.stages import Stage
from ...schemas.targets import AOTINDUCTOR, RTX, Refusal, group_targets, refusal, require_rtx_targets
from ...storage.bundle import Bundle
from ...storage.file_hashes import sha256_of
from ..export.graph_files import external_data, load_graph
from .plan_cache import file_name, key_of
from .worker_request import WorkerRequest

PLANS = "plans"  # folder of a stage's plans


@known_fields
@dataclass(frozen=True, repr=False)
class BuildOptions:
    """The options of `build`.

        build("bundle", BuildOptions(targets=("sm89", "sm120"), cache="plans"))

    Attributes:
        backend: "tensorrt-rtx" needs no GPU; "tensorrt" builds for the GPU of this machine, "aotinductor" for `device`.
        targets: Compute capabilities such as "sm89"; for tensorrt-rtx only.
        stages: Stages to build; empty: every stage of the bundle.
        graphs: Graphs to build; empty: the graphs that `generate` runs.
        profiles: Image sizes; each becomes an optimisation profile of every plan.
        refittable: Whether plans of tensorrt can be given other weights later, see ``refit``.
        force: Whether existing plans are built again.
        cache: A folder of plans that bundles share.
        check_memory: Whether a build is refused that needs more memory than is free.
        weight_streaming: Whether the weights of plans may stay in the host's memory.
        device: "cpu" or "cuda", for aotinductor only: the device of this machine to build for.
    """

    backend: str = RTX
    targets: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    graphs: tuple[str, ...] = ()
    profiles: tuple[Bounds, ...] = (DEFAULT,)
    refittable: bool = False
    force: bool = False
    cache: Path | None = None
    check_memory: bool = True
    weight_streaming: bool = False
    device: str = "cpu"

    def __repr__(self) -> str:
        return changed_fields(self)

    def __post_init__(self) -> None:
        """Take stages by name, single values without a list, and a path as text. Raises UsageError for other values."""
        object.__setattr__(self, "stages", stages_of(self.stages))
        object.__setattr__(self, "targets", several(self.targets))
        object.__setattr__(self, "graphs", several(self.graphs))
        object.__setattr__(self, "cache", self.cache and Path(self.cache))
        for profile in self.profiles:
            if not isinstance(profile, Bounds):
                raise UsageError(f"profiles={profile!r}: expected the sizes of an image as `schemas.profiles.Bounds`")


@dataclass(frozen=True)
class PlanToBuild:
    """A plan that is to exist at `path` after the build. `key` identifies everything that decides its content."""

    stage: Stage
    graph: str
    precision: Precision
    device: DeviceEntry | None
    profiles: tuple[ProfileEntry, ...]
    sources: tuple[PlanSource, ...]
    request: WorkerRequest
    key: str
    path: Path

    @property
    def name(self) -> str:
        """The plan's name in messages, such as "prior/step for sm89"."""
        return f"{self.stage}/{self.graph}" + (f" for {' '.join(self.request.targets)}" if self.request.targets else "")


def require_targets(options: BuildOptions, precision: Precision) -> None:
    """Raises UsageError for targets that the backend does not build for, or cannot build for in `precision`."""
    _require_targets(options)
    for target in options.targets:
        refused = refusal(options.backend, target, precision, Quantization.NONE)
        if refused:
            raise UsageError(f"{refused.reason}; use {refused.argument}, or make another bundle for that GPU")


def plans_to_build(
    bundle: Bundle, options: BuildOptions, version: str, device: DeviceEntry | None
) -> list[PlanToBuild]:
    """Every plan that `options` ask for.

    `version` is that of the installed TensorRT. `device` is the GPU that plans are built for; None when `targets` name
    it. Weights without a recorded SHA-256 are hashed.

    Raises UsageError with every reason why the plans cannot be built, CheckpointError for files that differ from the
    manifest."""
    _require_targets(options)
    chosen = options.stages or tuple(bundle.manifest.stages)
    entries = {stage: bundle.entry(stage) for stage in chosen}
    _require_possible(entries, options, (device.capability,) if device else options.targets)
    return [planned for stage in entries for planned in _plans_of_stage(bundle, stage, options, version, device)]


def _require_targets(options: BuildOptions) -> None:
    if options.backend != AOTINDUCTOR and options.device != "cpu":
        raise UsageError(f'device="{options.device}" is for backend="aotinductor"; TensorRT builds for GPUs alone')
    if options.backend == RTX:
        require_rtx_targets(options.targets)
        if options.refittable:  # 1.7 fails: "graph_jit.cpp: CHECK(status == CUDA_SUCCESS)", even for one product
            raise UsageError(
                "TensorRT-RTX needs a GPU to build engines with refittable=True; build again after a LoRA is merged "
                "instead: plans that were built before from the same weights are found again"
            )
    elif options.targets:
        raise UsageError('TensorRT builds for the GPU it runs on; targets=... is for backend="tensorrt-rtx"')


def graphs_to_build(stage: Stage, entry: StageEntry, wanted: Sequence[str]) -> list[str]:
    """The graphs among `wanted` that the stage has; without `wanted`, the graphs that `generate` runs."""
    names = wanted or graphs_of(stage)
    found = [name for name in names if name in entry.graphs]
    return found if wanted or len(found) == len(names) else [MAIN_GRAPH]


def graphs_of(stage: Stage) -> list[str]:
    """The graphs of a stage that `generate` runs."""
    return [CONDITIONING, STEP] if stage in FASTER_IN_PARTS else [MAIN_GRAPH]


def _require_possible(entries: dict[Stage, StageEntry], options: BuildOptions, targets: Sequence[str]) -> None:
    refusals: dict[Refusal, list[Stage]] = defaultdict(list)
    for stage, entry in entries.items():
        for refused in dict.fromkeys(_refusals(entry, options.backend, targets)):
            refusals[refused].append(stage)
    problems = [
        f"{', '.join(stages)}: {refused.reason}; export it again: {_export_command(refused, stages)}"
        for refused, stages in refusals.items()
    ]
    unknown = [name for name in options.graphs if not any(name in entry.graphs for entry in entries.values())]
    if unknown:
        known = sorted({name for entry in entries.values() for name in entry.graphs})
        problems.append(f"the bundle has no graph {', '.join(unknown)}; it has {', '.join(known)}")
    if problems:
        raise UsageError("\n".join(problems))


def _refusals(entry: StageEntry, backend: str, targets: Sequence[str]) -> Iterator[Refusal]:
    """Why the stage's graphs cannot be built for all of `targets`, each with the options of an export that helps."""
    if entry.target is Target.ORT:
        yield Refusal("has operators of ONNX Runtime, which TensorRT does not read", entry.precision)
    for target in targets:
        if refused := refusal(backend, target, entry.precision, entry.quantization):
            yield refused


def _export_command(refused: Refusal, stages: Sequence[Stage]) -> str:
    """The export that helps; prior and decoder in fp16 also need exponents."""
    safe = " --fp16-safe auto" if refused.instead == "fp16" and {Stage.PRIOR, Stage.DECODER} & set(stages) else ""
    return f"cascadekit export MODEL -o BUNDLE --target tensorrt {refused.option}{safe}"


def _plans_of_stage(
    bundle: Bundle, stage: Stage, options: BuildOptions, version: str, device: DeviceEntry | None
) -> Iterator[PlanToBuild]:
    bundle.check(stage)
    entry = bundle.entry(stage)
    config = from_json(stage, entry.config)
    folder = bundle.root / stage / PLANS
    for graph in graphs_to_build(stage, entry, options.graphs):
        path = bundle.root / entry.graphs[graph].path
        model = load_graph(path)
        sources = tuple(plan_source(bundle, entry, file) for file in _files(bundle, entry, path, model))
        profiles = tuple(profile_for(config, graph, entry.graphs[graph].inputs, each) for each in options.profiles)
        shapes = tuple({name: port.model_dump() for name, port in profile.ports.items()} for profile in profiles)
        for targets in group_targets(options.targets) or [()]:
            request = WorkerRequest(
                backend=options.backend,
                graph=str(path.absolute()),
                output="",
                targets=targets,
                profiles=shapes,
                refittable=options.refittable,
                weight_streaming=options.weight_streaming,
                timing_cache=str((folder / "timing.cache").absolute()) if device else None,
            )
            hashes = [str(source.sha256) for source in sources]
            key = key_of(request, version, hashes, device.name if device else None)
            yield PlanToBuild(
                stage=stage,
                graph=graph,
                precision=entry.precision,
                device=device,
                profiles=profiles,
                sources=sources,
                request=request,
                key=key,
                path=folder / file_name(request, graph, entry.precision, key),
            )


def _files(bundle: Bundle, entry: StageEntry, graph: Path, model: onnx.ModelProto) -> list[FileEntry]:
    """The graph's file, and the files of its weights."""
    files = {bundle.root / file.path: file for file in entry.files}
    paths = [graph, *sorted({graph.parent / data.location for data in external_data(model)})]
    foreign = [path.name for path in paths if path not in files]
    if foreign:
        raise CheckpointError(
            f"{graph}: has weights in {', '.join(foreign)}, no file of the bundle; export the model again"
        )
    return [files[path] for path in paths]


def plan_source(bundle: Bundle, entry: StageEntry, file: FileEntry) -> PlanSource:
    """A file with its SHA-256: from the manifest, from a plan that was built from the same file, or computed now."""
    known = (
        source.sha256
        for plan in entry.plans
        for source in plan.sources
        if (source.path, source.fingerprint) == (file.path, file.fingerprint)
    )
    sha256 = file.sha256 or next(known, None) or sha256_of(bundle.root / file.path)
    return PlanSource(path=file.path, fingerprint=file.fingerprint, sha256=sha256)

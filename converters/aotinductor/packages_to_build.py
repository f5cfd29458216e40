"""Lists the packages that a build makes: one for each graph and profile. Refuses what cannot be built."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ...runtime.engines.engine_table import require_torch
from ...schemas.config_json import from_json
from ...schemas.control import is_control
from ...schemas.errors import EngineError, UsageError
from ...schemas.manifest import ENCODER_GRAPH, MAIN_GRAPH, PortEntry, StageEntry
from ...schemas.plan_entries import DeviceEntry, PlanSource, ProfileEntry
from ...schemas.ports import ports_of, vqgan_encoder_ports
from ...schemas.precision import Precision
from ...schemas.profiles import profile_for
from ...schemas.stages import NetworkConfig, Stage, VQGANConfig
from ...storage.bundle import Bundle
from ...storage.file_hashes import sha256_of
from ..tensorrt.estimate import MIB, Estimate
from ..tensorrt.plan_cache import file_name, key_of
from ..tensorrt.plans_to_build import PLANS, BuildOptions, PlanToBuild
from .package_request import PackageRequest

GRAPHS = (MAIN_GRAPH, ENCODER_GRAPH)
COMPILER, DEFAULT_COMPILER = "CXX", "g++"
# Rough: a compiler's time and memory grow with the code, and code with the tensors of a network.
SECONDS_BASE, SECONDS_PER_TENSOR = 30.0, 0.3
MEMORY_BASE, MEMORY_PER_TENSOR = 1500 * MIB, MIB
BYTES_BASE, BYTES_PER_TENSOR = 2 * MIB, 20_000


def packages_to_build(bundle: Bundle, options: BuildOptions) -> list[PlanToBuild]:
    """Every package that `options` ask for.

    Raises UsageError for options of TensorRT and graphs that PyTorch does not run. Raises EngineError without PyTorch,
    a C++ compiler, or the GPU of `options.device`; also for quantised stages."""
    _require_options(options)
    require_torch()
    from ...runtime.engines.pytorch.package_choice import present_device

    device = present_device(options.device)
    compiler = os.environ.get(COMPILER, DEFAULT_COMPILER)
    if shutil.which(compiler) is None:
        raise EngineError(
            f"AOTInductor needs a C++ compiler, and {compiler} is not here; install g++, or name another in {COMPILER}"
        )
    stages = options.stages or tuple(bundle.manifest.stages)
    return [planned for stage in stages for planned in _packages_of_stage(bundle, stage, options, device)]


def _require_options(options: BuildOptions) -> None:
    for name, given in (
        ("targets=...", options.targets),
        ("refittable=True", options.refittable),
        ("weight_streaming=True", options.weight_streaming),
    ):
        if given:
            raise UsageError(f"{name} is for TensorRT; AOTInductor builds for this machine, and keeps no weights")
    unknown = [name for name in options.graphs if name not in GRAPHS]
    if unknown:
        raise UsageError(f"AOTInductor builds the graphs {' and '.join(GRAPHS)}, not {', '.join(unknown)}")


def _packages_of_stage(
    bundle: Bundle, stage: Stage, options: BuildOptions, device: DeviceEntry
) -> Iterator[PlanToBuild]:
    from ...runtime.engines.pytorch.torch_engine import computed_precision

    bundle.check(stage)
    entry = bundle.entry(stage)
    precision = computed_precision(stage, entry, None)
    config = from_json(stage, entry.config)
    for name in [each for each in options.graphs or (MAIN_GRAPH,) if each in entry.graphs]:
        for bounds in options.profiles:
            inputs = [port for port in entry.graphs[name].inputs if not is_control(port.name)]
            profile = profile_for(config, name, inputs, bounds)
            request = _request(bundle, stage, name, inputs, profile, options=options, precision=precision)
            yield _planned(bundle, stage, request, profile, device)


def _request(
    bundle: Bundle,
    stage: Stage,
    name: str,
    inputs: Sequence[PortEntry],
    profile: ProfileEntry,
    *,
    options: BuildOptions,
    precision: Precision,
) -> PackageRequest:
    entry = bundle.entry(stage)
    return PackageRequest(
        backend=options.backend,
        graph=str((bundle.root / entry.graphs[name].path).absolute()),
        output="",
        targets=(),
        profiles=({port: shapes.model_dump() for port, shapes in profile.ports.items()},),
        stage=stage,
        name=name,
        config=entry.config,
        precision=precision,
        runs_on=options.device,
        dims={port.name: port.dims for port in inputs},
        steps=_steps(from_json(stage, entry.config), name),
    )


def _steps(config: NetworkConfig, graph: str) -> dict[str, int]:
    is_encoder = graph == ENCODER_GRAPH
    ports = vqgan_encoder_ports(config) if is_encoder and isinstance(config, VQGANConfig) else ports_of(config)
    return {dim: sizes.step for dim, sizes in ports.ranges.items() if sizes.step > 1}


def _planned(
    bundle: Bundle, stage: Stage, request: PackageRequest, profile: ProfileEntry, device: DeviceEntry
) -> PlanToBuild:
    """The weights are no source of a package: it computes with any weights of its graph."""
    entry = bundle.entry(stage)
    source = _graph_source(bundle, entry, request.name)
    made_by = f"torch {version('torch')}, networks {_networks_digest()}"
    key = key_of(request, made_by, [str(source.sha256)], f"{device.name} {device.capability}")
    return PlanToBuild(
        stage=stage,
        graph=request.name,
        precision=Precision(request.precision),
        device=device,
        profiles=(profile,),
        sources=(source,),
        request=request,
        key=key,
        path=bundle.root / stage / PLANS / file_name(request, request.name, request.precision, key),
    )


def _graph_source(bundle: Bundle, entry: StageEntry, name: str) -> PlanSource:
    path = entry.graphs[name].path
    file = next(file for file in entry.files if file.path == path)
    return PlanSource(path=path, fingerprint=file.fingerprint, sha256=file.sha256 or sha256_of(bundle.root / path))


@cache
def _networks_digest() -> str:
    """A digest of the code that is compiled: packages of another version of the networks are not found again."""
    from ...runtime.engines.pytorch import networks

    folder = Path(str(networks.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def estimate_package(planned: PlanToBuild) -> Estimate:
    """A rough estimate of the time, memory and disk of building a package; it has no weights."""
    from ...schemas.tensors import expected_tensors

    assert isinstance(planned.request, PackageRequest)
    tensors = len(expected_tensors(from_json(planned.stage, dict(planned.request.config))))
    return Estimate(
        seconds=SECONDS_BASE + tensors * SECONDS_PER_TENSOR,
        memory=MEMORY_BASE + tensors * MEMORY_PER_TENSOR,
        plan=BYTES_BASE + tensors * BYTES_PER_TENSOR,
        nodes=tensors,
        weights=0,
    )

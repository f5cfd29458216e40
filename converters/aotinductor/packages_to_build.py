"""Lists the packages that a build makes: one for each graph and profile. Refuses what cannot be built."""

import hashlib
import os
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ...runtime.engines.engine_table import require_torch
from ...schemas.config_json import from_json
from ...schemas.control import is_control
from ...schemas.errors import EngineError, UsageError
from ...schemas.manifest import ENCODER_GRAPH, MAIN_GRAPH
from ...schemas.plan_entries import DeviceEntry
from ...schemas.profiles import Bounds, profile_for
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from ..onnx import graph_ports
from ..tensorrt.estimate import MIB, Estimate
from ..tensorrt.plan_cache import file_name, key_of
from ..tensorrt.plans_to_build import PLANS, BuildOptions, PlanToBuild, plan_source
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
    packages = []
    for stage in options.stages or tuple(bundle.manifest.stages):
        bundle.check(stage)
        entry = bundle.entry(stage)
        for graph in [each for each in options.graphs or (MAIN_GRAPH,) if each in entry.graphs]:
            packages += [
                _package(bundle, stage, graph, options, bounds=each, device=device) for each in options.profiles
            ]
    return packages


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


def _package(
    bundle: Bundle, stage: Stage, graph: str, options: BuildOptions, *, bounds: Bounds, device: DeviceEntry
) -> PlanToBuild:
    """The package of one graph for the images of `bounds`."""
    from ...runtime.engines.pytorch.torch_engine import computed_precision

    entry = bundle.entry(stage)
    config, precision = from_json(stage, entry.config), computed_precision(stage, entry, None)
    path, inputs = entry.graphs[graph].path, entry.graphs[graph].inputs
    inputs = tuple(port for port in inputs if not is_control(port.name))
    profile = profile_for(config, graph, inputs, bounds)
    request = PackageRequest(
        backend=options.backend,
        graph=str((bundle.root / path).absolute()),
        output="",
        targets=(),
        profiles=({port: shapes.model_dump() for port, shapes in profile.ports.items()},),
        stage=stage,
        name=graph,
        config=entry.config,
        precision=precision,
        runs_on=options.device,
        dims={port.name: port.dims for port in inputs},
        steps={dim: sizes.step for dim, sizes in graph_ports(config, name=graph).ranges.items() if sizes.step > 1},
    )
    # The weights are no source of a package: it computes with any weights of its graph.
    source = plan_source(bundle, entry, next(file for file in entry.files if file.path == path))
    made_by = f"torch {version('torch')}, networks {_networks_digest()}"
    key = key_of(request, made_by, [str(source.sha256)], f"{device.name} {device.capability}")
    return PlanToBuild(
        stage=stage,
        graph=graph,
        precision=precision,
        device=device,
        profiles=(profile,),
        sources=(source,),
        request=request,
        key=key,
        path=bundle.root / stage / PLANS / file_name(request, graph, precision, key),
    )


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

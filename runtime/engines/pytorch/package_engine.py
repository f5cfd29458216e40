"""Runs packages that AOTInductor compiled ahead of time, on the weights of a bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....schemas.errors import EngineError
from ....schemas.manifest import MAIN_GRAPH
from ....schemas.plan_entries import PlanEntry
from ....schemas.precision import Precision
from ....schemas.stages import Stage
from ....storage.bundle import Bundle
from ..plan_choice import check_plan, choose
from .built_here import private_copy
from .device import HOST, torch_errors
from .package_choice import BACKEND, packages_on
from .stage_runner import RATIO, TIME, TensorStage
from .tensors import bundle_tensors, read_tensor
from .torch_engine import DTYPES, computed_precision


class PackageEngine:
    """An engine for the stages of `bundle` that have packages for this machine.

    Packages hold code and no weights. Weights are read from the bundle when a stage is loaded, so the packages of a
    model serve it with any LoRA merged. `threads=None` leaves their number to torch. On a GPU, prior and decoder are
    replayed as CUDA graphs."""

    precision: Precision | None = None  # a package computes as the graph says

    def __init__(self, bundle: Bundle, device: str = HOST, *, threads: int | None = None) -> None:
        """Raises EngineError when torch finds no GPU for the device "cuda"."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.bundle = bundle
        self.device = device
        self.name: str = BACKEND
        self.plans = packages_on(bundle, device)

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return self.plans.graphs(stage)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> TensorStage:
        """Raises EngineError, with the reason and the command that builds a package, when none can be loaded here."""
        entry = self.bundle.entry(stage)
        plans = self.plans.of_graph(stage, graph)
        dtype = DTYPES[computed_precision(stage, entry, None)]
        packages = _Packages(self.bundle, stage, plans, dtype=dtype, device=self.device)
        return TensorStage(stage, entry, graph, compute=packages, dtype=dtype, device=self.device)


class _Packages:
    """The packages of one graph. The one whose profile takes the inputs runs; all of them share the weights."""

    def __init__(
        self, bundle: Bundle, stage: Stage, plans: Sequence[PlanEntry], *, dtype: torch.dtype, device: str
    ) -> None:
        self._bundle, self._stage, self._plans = bundle, stage, plans
        self._dtype, self._device = dtype, device
        self._ranges = bundle_tensors(bundle, stage)
        self._weights: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, Any] = {}  # by path
        self._newest: PlanEntry | None = None
        if len(plans) == 1:  # of several, the first inputs decide
            self._package(plans[0])

    def __call__(self, **inputs: torch.Tensor) -> Mapping[str, torch.Tensor]:
        shapes = {RATIO if name == TIME else name: _shape(name, value) for name, value in inputs.items()}
        plan, _ = choose(self._bundle, self._stage, self._plans, shapes, self._newest)
        self._newest = plan
        outputs: Mapping[str, torch.Tensor] = self._package(plan)(**inputs)
        return outputs

    def _package(self, plan: PlanEntry) -> Any:
        if plan.path not in self._loaded:
            self._loaded[plan.path] = self._load(check_plan(self._bundle, self._stage, plan), plan)
        return self._loaded[plan.path]

    def _load(self, path: Path, plan: PlanEntry) -> Any:
        with private_copy(path, plan.sha256) as copy, torch_errors(f"{path}: torch cannot load the package"):
            index = -1 if self._device == HOST else torch.cuda.current_device()
            package = torch._inductor.aoti_load_package(str(copy), run_single_threaded=True, device_index=index)
            weights = {name: self._weight(name, path) for name in package.get_constant_fqns()}
            package.load_constants(weights, check_full_update=True, user_managed=True)
            return package

    def _weight(self, name: str, path: Path) -> torch.Tensor:
        """A weight on the device, which stays there for as long as this object: packages do not copy weights."""
        if name not in self._weights:
            if name not in self._ranges:
                raise EngineError(
                    f"{path}: needs a weight {name}, which the {self._stage} does not have; build it again"
                )
            self._weights[name] = read_tensor(self._ranges[name]).to(self._device, self._dtype)
        return self._weights[name]


def _shape(name: str, value: torch.Tensor) -> tuple[int, ...]:
    """The shape of a port: the embedded timestep has a row for each ratio."""
    return tuple(value.shape[:1] if name == TIME else value.shape)

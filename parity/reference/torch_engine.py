"""Runs the PyTorch reference behind the engine protocol; every other engine is compared with it."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ...runtime.engines.protocol import HostRunner, Tensors, check_inputs
from ...runtime.engines.pytorch.device import HOST, computing_on, free_device, to_host
from ...schemas.errors import EngineError
from ...schemas.manifest import MAIN_GRAPH
from ...schemas.ports import StagePorts
from ...schemas.precision import Precision
from ...schemas.quantization import Quantization, candidates
from ...schemas.stages import Stage
from .recast import computing_in, rounded
from .rounding import ROUNDINGS

KEPT_FLOAT = ("timestep_ratio",)
QUERIES, KEYS = ("to_q", "q_proj"), ("to_k", "k_proj")  # the Linears of an attention; queries are computed first

Loader = Callable[[], tuple[nn.Module, StagePorts]]


class TorchEngine:
    """An engine on reference modules, each computing in the dtype of its weights.

    A stage's loader is called when the stage is loaded. With `compiled`, torch.compile makes kernels of the modules,
    which takes minutes for every new size. With `compute`, modules compute in that precision; see `TorchStage`.

    `device` is the one that the loaders put modules on. The memory there is freed when a stage is closed."""

    precision: Precision | None = None

    def __init__(
        self,
        loaders: Mapping[Stage, Loader],
        *,
        compiled: bool = False,
        compute: str | None = None,
        device: str = HOST,
        name: str = "torch",
    ) -> None:
        self.name = " ".join((name, *(["in", compute] if compute else ()), *(["on", device] if device != HOST else ())))
        self._loaders = loaders
        self._compiled = compiled
        self._compute = compute

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return (MAIN_GRAPH,)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "TorchStage":
        if stage not in self._loaders:
            raise EngineError(
                f"the reference has no {stage}, only {', '.join(self._loaders)}; give a model that has it"
            )
        module, ports = self._loaders[stage]()
        if self._compiled:
            module.compile(dynamic=False)
        return TorchStage(stage, module, ports, self._compute)


class TorchStage(HostRunner):
    """One reference module that takes and gives numpy arrays, whatever it computes in.

    `compute` is "float64", "float32", "bfloat16" or "float16", whatever dtype the weights have. Weights are then cast
    module by module. The timestep ratio stays float32, as in graphs of every precision: the networks were trained
    with its product with 10000.

    `compute` may also be a `Quantization`. The module then computes in the dtype of its weights, and every Linear that
    `export` may quantise multiplies rounded numbers, as graphs do."""

    def __init__(self, stage: Stage, module: nn.Module, ports: StagePorts, compute: str | None = None) -> None:
        self.stage = stage
        self.ports = ports
        self.compute = compute
        self._module: nn.Module | None = module
        self._dtype = next(module.parameters()).dtype
        self._device = next(module.parameters()).device

    def __call__(self, inputs: Tensors, compute: str | None = None) -> dict[str, NDArray[Any]]:
        check_inputs(self.stage, self.ports.inputs, inputs)
        assert self._module is not None
        kind = compute or self.compute or ""
        quantized = kind in list(Quantization)
        dtype = self._dtype if quantized or not kind else getattr(torch, kind)
        same = dtype == self._dtype
        kinds = {name: dtype if same or name not in KEPT_FLOAT else torch.float32 for name in inputs}
        fed = {name: _fed(array, kinds[name], self._device) for name, array in inputs.items()}
        with torch.inference_mode(), computing_on(self._device), ExitStack() as around:
            if quantized:
                around.enter_context(rounded(self._quantizable(), ROUNDINGS[Quantization(kind)]))
            if not same:
                around.enter_context(computing_in(self._module, dtype))
            outputs = self._module(**fed)
        return {name: to_host(tensor) for name, tensor in outputs.items()}

    def _quantizable(self) -> list[nn.Module]:
        assert self._module is not None
        shapes = {name: tuple(weight.shape) for name, weight in self._module.named_parameters()}
        return [self._module.get_submodule(name) for name in candidates(self.stage, shapes)]

    def watch(
        self,
        inputs: Tensors,
        wanted: Collection[str],
        given: Tensors = MappingProxyType({}),
        compute: str | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The outputs of the modules `wanted` in one pass, and the output ports of that name, float32.

        A module called several times has ``@1``, ``@2`` after its path for every time but the first. The modules in
        `given` are computed too, but later modules see the given values instead."""
        seen: dict[str, NDArray[Any]] = {}

        def watch(name: str, output: torch.Tensor) -> torch.Tensor | None:
            if name in wanted:
                seen[name] = to_host(output)
            return torch.from_numpy(given[name]).to(output) if name in given else None

        with self._hooked({name.partition("@")[0] for name in (*wanted, *given)}, watch):
            outputs = self(inputs, compute)
        return seen | {name: value for name, value in outputs.items() if name in wanted}

    def shapes(self, inputs: Tensors) -> dict[str, tuple[int, ...]]:
        """The shape of every module's output by the names of `watch`, in the order the modules finish.

        The shapes of the output ports follow."""
        assert self._module is not None
        found: dict[str, tuple[int, ...]] = {}

        def note(name: str, output: torch.Tensor) -> None:
            found[name] = tuple(output.shape)

        with self._hooked({name for name, _ in self._module.named_modules() if name}, note):
            outputs = self(inputs)
        return found | {name: value.shape for name, value in outputs.items()}

    def spreads(self, inputs: Tensors) -> dict[str, tuple[float, float]]:
        """The largest magnitude and the root mean square of every module's output in one pass, by name.

        The scores of every attention are among them, named ``PATH/scores``."""
        assert self._module is not None
        found: dict[str, tuple[float, float]] = {}
        queries: dict[str, torch.Tensor] = {}
        heads = {name: part.heads for name, part in self._module.named_modules() if hasattr(part, "heads")}

        def note(name: str, output: torch.Tensor) -> None:
            found[name] = _spread(output)
            path, _, part = name.partition("@")[0].rpartition(".")
            if path in heads and part in QUERIES:
                queries[path] = output
            if path in heads and part in KEYS:
                found[f"{path}/scores"] = _spread(_scores(queries.pop(path), output, heads[path]))

        with self._hooked({name for name, _ in self._module.named_modules() if name}, note):
            self(inputs)
        return found

    @contextmanager
    def _hooked(
        self, names: Collection[str], hook: Callable[[str, torch.Tensor], torch.Tensor | None]
    ) -> Iterator[None]:
        """Inside, `hook` is called with the name and output of each of the modules `names`.

        A tensor that it returns replaces the output."""
        assert self._module is not None
        calls: Counter[str] = Counter()

        def called(name: str, output: Any) -> torch.Tensor | None:
            number, calls[name] = calls[name], calls[name] + 1
            if not isinstance(output, torch.Tensor):
                return None
            return hook(f"{name}@{number}" if number else name, output)

        handles = [
            module.register_forward_hook(lambda module, args, output, name=name: called(name, output))
            for name, module in self._module.named_modules()
            if name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        self._module = None
        free_device(self._device)


def _spread(tensor: torch.Tensor) -> tuple[float, float]:
    wide = tensor.to(torch.float32)
    return float(wide.abs().max()), float(wide.square().mean(dtype=torch.float64).sqrt())


def _scores(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """q kᵀ / √d per head: (B, n, c) and (B, m, c) to (B, heads, n, m)."""
    q, k = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (query, key))
    scores: torch.Tensor = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores


def _fed(array: NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

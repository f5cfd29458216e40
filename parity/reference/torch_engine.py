"""Runs the PyTorch reference behind the engine protocol; what every other engine is compared with."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...runtime.engines.base import HostRunner, Tensors, check_inputs
from ...schemas.bundle import MAIN_GRAPH
from ...schemas.errors import EngineError
from ...schemas.ports import StagePorts
from ...schemas.precision import Precision
from ...schemas.quantization import Quantization, candidates
from ...schemas.stages import Stage
from .rounding import ROUNDINGS, Rounding

KEPT_FLOAT = ("timestep_ratio",)
QUERIES, KEYS = ("to_q", "q_proj"), ("to_k", "k_proj")  # an attention's; the queries come first

Loader = Callable[[], tuple[nn.Module, StagePorts]]


class TorchEngine:
    """An engine on reference modules, each computing in the dtype of its weights; a stage's loader is called when the
    stage is loaded. With `compiled` torch.compile makes kernels of them, anew for every size, in minutes. With
    `compute` they compute in that whatever their weights are in, see `TorchStage`."""

    precision: Precision | None = None

    def __init__(
        self,
        loaders: Mapping[Stage, Loader],
        *,
        compiled: bool = False,
        compute: str | None = None,
        name: str = "torch",
    ) -> None:
        self.name = f"{name} in {compute}" if compute else name
        self._loaders = loaders
        self._compiled = compiled
        self._compute = compute

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return (MAIN_GRAPH,)

    def load(self, stage: Stage, graph: str = MAIN_GRAPH) -> "TorchStage":
        if stage not in self._loaders:
            raise EngineError(f"the reference has no {stage}; it has {', '.join(self._loaders)}")
        module, ports = self._loaders[stage]()
        if self._compiled:
            module.compile(dynamic=False)
        return TorchStage(stage, module, ports, self._compute)


class TorchStage(HostRunner):
    """One reference module taking and giving numpy arrays, whatever it computes in.

    `compute` is "float64", "float32", "bfloat16" or "float16": what a pass computes in whatever the weights are,
    which are then cast module by module, so that there is never a second copy of all of them. The timestep ratio stays
    float32 then, as in graphs of every precision: its product with 10000 is what the networks were trained with.

    It may also be a `Quantization`: then the module computes in the dtype of its weights, and all the Linears that
    `export` may quantise multiply rounded numbers, as graphs do."""

    def __init__(self, stage: Stage, module: nn.Module, ports: StagePorts, compute: str | None = None) -> None:
        self.stage = stage
        self.ports = ports
        self.compute = compute
        self._module: nn.Module | None = module
        self._dtype = next(module.parameters()).dtype

    def __call__(self, inputs: Tensors, compute: str | None = None) -> dict[str, NDArray[Any]]:
        check_inputs(self.stage, self.ports.inputs, inputs)
        assert self._module is not None
        kind = compute or self.compute or ""
        quantized = kind in list(Quantization)
        dtype = self._dtype if quantized or not kind else getattr(torch, kind)
        same = dtype == self._dtype
        fed = {name: _fed(a, dtype if same or name not in KEPT_FLOAT else torch.float32) for name, a in inputs.items()}
        with torch.inference_mode(), ExitStack() as around:
            if quantized:
                around.enter_context(_rounded(self._quantizable(), ROUNDINGS[Quantization(kind)]))
            around.enter_context(_computing_in(self._module, dtype, same=same))
            outputs = self._module(**fed)
        return {name: _taken(tensor) for name, tensor in outputs.items()}

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
        """What the modules `wanted` give in one pass, and the output ports of that name, float32. A module called
        several times has ``@1``, ``@2`` after its path for every time but the first.

        The modules in `given` are computed too, but what comes after them sees the given values instead."""
        seen: dict[str, NDArray[Any]] = {}

        def watch(name: str, output: torch.Tensor) -> torch.Tensor | None:
            if name in wanted:
                seen[name] = _taken(output)
            return torch.from_numpy(given[name]).to(output.dtype) if name in given else None

        with self._hooked({name.partition("@")[0] for name in (*wanted, *given)}, watch):
            outputs = self(inputs, compute)
        return seen | {name: value for name, value in outputs.items() if name in wanted}

    def shapes(self, inputs: Tensors) -> dict[str, tuple[int, ...]]:
        """The shape of what every module gives, by the names `watch` takes, in the order they finish; then those of the
        output ports."""
        assert self._module is not None
        found: dict[str, tuple[int, ...]] = {}
        with self._hooked({name for name, _ in self._module.named_modules() if name}, _shape_into(found)):
            outputs = self(inputs)
        return found | {name: value.shape for name, value in outputs.items()}

    def spreads(self, inputs: Tensors) -> dict[str, tuple[float, float]]:
        """The largest magnitude and the root mean square of what every module gives in one pass, by name, and of the
        scores of every attention, called ``PATH/scores``."""
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
        """Calls `hook` with the name and output of each of the modules `names`; what it returns replaces the output."""
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


def _shape_into(found: dict[str, tuple[int, ...]]) -> Callable[[str, torch.Tensor], None]:
    def note(name: str, output: torch.Tensor) -> None:
        found[name] = tuple(output.shape)

    return note


def _spread(tensor: torch.Tensor) -> tuple[float, float]:
    wide = tensor.to(torch.float32)
    return float(wide.abs().max()), float(wide.square().mean(dtype=torch.float64).sqrt())


def _scores(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """q kᵀ / √d per head: (B, n, c) and (B, m, c) to (B, heads, n, m)."""
    q, k = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (query, key))
    scores: torch.Tensor = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores


def _fed(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _taken(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.to(torch.float32).numpy()


@contextmanager
def _computing_in(module: nn.Module, dtype: torch.dtype, *, same: bool) -> Iterator[None]:
    """Inside, every module that has weights casts them and its inputs to `dtype` for as long as it runs."""
    if same:
        yield
        return

    def cast(arg: Any) -> Any:
        return arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg

    own = [part for part in module.modules() if any(True for _ in _weights(part))]
    tables = [part for part in own if isinstance(part, nn.Embedding)]  # others read their weights past their forward
    with _replaced(own, lambda part: {name: cast(weight) for name, weight in _weights(part)}, cast, tables):
        yield


@contextmanager
def _rounded(linears: Sequence[nn.Module], rounding: Rounding) -> Iterator[None]:
    """Inside, these have rounded weights and inputs for as long as they run."""
    with _replaced(linears, lambda part: {"weight": rounding.weight(part.get_parameter("weight"))}, rounding.inputs):
        yield


@contextmanager
def _replaced(
    parts: Sequence[nn.Module],
    weights: Callable[[nn.Module], Mapping[str, torch.Tensor]],
    inputs: Callable[[Any], Any],
    throughout: Collection[nn.Module] = (),
) -> Iterator[None]:
    """Inside, each of `parts` has the weights that `weights` gives, and what `inputs` makes of its arguments, for as
    long as it runs; those `throughout` have the weights all the time, and their arguments as they are."""
    kept: dict[nn.Module, dict[str, torch.Tensor]] = {}

    def enter(part: nn.Module, args: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        kept[part] = dict(_weights(part))
        _replace(part, weights(part))
        return tuple(map(inputs, args))

    def leave(part: nn.Module, *passed: Any) -> None:
        _replace(part, kept.pop(part))

    handles: list[RemovableHandle] = []
    for part in parts:
        if part not in throughout:
            handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave, prepend=True)]
    try:
        for part in throughout:
            enter(part)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part in list(kept):
            leave(part)


def _weights(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the module itself, floats only."""
    for name, weight in (*part._parameters.items(), *part._buffers.items()):
        if weight is not None and weight.is_floating_point():
            yield name, weight


def _replace(part: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if name in part._parameters:
            part._parameters[name] = nn.Parameter(weight, requires_grad=False)
        else:
            part._buffers[name] = weight


def trace(module: nn.Module, inputs: Tensors, outputs: Sequence[str], path: Path) -> None:
    """Have torch's own exporter trace `module` with `inputs`, at their sizes alone, into an ONNX file at `path`;
    `outputs` are the names of what it gives."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    torch.onnx.export(
        module, (), path, kwargs=tensors, output_names=outputs, dynamo=True, external_data=True, verbose=False
    )


def matmul_rate(dtype: str, rows: int, inner: int, columns: int, seconds: float) -> float:
    """Multiply-adds per second of torch.mm in `dtype`, the best of as many products as fit into `seconds`."""
    kind = getattr(torch, dtype)
    a, b = torch.rand(rows, inner).to(kind), torch.rand(columns, inner).to(kind).T  # as a Linear has them
    begin = perf_counter()
    torch.mm(a, b)
    best = perf_counter() - begin  # counts where no second product fits, as in bf16 on CPUs that emulate it
    while perf_counter() < begin + seconds:
        start = perf_counter()
        torch.mm(a, b)
        best = min(best, perf_counter() - start)
    return rows * inner * columns / best

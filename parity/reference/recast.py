"""Lets modules compute with other weights than their own for the time that they run.

Weights are cast or rounded module by module, so that there is never a second copy of all of them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .rounding import Rounding


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every module that has weights casts them and its inputs to `dtype` for as long as it runs."""

    def cast(arg: Any) -> Any:
        return arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg

    own = [part for part in module.modules() if any(True for _ in _weights(part))]
    tables = [
        part for part in own if isinstance(part, nn.Embedding)
    ]  # other modules read an embedding's weights past its forward
    with _replaced(own, lambda part: {name: cast(weight) for name, weight in _weights(part)}, cast, tables):
        yield


@contextmanager
def rounded(linears: Sequence[nn.Module], rounding: Rounding) -> Iterator[None]:
    """Inside, `linears` have rounded weights and inputs for as long as they run."""
    with _replaced(linears, lambda part: {"weight": rounding.weight(part.get_parameter("weight"))}, rounding.inputs):
        yield


@contextmanager
def _replaced(
    parts: Sequence[nn.Module],
    weights: Callable[[nn.Module], Mapping[str, torch.Tensor]],
    inputs: Callable[[Any], Any],
    throughout: Collection[nn.Module] = (),
) -> Iterator[None]:
    """Inside, each of `parts` runs with the weights that `weights` gives, on the arguments that `inputs` gives.

    The parts in `throughout` have these weights all the time, and their own arguments."""
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

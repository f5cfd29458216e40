"""The prior with ControlNet residuals, against the reference with residuals added as Stability's code does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascadekit.converters.onnx import GraphOptions, graph_ports, write_graph
from cascadekit.runtime.engines.pytorch.networks.blocks import ResBlock
from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from helpers.graphs import open_session, run
from helpers.unets import PRIOR, PRIOR_SIZES, inputs_of

NUMBERS = (0, 3, 5, 9)  # of ten residual blocks: 2 and 3 on the way down, 3 and 2 up again
EXPONENTS = {"down_blocks.0": 2, "down_blocks.1": 3, "up_blocks.1": 1}


@pytest.fixture
def residuals(export: Callable[..., Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    ports = graph_ports(PRIOR, GraphOptions(control=NUMBERS)).inputs
    channels = {port.name: port.dims[1] for port in ports if port.name.startswith("control.")}
    assert list(channels) == [f"control.{number}" for number in NUMBERS]
    return {name: rng.standard_normal((2, c, 4, 3)).astype(np.float32) for name, c in channels.items()}


def with_residuals(graph: Any, inputs: dict[str, np.ndarray], residuals: dict[str, np.ndarray]) -> np.ndarray:
    """One residual for a block, in the order blocks run, resized with aligned corners, added before all else."""
    blocks = [module for module in graph.reference.modules() if isinstance(module, ResBlock)]
    hooks = []
    for number, block in enumerate(blocks):
        if f"control.{number}" not in residuals:
            continue
        residual = torch.from_numpy(residuals[f"control.{number}"])

        def add(module: nn.Module, arguments: Any, residual: torch.Tensor = residual) -> Any:
            x, *rest = arguments
            size = x.shape[-2:]
            return (x + F.interpolate(residual, size, mode="bilinear", align_corners=True), *rest)

        hooks.append(block.register_forward_pre_hook(add))
    try:
        expected: np.ndarray = graph.expected(inputs)["noise_pred"]
    finally:
        for hook in hooks:
            hook.remove()
    return expected


@pytest.mark.parametrize("exponents", [{}, EXPONENTS], ids=["plain", "exponents"])
def test_residuals_are_added_where_they_belong(
    export: Callable[..., Any],
    difference: Callable[..., float],
    residuals: dict[str, np.ndarray],
    exponents: dict[str, int],
) -> None:
    graph = export(PRIOR)
    inputs = inputs_of(graph, PRIOR_SIZES[1])
    path = graph.write(GraphOptions(control=NUMBERS, exponents=exponents))
    found = run(open_session(path), {**inputs, **residuals})
    expected = with_residuals(graph, inputs, residuals)
    assert difference(found, {"noise_pred": expected}) <= 1e-5
    assert difference(graph.expected(inputs), {"noise_pred": expected}) > 0.1  # they matter
    nothing = {name: np.zeros((2, r.shape[1], 1, 1), np.float32) for name, r in residuals.items()}
    assert difference(run(open_session(path), {**inputs, **nothing}), graph.expected(inputs)) <= 1e-5


def test_residuals_in_fp16(
    export: Callable[..., Any],
    evaluate: Callable[..., Any],
    difference: Callable[..., float],
    residuals: dict[str, np.ndarray],
) -> None:
    graph = export(PRIOR)
    inputs = inputs_of(graph, PRIOR_SIZES[1])
    path = graph.write(GraphOptions(control=NUMBERS, precision=Precision.FP16, exponents=EXPONENTS))
    expected = with_residuals(graph, inputs, residuals)
    assert difference(evaluate(path, {**inputs, **residuals}), {"noise_pred": expected}) <= 2e-3


@pytest.mark.parametrize(
    ("stage", "number", "words"), [(Stage.PRIOR, 4, "4 residual blocks"), (Stage.DECODER, 0, "takes no ControlNet")]
)
def test_residuals_for_blocks_that_are_not_there_are_refused(stage: Stage, number: int, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        write_graph(PRESETS[stage, Variant.TINY], {}, GraphOptions(control=(number,)))

"""The effnet encoder graph in onnxruntime against the PyTorch reference."""

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch

from cascadekit.schemas.stages import EffnetEncoderConfig
from helpers.efficientnets import narrow_effnet

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 1e-6 is found

CONFIG = EffnetEncoderConfig()
SIZES = [(1, 1, 1), (2, 33, 70), (1, 97, 128), (3, 31, 64)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], sizes: tuple[int, int, int]
) -> None:
    graph = export(CONFIG)
    inputs = graph.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


NARROW = narrow_effnet(c_latent=5)


def test_other_sizes_of_the_network(export: Callable[..., Any], difference: Callable[..., float]) -> None:
    graph = export(NARROW)
    inputs = graph.inputs(batch=2, height=40, width=50)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    graph = export(NARROW, dtype=lambda name: torch.float16 if "mapper" in name else torch.bfloat16)
    inputs = graph.inputs(batch=1, height=40, width=50)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(NARROW).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round


def test_nothing_is_transposed(export: Callable[..., Any]) -> None:
    nodes = onnx.load(export(CONFIG).path, load_external_data=False).graph.node
    assert not any(node.op_type == "Transpose" for node in nodes)

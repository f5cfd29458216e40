"""Rounded products against ONNX Runtime's own kernels, on weights that its own quantiser made."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.capi import _pybind_state as ort

from cascadekit.parity.reference.rounding import ROUNDINGS
from cascadekit.schemas.quantization import Quantization

F32 = NDArray[np.float32]
COLUMNS, ROWS = 256, 48


@pytest.fixture
def case() -> tuple[F32, F32]:
    """Inputs and a weight (rows, columns), with a block of zeros, a row of zeros, and a value far out."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 9, COLUMNS), np.float32) + np.float32(0.5)
    weight = rng.standard_normal((ROWS, COLUMNS), np.float32)
    weight[3], weight[5, :128], weight[7, 2], inputs[0, 1, :128], inputs[1, 3, 4] = 0, 0, -9, 0, 20
    return inputs, weight


def run(nodes: list[Any], initializers: dict[str, NDArray[Any]], inputs: F32) -> F32:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    found: F32 = InferenceSession(model.SerializeToString()).run(["y"], {"x": inputs})[0]
    return found


def rounded(kind: Quantization, inputs: F32, weight: F32) -> F32:
    with torch.inference_mode():
        rounding = ROUNDINGS[kind]
        product = rounding.inputs(torch.from_numpy(inputs)) @ rounding.weight(torch.from_numpy(weight)).T
    return np.asarray(product.numpy())


@pytest.mark.parametrize(("kind", "bits", "block"), [(Quantization.INT8, 8, 128), (Quantization.INT4, 4, 32)])
def test_by_block(case: tuple[F32, F32], kind: Quantization, bits: int, block: int) -> None:
    inputs, weight = case
    blocks = COLUMNS // block
    packed = np.zeros((ROWS, blocks, block * bits // 8), np.uint8)
    scale, zero = np.zeros(ROWS * blocks, np.float32), np.zeros((ROWS, blocks * bits // 8), np.uint8)
    quantize = {4: ort.quantize_matmul_4bits, 8: ort.quantize_matmul_8bits}[bits]
    quantize(packed, np.ascontiguousarray(weight.T), scale, zero, block, ROWS, COLUMNS, True)
    attributes = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "packed", "scale"], ["y"], domain="com.microsoft", **attributes)
    expected = run([node], {"packed": packed, "scale": scale}, inputs)
    found = rounded(kind, inputs, weight)
    size = np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 1e-5 * size
    assert np.linalg.norm(inputs @ weight.T - expected) > 1e-3 * size


def test_dynamic(case: tuple[F32, F32]) -> None:
    inputs, weight = case
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest == 0, 1, largest / np.float32(127)).astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["step", "scale"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    integers = np.rint(weight / scale[:, None]).astype(np.int8).T
    expected = run(nodes, {"w": np.ascontiguousarray(integers), "scale": scale}, inputs)
    found = rounded(Quantization.INT8_DYNAMIC, inputs, weight)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_fp8(case: tuple[F32, F32]) -> None:
    """By ml_dtypes, in float64."""
    inputs, weight = case

    def nearest(values: F32, largest: Any) -> NDArray[np.float64]:
        scale = np.where(largest == 0, 1, largest / np.float32(448)).astype(np.float32)
        return (values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    rows = nearest(weight, np.abs(weight).max(axis=1, keepdims=True))
    expected = nearest(inputs, np.abs(inputs).max()) @ rows.T
    found = rounded(Quantization.FP8, inputs, weight)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)

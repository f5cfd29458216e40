"""Quantised matrices against ONNX's operators, ONNX Runtime's own quantiser and torch; files of them; the choice."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime.capi._pybind_state as ort_state
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from cascadekit.converters.export import quantize_file
from cascadekit.converters.export.quantize_choice import (
    normal_error,
    product_error,
    rounded_activations,
)
from cascadekit.converters.export.quantize_file import quantize_weights
from cascadekit.converters.export.quantize_values import dequantize, from_e4m3, pack, quantize, to_e4m3
from cascadekit.schemas.errors import ConversionError
from cascadekit.schemas.precision import Target
from cascadekit.schemas.quantization import Quantization, Scheme, candidates, linears
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.schemas.tensors import expected_tensors
from cascadekit.storage.safetensors_reader import TensorRange, read_header

INT8, INT4, DYNAMIC, FP8 = Quantization.INT8, Quantization.INT4, Quantization.INT8_DYNAMIC, Quantization.FP8
PORTABLE, ORT, TENSORRT = Target
SCHEMES = [
    *(Scheme(kind, target, size) for kind in (INT8, INT4) for target in (ORT, TENSORRT) for size in (32, 64, 128)),
    Scheme(DYNAMIC),
    Scheme(FP8),
]


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Normal numbers; a row of zeros, one of one sign, and one with a value far out."""
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    values[1], values[2], values[3] = 0, -np.abs(values[2]), np.abs(values[3])
    values[0, columns // 2] = 40
    return values


def name_of(scheme: Scheme) -> str:
    return f"{scheme.kind}-{scheme.target}-{scheme.block_size}"


def by_ort(values: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of ONNX Runtime's quantiser for MatMulNBits."""
    rows, columns = values.shape
    blocks = -(-columns // block)
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scale, zeros = np.zeros(rows * blocks, np.float32), np.zeros(rows * -(-blocks * bits // 8), np.uint8)
    run = ort_state.quantize_matmul_4bits if bits == 4 else ort_state.quantize_matmul_8bits
    run(packed, np.ascontiguousarray(values.T), scale, zeros, block, rows, columns, True)
    return packed, scale.reshape(rows, blocks)


@pytest.mark.parametrize("columns", [128, 70, 33, 31, 1])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", [INT8, INT4])
def test_packed_as_onnxruntime_packs(kind: Quantization, block: int, columns: int) -> None:
    """Bit for bit, but for what means nothing (scales of zeros, what pads a row), and for quotients next to a tie:
    ONNX Runtime adds 128 or 8 in fp32 before it rounds, which moves them by up to half a unit there, 2^-17."""
    values, scheme = matrix(200, columns), Scheme(kind, ORT, block)
    found = quantize(values, scheme)
    packed, scale = by_ort(values, scheme.bits, block)
    np.testing.assert_array_equal(found.scale, np.where(scale == 0, 1, scale))
    ours, theirs = pack(found, scheme), packed
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    if kind is INT4:
        ours, theirs = (np.stack([part & 15, part >> 4], -1) for part in (ours, theirs))
    ours, theirs = (part.reshape(len(values), -1) for part in (ours, theirs))
    other = np.argwhere(ours[:, :columns] != theirs[:, :columns])
    quotients = values.astype(np.float64) / np.repeat(found.scale, block, 1)[:, :columns]
    assert len(other) <= 2
    assert all(abs(abs(quotients[row, column] % 1) - 0.5) < 2**-16 for row, column in other)
    assert (ours[:, columns:] == 1 << scheme.bits - 1).all()


def by_onnx(values: np.ndarray, scale: np.ndarray, kind: int, **layout: int) -> tuple[np.ndarray, np.ndarray]:
    """QuantizeLinear, and DequantizeLinear of its result, in onnx's own evaluator."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=kind, **layout),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], **layout),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "scale")]
    outputs = [
        helper.make_tensor_value_info("q", kind, None),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    quantized, read = ReferenceEvaluator(model).run(None, {"x": values, "scale": scale})
    return quantized, read


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.target is not ORT], ids=name_of)
def test_values_are_those_of_quantizelinear(scheme: Scheme) -> None:
    values = matrix(9, 256)
    found = quantize(values, scheme)
    kind = {INT8: TensorProto.INT8, INT4: TensorProto.INT4, FP8: TensorProto.FLOAT8E4M3FN}.get(scheme.kind)
    layout = {"axis": 1, "block_size": scheme.block_size} if scheme.blockwise else {"axis": 0}
    quantized, read = by_onnx(values, found.scale, kind or TensorProto.INT8, **layout)
    theirs = quantized.view(np.uint8) if scheme.kind is FP8 else quantized.astype(np.int8)
    np.testing.assert_array_equal(found.values, theirs)
    np.testing.assert_array_equal(dequantize(found, scheme), read)
    assert (found.scale > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_the_error_is_at_most_half_a_step(scheme: Scheme) -> None:
    """And no value saturates, but the one opposite the extreme where that took the last code."""
    values = matrix(50, 70 if scheme.fits(70) else 128)
    found = quantize(values, scheme)
    error = np.abs(dequantize(found, scheme) - values)
    if scheme.kind is FP8:
        assert (error <= np.maximum(np.abs(values) / 16, found.scale[:, None] * 2**-10) * (1 + 1e-6)).all()
        return
    step = np.abs(found.scale if scheme.blockwise else found.scale[:, None])
    step = np.repeat(step, scheme.block_size, 1)[:, : values.shape[1]] if scheme.blockwise else step
    allowed = np.where(found.values == (1 << scheme.bits - 1) - 1, 1.0 if scheme.packed else 0.5, 0.5)
    assert (error <= allowed * step * (1 + 1e-5)).all()
    assert (dequantize(found, scheme)[1] == 0).all()


def test_ties_go_to_even() -> None:
    values = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -128, *[0] * 24]], np.float32)
    for scheme in (Scheme(INT8, ORT), Scheme(INT8, TENSORRT)):
        found = quantize(values, scheme)
        assert found.scale.tolist() == [[1.0]]
        assert found.values[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -128]


def test_e4m3_is_that_of_torch_and_ml_dtypes() -> None:
    rng = np.random.default_rng(0)
    patterns = np.arange(256, dtype=np.uint8)
    finite = patterns[(patterns & 127) != 127]
    numbers = from_e4m3(finite)
    np.testing.assert_array_equal(numbers, finite.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    ordered = np.unique(numbers)
    middles = (ordered[1:] + ordered[:-1]) / 2  # ties
    values = np.concatenate(
        [
            numbers,
            middles,
            np.nextafter(middles, np.float32(np.inf)),
            np.nextafter(middles, np.float32(-np.inf)),
            rng.standard_normal(5000, np.float32) * np.exp(rng.uniform(-12, 5, 5000)).astype(np.float32),
            np.array([1e-45, -1e-38], np.float32),
        ]
    ).astype(np.float32)
    values = values[np.abs(values) <= 448]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_e4m3(values), expected)
    np.testing.assert_array_equal(to_e4m3(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert from_e4m3(to_e4m3(np.array([460, -1e9], np.float32))).tolist() == [448, -448]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=name_of)
def test_nan_and_infinity_are_refused(scheme: Scheme, bad: float) -> None:
    values = matrix(5, 128)
    values[4, 127] = bad
    with pytest.raises(ConversionError, match="NaN or infinite values"):
        quantize(values, scheme)


# Files


@pytest.fixture
def source(tmp_path: Path) -> dict[str, TensorRange]:
    """Matrices in three dtypes, one as a 1x1 convolution."""
    tensors = {
        "a.weight": torch.from_numpy(matrix(40, 64)),
        "b.weight": torch.from_numpy(matrix(33, 128, 1)).bfloat16()[:, :, None, None],
        "c.weight": torch.from_numpy(matrix(21, 64, 2)).half(),
        "d.weight": torch.from_numpy(matrix(25, 192, 3)),
        "d.bias": torch.randn(25),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return dict(read_header(tmp_path / "source.safetensors").tensors)


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("scheme", SCHEMES[::3] + SCHEMES[-2:], ids=name_of)
def test_a_file_holds_what_whole_matrices_give(
    source: dict[str, TensorRange],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: Scheme,
    rows_at_once: int,
) -> None:
    monkeypatch.setattr(quantize_file, "BLOCK_VALUES", rows_at_once * 64)
    done: list[int] = []
    path = tmp_path / "quantized.safetensors"
    found = quantize_weights(source, "dabc", scheme, path, done.append)
    stored = load_file(path)
    assert set(stored) == {f"{m}.weight_{part}" for m in "abcd" for part in ("quantized", "scale")} == set(found)
    assert sum(done) == sum(tensor.nbytes for tensor in found.values())
    floats = load_file(tmp_path / "source.safetensors")
    for module in "abcd":
        whole = floats[f"{module}.weight"].float().squeeze()
        expected = quantize(whole.contiguous().numpy(), scheme)
        values = stored[f"{module}.weight_quantized"].view(torch.uint8).numpy()
        np.testing.assert_array_equal(values, pack(expected, scheme).view(np.uint8))
        np.testing.assert_array_equal(stored[f"{module}.weight_scale"].numpy(), expected.scale)


def test_refused_files(source: dict[str, TensorRange], tmp_path: Path) -> None:
    path, scheme = tmp_path / "quantized.safetensors", Scheme(INT8)
    save_file({"a.weight": torch.full((4, 32), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(ConversionError, match=r"nan\.safetensors: a\.weight holds NaN"):
        quantize_weights(read_header(tmp_path / "nan.safetensors").tensors, ["a"], scheme, path)
    with pytest.raises(ConversionError, match=r"nowhere.*cannot be written"):
        quantize_weights(source, ["a"], scheme, tmp_path / "nowhere" / "quantized.safetensors")


MEMORY = """
import resource, sys
from pathlib import Path
from cascadekit.converters.export.quantize_file import quantize_weights
from cascadekit.storage.safetensors_reader import read_header
from cascadekit.schemas.precision import Target
from cascadekit.schemas.quantization import Quantization, Scheme
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for kind in sys.argv[2:]:
    scheme = Scheme(Quantization(kind), Target.PORTABLE)
    quantize_weights(read_header(folder / "big.safetensors").tensors, ["a"], scheme, folder / f"{kind}.safetensors")
    print(kind, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A matrix of 268 MB, and less than 200 MB more at the peak than after the imports, with each kind."""
    rows = torch.randn(64, 8192).clamp(-3, 3)
    save_file({"a.weight": rows.repeat(128, 1)}, tmp_path / "big.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path), INT8, INT4, DYNAMIC, FP8]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    peaks = {kind: 1024 * int(kilobytes) for kind, kilobytes in (line.split() for line in out.stdout.splitlines())}
    assert list(peaks) == [INT8, INT4, DYNAMIC, FP8]
    assert max(peaks.values()) < 200e6, peaks


# The choice


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [  # step / sqrt(12); the expected largest of n normal numbers is 2.38 for 32, 2.88 for 128, 3.68 for 2048
        (Scheme(INT8, ORT), 2.38 / 128 / 12**0.5),
        (Scheme(INT4, ORT), 2.38 / 8 / 12**0.5),
        (Scheme(INT4, ORT, 128), 2.88 / 8 / 12**0.5),
        (Scheme(INT8, ORT, int8_products=True), np.hypot(2.38 / 128, 2.38 / 127) / 12**0.5),
        (Scheme(DYNAMIC), np.hypot(3.68 / 127, 2 * 4.7 / 255) / 12**0.5),  # 4.7: of 262144
        (Scheme(FP8), 0.0265),  # half a step of 3 bits, uniform in a binade: 2^-4 / sqrt(3) on 1.36, its rms
    ],
    ids=str,
)
def test_what_rounding_costs_normal_numbers(scheme: Scheme, expected: float) -> None:
    assert normal_error(scheme, 2048) == pytest.approx(expected, rel=0.05)


def test_activations_are_rounded_as_the_operators_do() -> None:
    rows = matrix(7, 96)
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"x": rows})
    np.testing.assert_allclose(rounded_activations(rows, Scheme(DYNAMIC)), expected, rtol=1e-6)
    products = rounded_activations(rows, Scheme(INT4, ORT, int8_products=True))
    own = quantize(rows, Scheme(INT8, PORTABLE))  # the same but for the scale: at most half a step of that
    step = np.repeat(np.abs(rows).reshape(7, 3, 32).max(2) / 127, 32, 1)
    assert (np.abs(products - rows) <= step * 0.50001).all()
    assert own.scale.shape == (7, 3)


def test_error_of_a_product() -> None:
    rng = np.random.default_rng(0)
    x, w, other = (rng.standard_normal(shape, np.float32) for shape in ((6, 32), (9, 32), (9, 32)))
    expected = np.linalg.norm(x @ (w - other).T) / np.linalg.norm(x @ w.T)
    assert product_error(x, [(w[:4], other[:4]), (w[4:], other[4:])], Scheme(INT8)) == pytest.approx(expected, rel=1e-5)
    nothing = np.zeros((2, 32), np.float32)
    assert product_error(x, [(nothing, nothing)], Scheme(INT8)) == 0
    assert product_error(x, [(nothing, w[:2])], Scheme(INT8)) == 1


@pytest.mark.parametrize("stage", [Stage.PRIOR, Stage.DECODER, Stage.TEXT_ENCODER])
def test_every_matrix_product_has_a_rule(stage: Stage) -> None:
    """In the full network, all 2-D weights and 1x1 convolutions are named, embeddings of words apart."""
    config = PRESETS[stage, Variant.FULL]
    expected = expected_tensors(config)
    named = {module for module, _, _ in linears(stage, expected)}
    flat = {
        name.removesuffix(".weight")
        for name, shape in expected.items()
        if name.endswith(".weight") and len(shape) > 1 and np.prod(shape[2:]) == 1 and "text_model.emb" not in name
    }
    assert named == flat
    can = sum(rows * columns for rows, columns in candidates(stage, expected).values())
    assert can / sum(np.prod(shape) for shape in expected.values()) > 0.8


@pytest.mark.parametrize("variant", [Variant.FULL, Variant.LITE])
def test_the_level_that_writes_the_decoders_output_costs_little_in_float(variant: Variant) -> None:
    config = PRESETS[Stage.DECODER, variant]
    level = f"up_blocks.{config.levels - 1}."
    shapes = expected_tensors(config)
    perceptrons = {module: shape for module, shape, _ in linears(config.stage, shapes) if ".channelwise." in module}
    kept = {module for module in perceptrons if module not in candidates(config.stage, shapes)}
    assert kept == {module for module in perceptrons if module.startswith(level)}
    values = sum(np.prod(perceptrons[module]) for module in kept)
    assert 0 < values < 0.004 * sum(np.prod(shape) for shape in candidates(config.stage, shapes).values())


def test_arrays_of_the_file_are_read_alike_by_numpy(source: dict[str, Any], tmp_path: Path) -> None:
    quantize_weights(source, "a", Scheme(INT4, ORT), tmp_path / "q.safetensors")
    arrays = load_arrays(tmp_path / "q.safetensors")
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "a.weight_quantized": ("uint8", (40, 2, 16)),
        "a.weight_scale": ("float32", (40, 2)),
    }

"""The note for CPUs on which ONNX Runtime's 8-bit products saturate, against its results here."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cascadekit.runtime.engines import cpu_flags
from cascadekit.runtime.engines import int8_saturation as int8
from cascadekit.runtime.engines.int8_saturation import int8_saturates, int8_warning
from cascadekit.runtime.engines.onnxruntime import import_onnxruntime
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

DEPTH = 64


def test_the_flags_tell_what_onnxruntime_computes() -> None:
    """The largest values there are: each pair of products is beyond 16 bits."""
    weights = np.full((DEPTH, 32), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "products",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [4, DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [4, 32])],
        [helper.make_tensor("b", TensorProto.INT8, weights.shape, weights.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    session = import_onnxruntime("cpu").InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((4, DEPTH), 255, np.uint8)})
    assert int8_saturates() == bool((found != DEPTH * 255 * 127).any())


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [("fpu avx2", True), ("fpu avx2 avx_vnni", False), ("avx512f avx512_vnni", False), ("avx512f", True)],
)
def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, saturates: bool) -> None:
    monkeypatch.setattr(int8.platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu_flags, "CPUINFO", tmp_path / "cpuinfo")
    assert int8_saturates() == saturates
    monkeypatch.setattr(cpu_flags, "CPUINFO", tmp_path / "missing")
    assert not int8_saturates()


def test_the_warning_names_the_stages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_bundle(tiny / "bundle").manifest
    prior = manifest.stages[Stage.PRIOR].model_copy(update={"quantization": Quantization.INT8_DYNAMIC})
    quantised = manifest.model_copy(update={"stages": {**manifest.stages, Stage.PRIOR: prior}})
    monkeypatch.setattr(int8, "int8_saturates", lambda: True)
    assert "8-bit products of prior saturate" in (int8_warning(quantised, "onnxruntime") or "")
    assert int8_warning(quantised, "openvino") is None
    assert int8_warning(manifest, "onnxruntime") is None

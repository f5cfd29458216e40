"""ONNX Runtime on a GPU that is not there: what it may fall back to, what goes to the device, what is installed twice.

The sessions are real ones on the CPU that say they are elsewhere.
"""

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cascadekit import export
from cascadekit.runtime.engines import installed_packages as installs
from cascadekit.runtime.engines.engine_table import make_engine
from cascadekit.runtime.engines.mixed_bundles import MixedEngine
from cascadekit.runtime.engines.onnxruntime import (
    OnnxRuntimeEngine,
    import_onnxruntime,
    operators_on_cpu,
    provider_problem,
)
from cascadekit.runtime.engines.provider_options import RECORD_ASSIGNMENT
from cascadekit.runtime.sampling.denoiser import is_hoisted
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle
from cascadekit.storage.install_hint import install_hint
from helpers.fake_ort_cuda import CPU, CUDA, TENSORRT, FakeOrtCuda


@pytest.fixture
def bundle(tiny: Path) -> Bundle:
    return open_bundle(tiny / "bundle")


def use(monkeypatch: pytest.MonkeyPatch, **how: Any) -> FakeOrtCuda:
    ort = FakeOrtCuda(**how)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", ort)
    return ort


def installed(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name.replace("-", "_")]

    monkeypatch.setattr(installs, "version", version)


def latents(seed: int = 0, side: int = 16) -> dict[str, Any]:
    return {"latents": np.random.default_rng(seed).standard_normal((1, 4, side, side), dtype=np.float32)}


def test_a_session_on_the_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = OnnxRuntimeEngine(bundle).load(Stage.VQGAN)(latents())["images"]
    ort = use(monkeypatch)
    engine = OnnxRuntimeEngine(bundle, "cuda")
    np.testing.assert_array_equal(engine.load(Stage.VQGAN)(latents())["images"], wanted)
    (asked,) = ort.asked
    assert (engine.name, asked["enable_fallback"]) == ("onnxruntime", 0)
    fast = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    assert asked["providers"] == [(CUDA, fast)]  # the vqgan runs once for an image: no CUDA graph
    OnnxRuntimeEngine(bundle, "cuda", tf32=True).load(Stage.DECODER)
    assert ort.asked[-1]["providers"] == [(CUDA, {**fast, "use_tf32": "1", "enable_cuda_graph": "1"})]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_weights_go_from_their_file_to_the_device(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """ONNX Runtime reads them by itself, in the type that they are stored and computed in, into blocks of their size.
    Matrices have no cast, but for the constants of conditions that are always 0. Graphs
    in fp16 get convolutions on channels last."""
    safe = {"fp16_safe": "off"} if precision == "fp16" else {}
    export(tiny / "model", tmp_path / "bundle", precision=precision, target="ort", **safe)
    made = open_bundle(tmp_path / "bundle")
    ort = use(monkeypatch)
    engine = OnnxRuntimeEngine(made, "cuda")
    for stage in made.manifest.stages:
        for name in made.entry(stage).graphs:
            engine.load(stage, name).close()
            path, options = ort.opened[-1]
            assert path == made.root / made.entry(stage).graphs[name].path
            assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"
            assert (ort.asked[-1]["providers"][0][1].get("prefer_nhwc") == "1") == (precision == "fp16")
            graph = onnx.load(path, load_external_data=False).graph
            cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
            matrices = {each.name for each in graph.initializer if len(each.dims) == 2 and min(each.dims) > 1}
            assert {each for each in matrices & cast if ".mapper_" not in each and "pixels_" not in each} == set()


def test_the_tensorrt_provider(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ort = use(monkeypatch, starts=(TENSORRT, CUDA, CPU))
    engine = make_engine("onnxruntime-tensorrt", bundle)
    engine.load(Stage.VQGAN)
    first, second = ort.asked[0]["providers"]
    assert (engine.name, first[0], second[0]) == ("onnxruntime-tensorrt", TENSORRT, CUDA)
    assert first[1]["trt_engine_cache_path"] == str(tmp_path / "cascadekit" / "onnxruntime")


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_falling_back_in_silence_is_an_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ort = use(monkeypatch, starts=(CPU,))
    with pytest.raises(EngineError, match=r"vqgan: onnxruntime did not start its .*nvidia-smi; .* allow_cpu=True"):
        OnnxRuntimeEngine(bundle, device).load(Stage.VQGAN)
    runner = OnnxRuntimeEngine(bundle, device, allow_cpu=True).load(Stage.VQGAN)
    assert ort.asked[-1]["providers"][-1][0] == CPU
    assert ort.asked[-1]["enable_fallback"] == 0
    bound = runner.bind(latents())
    assert bound({})["images"].shape == (1, 3, 64, 64)
    assert ort.uploads == []
    assert capsys.readouterr() == ("", "")


def test_a_provider_that_raises(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's does where its libraries are missing, in several lines."""
    ort = use(monkeypatch, starts=(CPU,))
    start = ort.InferenceSession

    def fail(path: Path, options: Any, **wishes: Any) -> Any:
        if wishes["providers"] != [(CPU, {})]:
            raise RuntimeError("Please install\n TensorRT libraries\n")
        return start(path, options, **wishes)

    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(EngineError, match=r"cannot load the vqgan: Please install TensorRT libraries$"):
        OnnxRuntimeEngine(bundle, "tensorrt").load(Stage.VQGAN)
    assert OnnxRuntimeEngine(bundle, "tensorrt", allow_cpu=True).load(Stage.VQGAN)(latents())


def test_a_provider_whose_libraries_are_missing(tmp_path: Path) -> None:
    """The system's words, not ours: which library it did not find."""
    folder = tmp_path / "capi"
    folder.mkdir()
    ort = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    assert provider_problem(ort, CUDA) is None
    (folder / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    assert "libonnxruntime_providers_shared.so: cannot open" in str(provider_problem(ort, CUDA))


def test_operators_left_to_the_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ((CUDA, ["Conv"]), (CPU, ["Shape", "MatMul", "Conv"]), (CPU, ["MatMul"]))
    use(monkeypatch, parts=parts)
    with pytest.raises(EngineError, match=r"left 1 Conv, 2 MatMul to the CPU; export it in another precision, or"):
        OnnxRuntimeEngine(bundle, "cuda").load(Stage.VQGAN)
    assert OnnxRuntimeEngine(bundle, "cuda", allow_cpu=True).load(Stage.VQGAN)(latents())


def test_the_real_one_tells_where_operators_are(bundle: Bundle) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    session = onnxruntime.InferenceSession(bundle.graph(Stage.VQGAN), options, providers=[CPU])
    assert operators_on_cpu(session)["ConvTranspose"] == 1
    assert set(operators_on_cpu(session)) <= {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def test_constants_stay_on_the_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def inputs(batch: int) -> dict[str, Any]:
        shapes = {
            "sample": (batch, 4, 16, 24),
            "clip_text_pooled": (batch, 1, 12),
            "effnet": (batch, 16, 3, 2),
        }
        arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        return {**arrays, "timestep_ratio": np.full(batch, 0.5, np.float32)}

    cases = [inputs(2), inputs(2), inputs(2)]
    cpu = OnnxRuntimeEngine(bundle).load(Stage.DECODER)
    ort = use(monkeypatch)
    runner = OnnxRuntimeEngine(bundle, "cuda").load(Stage.DECODER)
    constants = {"clip_text_pooled": cases[0]["clip_text_pooled"], "effnet": cases[0]["effnet"].transpose(0, 1, 3, 2)}
    bound = runner.bind(constants)
    for case in cases:
        varying = {name: case[name] for name in ("sample", "timestep_ratio")}
        wanted = cpu({**varying, **{name: np.ascontiguousarray(array) for name, array in constants.items()}})
        np.testing.assert_array_equal(bound(varying)["noise_pred"], wanted["noise_pred"])
    varying = sum(cases[0][name].nbytes for name in ("sample", "timestep_ratio"))
    assert sum(ort.uploads) == sum(array.nbytes for array in constants.values()) + len(cases) * varying
    assert set(ort.downloads) == {wanted["noise_pred"].nbytes}
    with pytest.raises(EngineError, match=r"decoder, input clip_text_pooled: expected float32 \[batch=1, 1, 12\]"):
        bound({"sample": cases[0]["sample"][:1], "timestep_ratio": np.zeros(1, np.float32)})


def test_a_decoder_of_another_bundle_runs_in_parts_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step then launches a quarter less kernels than the whole graph, as that of a bundle by itself."""
    use(monkeypatch)
    gpu, cpu = OnnxRuntimeEngine(bundle, "cuda"), OnnxRuntimeEngine(bundle)
    assert is_hoisted(gpu, Stage.DECODER)
    assert is_hoisted(MixedEngine(cpu, {Stage.DECODER: gpu}), Stage.DECODER)
    assert not is_hoisted(MixedEngine(gpu, {Stage.DECODER: cpu}), Stage.DECODER)
    assert is_hoisted(MixedEngine(gpu, {Stage.DECODER: cpu}), Stage.PRIOR)


def test_outputs_of_another_size(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    bound = OnnxRuntimeEngine(bundle, "cuda").load(Stage.VQGAN).bind({})
    for side in (16, 20, 12):
        assert bound(latents(side=side))["images"].shape == (1, 3, 4 * side, 4 * side)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_failed_run_is_told_in_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("CUDA failure 2: out of memory ;\n\texpr=cudaMalloc;\n")

    use(monkeypatch)
    runner: Any = OnnxRuntimeEngine(bundle, device).load(Stage.VQGAN)
    runner._session.run = fail
    with pytest.raises(
        EngineError, match=r"^vqgan: onnxruntime failed: CUDA failure 2: out of memory ; expr=cuda\w+;$"
    ):
        runner(latents())


def test_two_installs_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, has=(CPU,))
    installed(monkeypatch, onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    with pytest.raises(EngineError) as error:
        import_onnxruntime("cuda")
    assert str(error.value) == (
        "this ONNX Runtime has no CUDAExecutionProvider: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed "
        "together and overwrite each other's files; pip uninstall -y onnxruntime onnxruntime-gpu, "
        f"then {install_hint('gpu')}"
    )
    installed(monkeypatch, onnxruntime="1.32.0")
    with pytest.raises(EngineError, match=re.escape(f"pip uninstall onnxruntime, then {install_hint('gpu')}")):
        import_onnxruntime("cuda")
    assert import_onnxruntime("cuda", allow_cpu=True).get_available_providers() == [CPU]
    assert import_onnxruntime("cpu")

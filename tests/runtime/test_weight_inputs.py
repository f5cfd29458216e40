"""Plans that take weights as inputs, on a GPU that is not there: what they compute is what ONNX Runtime computes of the
whole graph with the weights the bundle has."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cascadekit.converters.lora.merge_bundle import apply_loras, undo_loras
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.engines.tensorrt.engine import TensorRTEngine, cuda, nvidia
from cascadekit.runtime.engines.tensorrt.nvidia import open_host
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle
from helpers.fake_gpu import FakeGpu, FakeTensorRT, add_plan, profile_of, shapes_for, without_plans

STAGE = Stage.TEXT_ENCODER
SIZES = {"batch": (1, 2, 4), "tokens": (77, 77, 77)}
SPARE = 10_000  # bytes of a plan


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "import_cuda_runtime", lambda: gpu)
    monkeypatch.setattr(nvidia, "import_tensorrt", lambda backend: FakeTensorRT(gpu))
    return gpu


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    """With a plan of the text encoder."""
    bundle = without_plans(tiny / "bundle", tmp_path / "bundle")
    profile = profile_of(shapes_for(bundle, STAGE, "model", SIZES), 64, 128, 256)
    return add_plan(bundle, STAGE, [profile], weights=SPARE, weights_as_inputs=True)


def inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    names = [port.name for port in bundle.entry(STAGE).inputs]
    ids = random.integers(1, 90, (2, 77))
    mask = np.ones_like(ids)
    mask[:, 40:] = 0
    return {name: mask if "mask" in name else ids for name in names}


def agree(bundle: Bundle, engine: TensorRTEngine) -> dict[str, np.ndarray]:
    fed = inputs(bundle)
    runner = engine.load(STAGE)
    wanted = OnnxRuntimeEngine(bundle, threads=1).load(STAGE)(fed)
    for _ in range(3):
        found = runner(fed)
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
    return wanted


def engine_of(bundle: Bundle, tmp_path: Path) -> TensorRTEngine:
    return TensorRTEngine(bundle, open_host("tensorrt-rtx"), cache=tmp_path / "kernels")


def write_lora(path: Path, module: str, shape: tuple[int, int]) -> Path:
    random = np.random.default_rng(1)
    up, down = (random.normal(0, 0.5, size).astype(np.float32) for size in ((shape[0], 2), (2, shape[1])))
    name = "lora_te_" + module.replace(".", "_")
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": np.float32([2])}, path)
    return path


def test_the_same_plan_with_a_lora_and_without(bundle: Bundle, gpu: FakeGpu, tmp_path: Path) -> None:
    (plan,) = bundle.entry(STAGE).plans
    assert [source.path for source in plan.sources] == ["text_encoder/model.onnx"]
    plain = agree(bundle, engine_of(bundle, tmp_path))
    lora = write_lora(tmp_path / "lora.safetensors", "text_model.encoder.layers.0.mlp.fc1", (32, 8))
    apply_loras(bundle.root, [lora])
    merged = open_bundle(bundle.root)
    assert merged.entry(STAGE).plans == (plan,)
    changed = agree(merged, engine_of(merged, tmp_path))
    assert all(np.abs(changed[name] - plain[name]).max() > 1e-3 for name in plain)
    undo_loras(bundle.root)
    again = agree(open_bundle(bundle.root), engine_of(open_bundle(bundle.root), tmp_path))
    assert all(np.array_equal(again[name], plain[name]) for name in plain)


def test_weights_go_to_the_device_once_and_leave_it(bundle: Bundle, gpu: FakeGpu, tmp_path: Path) -> None:
    (plan,) = bundle.entry(STAGE).plans
    given = [weight.bytes for weight in plan.weight_inputs]
    with safe_open(bundle.root / plan.weight_inputs[0].path, "numpy") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys() if "fc" in name and name.endswith("weight")]  # noqa: SIM118
    assert set(sizes) <= set(given)
    engine = engine_of(bundle, tmp_path)
    before = gpu.taken
    runner = engine.load(STAGE)
    assert gpu.uploads == given
    assert runner.device_bytes == gpu.taken - before == SPARE + sum(given)
    fed = inputs(bundle)
    runner(fed)
    runner(fed)
    assert len(gpu.uploads) == len(given) + 2 * len(fed)
    runner.evict()
    assert gpu.taken == before
    runner(fed)
    assert gpu.uploads.count(given[0]) >= 2 * given.count(given[0])
    runner.close()
    assert gpu.taken == before


def test_other_weights_that_are_built_in(bundle: Bundle, gpu: FakeGpu, tmp_path: Path) -> None:
    """A bias that changes makes the plan one of other weights; changed back, it is good again."""
    (plan,) = bundle.entry(STAGE).plans
    assert plan.built_in is not None
    ((path, ranges),) = plan.built_in.ranges.items()
    content = (bundle.root / path).read_bytes()
    at = ranges[-1][1] - 1
    (bundle.root / path).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert engine_of(bundle, tmp_path).graphs(STAGE) == ()
    with pytest.raises(EngineError, match="other weights than the bundle has now, besides those that are its inputs"):
        engine_of(bundle, tmp_path).load(STAGE)
    (bundle.root / path).write_bytes(content)
    assert engine_of(bundle, tmp_path).graphs(STAGE) == ("model",)
    agree(bundle, engine_of(bundle, tmp_path))


def test_weights_of_another_type(bundle: Bundle, gpu: FakeGpu, tmp_path: Path) -> None:
    entry = bundle.entry(STAGE)
    profile = profile_of(shapes_for(bundle, STAGE, "model", SIZES), 64, 128, 256)
    name = entry.plans[0].weight_inputs[0].name
    strange = add_plan(bundle, STAGE, [profile], weights_as_inputs=True, types={name: "HALF"}, name="half")
    with pytest.raises(EngineError, match=r"takes the weights text_model\S+ HALF, which is FLOAT in the bundle; build"):
        engine_of(strange, tmp_path).load(STAGE)(inputs(bundle))

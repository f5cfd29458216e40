"""The TensorRT engines on a GPU that is not there: what they compute, choose, keep on it, refuse and give back."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from cuda.bindings import runtime as real_cuda

from cascadekit.converters.tensorrt import BuildOptions, build
from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.engines.engine_table import make_engine
from cascadekit.runtime.engines.mixed_bundles import MixedEngine
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.engines.plan_choice import choose
from cascadekit.runtime.engines.tensorrt import cuda
from cascadekit.runtime.engines.tensorrt import host as nvidia
from cascadekit.runtime.engines.tensorrt.cuda import Cuda
from cascadekit.runtime.engines.tensorrt.execution import Execution
from cascadekit.runtime.engines.tensorrt.host import Host, open_host
from cascadekit.runtime.engines.tensorrt.tensorrt_engine import TensorRTEngine
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle
from helpers.fake_gpu import FakeGpu, FakeTensorRT, add_plan, profile_of, shapes_for, without_plans

# Least, likeliest and largest size of symbolic dims: images of 64, 128 and 256 pixels, up to two, and guidance.
SIDES = {
    Stage.PRIOR: (2, 3, 6),
    Stage.DECODER: (16, 32, 64),
    Stage.VQGAN: (16, 32, 64),
}
OTHERS = {
    "batch": (1, 2, 4),
    "tokens": (77, 77, 77),
    "images": (1, 1, 1),
    "context": (4, 85, 85),
    "steps": (1, 20, 60),
    "effnet_height": (2, 3, 6),
    "effnet_width": (2, 3, 6),
    "height/2": (8, 16, 32),
    "width/2": (8, 16, 32),
}

SMALL = Bounds(*map(parse_image_size, ("64x64", "64x64", "128x128")))

Make = Callable[..., TensorRTEngine]


def profile(bundle: Bundle, stage: Stage, graph: str = "model", scale: int = 1) -> Any:
    sides = tuple(side * scale for side in SIDES.get(stage, (1, 1, 1)))
    ports = shapes_for(bundle, stage, graph, {**OTHERS, "height": sides, "width": sides})  # type: ignore[dict-item]
    return profile_of(ports, 64 * scale, 128 * scale, 256 * scale)


def with_plan(bundle: Bundle, stage: Stage, graph: str = "model", **wishes: Any) -> Bundle:
    return add_plan(bundle, stage, [profile(bundle, stage, graph)], graph=graph, **wishes)


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    return without_plans(tiny / "bundle", tmp_path / "bundle")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "import_cuda_runtime", lambda: gpu)
    return gpu


@pytest.fixture
def trt(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    trt = FakeTensorRT(gpu)
    monkeypatch.setattr(nvidia, "import_tensorrt", lambda backend: trt)
    return trt


@pytest.fixture
def make(trt: FakeTensorRT, tmp_path: Path) -> Make:
    def make(bundle: Bundle, backend: Any = "tensorrt-rtx", **wishes: Any) -> TensorRTEngine:
        return TensorRTEngine(bundle, open_host(backend), cache=tmp_path / "kernels", **wishes)

    return make


def plain(trt: FakeTensorRT) -> None:
    """Let the TensorRT be the one that leaves CUDA graphs to us."""
    trt.rtx = False
    del trt.CudaGraphStrategy
    trt.__version__ = "11.4.0.106"


def latents(batch: int = 1, side: int = 32, seed: int = 0) -> dict[str, Any]:
    return {"latents": np.random.default_rng(seed).standard_normal((batch, 4, side, side), dtype=np.float32)}


def expected(bundle: Bundle, stage: Stage, inputs: dict[str, Any]) -> dict[str, Any]:
    return OnnxRuntimeEngine(bundle, threads=1).load(stage)(inputs)


def prior_inputs(batch: int = 2, side: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {
        "sample": (batch, 16, side, side),
        "clip_text_pooled": (batch, 1, 12),
        "clip_text": (batch, 77, 8),
        "clip_img": (batch, 1, 768),
    }
    return {
        **{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
        "timestep_ratio": np.linspace(0.9, 0.1, batch, dtype=np.float32),
    }


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_a_cascade_draws_the_same_image(bundle: Bundle, trt: FakeTensorRT, make: Make, backend: Any) -> None:
    if backend == "tensorrt":
        plain(trt)
    for stage in (Stage.TEXT_ENCODER, Stage.DECODER, Stage.VQGAN):
        bundle = with_plan(bundle, stage, backend=backend, version=trt.__version__)
    for graph in ("conditioning", "step"):
        bundle = with_plan(bundle, Stage.PRIOR, graph, backend=backend, version=trt.__version__)
    engine = make(bundle, backend)
    assert engine.graphs(Stage.PRIOR) == ("conditioning", "step")
    settings = {"seed": 1, "width": 136, "height": 72, "prior_steps": 3, "decoder_steps": 2, "decoder_guidance": 1.5}
    images = []
    for runs in (engine, OnnxRuntimeEngine(bundle, threads=1)):
        with Cascade(runs, bundle.manifest, ClipTokenizer.open(bundle.tokenizer)) as cascade:
            images.append(cascade.generate(["a hat", "a cat"], **settings).images)  # type: ignore[arg-type]
    for found, wanted in zip(*images, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert trt.gpu.calls.count("launch") == (4 if backend == "tensorrt" else 0)  # all but each stage's first


@pytest.mark.parametrize("closes", [True, False])
def test_everything_is_given_back(bundle: Bundle, gpu: FakeGpu, make: Make, closes: bool) -> None:
    """Also by a runner that is only let go."""
    bundle = with_plan(bundle, Stage.VQGAN)
    runner = make(bundle).load(Stage.VQGAN)
    bound = runner.bind(latents())
    bound({})
    assert gpu.taken > 10_000
    if closes:
        runner.close()
        assert (gpu.taken, gpu._pending, gpu._graphs) == (0, {}, {})
    del runner, bound
    gc.collect()
    assert gpu.taken == 0


def test_buffers_are_used_again(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    runner = make(with_plan(bundle, Stage.VQGAN)).load(Stage.VQGAN)
    addresses = []
    for side, seed in ((32, 1), (32, 2), (16, 3), (33, 4), (20, 5)):
        inputs = latents(2, side, seed)
        np.testing.assert_array_equal(runner(inputs)["images"], expected(bundle, Stage.VQGAN, inputs)["images"])
        addresses.append(set(gpu.blocks))
    assert addresses[0] == addresses[1] == addresses[2]
    assert addresses[3] == addresses[4]
    assert addresses[3].isdisjoint(addresses[2])


def test_constants_go_to_the_device_once(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    inputs = prior_inputs()
    varying = {name: inputs.pop(name) for name in ("sample", "timestep_ratio")}
    bundle = with_plan(bundle, Stage.PRIOR)
    runner = make(bundle).load(Stage.PRIOR)
    first, second = runner.bind(inputs), runner.bind({name: array[::-1].copy() for name, array in inputs.items()})
    wanted = [expected(bundle, Stage.PRIOR, {**b, **varying})["noise_pred"] for b in (inputs, second._constants)]  # type: ignore[dict-item]
    for _ in range(3):
        for bound, want in zip((first, second), wanted, strict=True):
            np.testing.assert_array_equal(bound(varying)["noise_pred"], want)
    constant = [array.nbytes for array in inputs.values()]
    assert [gpu.uploads.count(nbytes) for nbytes in constant] == [2, 2, 2]
    with pytest.raises(EngineError, match="prior: clip_text given, though bound already"):
        first({**varying, "clip_text": inputs["clip_text"]})
    blocks = len(gpu.blocks)
    del second, bound
    gc.collect()
    assert len(gpu.blocks) == blocks - len(constant)


def test_tensorrt_captures_what_repeats(bundle: Bundle, trt: FakeTensorRT, make: Make) -> None:
    plain(trt)
    bundle = with_plan(bundle, Stage.VQGAN, backend="tensorrt", version=trt.__version__)
    runner = make(bundle, "tensorrt").load(Stage.VQGAN)
    calls = []
    for side, seed in ((20, 1), (20, 2), (20, 3), (24, 4), (20, 5), (20, 6)):
        trt.gpu.calls.clear()
        inputs = latents(1, side, seed)
        np.testing.assert_array_equal(runner(inputs)["images"], expected(bundle, Stage.VQGAN, inputs)["images"])
        calls.append(" ".join(trt.gpu.calls))
    assert calls == ["run", "begin capture launch run", "launch run", "run", "run", "begin capture launch run"]
    assert len(trt.gpu._graphs) == 1


def test_what_cannot_be_captured_runs_all_the_same(bundle: Bundle, trt: FakeTensorRT, make: Make) -> None:
    plain(trt)
    trt.capturable = False
    bundle = with_plan(bundle, Stage.VQGAN, backend="tensorrt", version=trt.__version__)
    runner = make(bundle, "tensorrt").load(Stage.VQGAN)
    for _ in range(4):
        np.testing.assert_array_equal(runner(latents())["images"], expected(bundle, Stage.VQGAN, latents())["images"])
    assert trt.gpu.calls == ["run", "begin capture", "run", "run", "run"]


def test_rtx_captures_itself_and_keeps_its_kernels(
    bundle: Bundle, trt: FakeTensorRT, make: Make, tmp_path: Path
) -> None:
    bundle = with_plan(bundle, Stage.VQGAN)
    for _ in range(2):
        runner = make(bundle).load(Stage.VQGAN)
        runner(latents())
        runner.close()
    assert "launch" not in trt.gpu.calls
    assert [strategy.name for strategy in trt.graph_strategies] == ["WHOLE_GRAPH_CAPTURE"] * 2
    assert trt.loaded_kernels == [trt.kernels]
    (kept,) = (tmp_path / "kernels").iterdir()
    assert kept.read_bytes() == trt.kernels


def test_kernels_that_cannot_be_kept_stop_nothing(bundle: Bundle, make: Make, tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    runner = make(with_plan(bundle, Stage.VQGAN)).load(Stage.VQGAN)
    runner(latents())
    runner.close()


@pytest.mark.parametrize(("types", "tolerance"), [("HALF", 2e-3), ("BF16", 2e-2)])
def test_ports_in_half_precision(bundle: Bundle, make: Make, types: str, tolerance: float) -> None:
    bundle = with_plan(bundle, Stage.VQGAN, types={"latents": types, "images": types})
    found = make(bundle).load(Stage.VQGAN)(latents(2))["images"]
    wanted = expected(bundle, Stage.VQGAN, latents(2))["images"]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < tolerance


@pytest.mark.parametrize("kind", ["INT64", "INT32"])
def test_token_ids(bundle: Bundle, make: Make, kind: str) -> None:
    bundle = with_plan(bundle, Stage.TEXT_ENCODER, types={"input_ids": kind, "attention_mask": kind})
    tokens = ClipTokenizer.open(None)(["a hat", ""])
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    found, wanted = make(bundle).load(Stage.TEXT_ENCODER)(inputs), expected(bundle, Stage.TEXT_ENCODER, inputs)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_ports_of_a_type_nobody_feeds(bundle: Bundle, make: Make) -> None:
    with pytest.raises(EngineError, match="latents is FP8"):
        make(with_plan(bundle, Stage.VQGAN, types={"latents": "FP8"})).load(Stage.VQGAN)


def test_a_plan_of_another_graph(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    bundle = with_plan(bundle, Stage.TEXT_ENCODER, ports=("pooled",))
    with pytest.raises(EngineError, match=r"not the plan .*prompt_embeds and 1 profiles, found .*; build it again"):
        make(bundle).load(Stage.TEXT_ENCODER)
    gc.collect()
    assert (gpu.taken, gpu._pending) == (0, {})


def test_the_nearest_profile_is_chosen(bundle: Bundle, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    run = Execution.run

    def spy(self: Execution, number: int, *rest: Any) -> Any:
        chosen.append((self.plan.path, number))
        return run(self, number, *rest)

    monkeypatch.setattr(Execution, "run", spy)
    two = [profile(bundle, Stage.VQGAN), profile(bundle, Stage.VQGAN, scale=2)]
    bundle = add_plan(bundle, Stage.VQGAN, two, name="two")
    bundle = add_plan(bundle, Stage.VQGAN, [profile(bundle, Stage.VQGAN, scale=3)], name="large")
    runner = make(bundle).load(Stage.VQGAN)
    for side in (32, 64, 40, 16, 129, 128, 17):
        inputs = latents(1, side)
        np.testing.assert_array_equal(runner(inputs)["images"], expected(bundle, Stage.VQGAN, inputs)["images"])
    assert [number for _, number in chosen] == [0, 1, 0, 0, 0, 0, 0]
    assert ["large" in path for path, _ in chosen] == [False] * 4 + [True, True, False]


def test_no_profile_fits(bundle: Bundle, make: Make) -> None:
    runner = make(with_plan(bundle, Stage.VQGAN)).load(Stage.VQGAN)
    with pytest.raises(EngineError) as error:
        runner(latents(1, 80))
    for part in (
        "vqgan: no profile of its plans takes latents [1, 4, 80, 80] (it takes [1, 4, 16, 16] to [4, 4, 64, 64])",
        "64x64 to 256x256, 1 to 2 images",
        f"cascadekit build {bundle.root} --backend tensorrt-rtx --stage vqgan",
    ):
        assert part in str(error.value), part
    with pytest.raises(EngineError, match=r"vqgan, input latents: expected float32 .*found float64"):
        runner({"latents": np.zeros((1, 4, 32, 32))})
    with pytest.raises(EngineError, match="expected inputs latents, found x"):
        runner({"x": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"targets": ("sm80", "sm86")}, r"was built for sm80, sm86, this GPU is sm89 \(NVIDIA Fake 4090\); make"),
        ({"version": "1.6.0.1"}, "was built with tensorrt-rtx 1.6.0.1, installed is 1.7.1.116; make another"),
        ({"backend": "tensorrt"}, "the bundle has no tensorrt-rtx plan of its graph 'model'; make one"),
    ],
)
def test_plans_for_others_are_refused(bundle: Bundle, make: Make, wishes: dict[str, Any], message: str) -> None:
    engine = make(with_plan(bundle, Stage.VQGAN, **wishes))
    assert engine.graphs(Stage.VQGAN) == ()
    with pytest.raises(EngineError, match=message) as error:
        engine.load(Stage.VQGAN)
    command = f"cascadekit build {bundle.root} --backend tensorrt-rtx --stage vqgan --arch sm89"
    assert str(error.value).endswith(command)
    assert "\n" not in str(error.value)


def test_a_graph_that_is_not_built_unasked(bundle: Bundle, make: Make) -> None:
    engine = make(with_plan(bundle, Stage.PRIOR, "step"))
    for stage, graph, option in ((Stage.PRIOR, "model", " --graph model"), (Stage.PRIOR, "conditioning", "")):
        with pytest.raises(EngineError, match=rf"no tensorrt-rtx plan .*--stage prior{option} --arch sm89$"):
            engine.load(stage, graph)
    with pytest.raises(EngineError, match=r"--stage vqgan --graph encoder --arch sm89$"):
        engine.load(Stage.VQGAN, "encoder")


def test_a_real_plan_is_taken_for_what_it_is(bundle: Bundle, gpu: FakeGpu) -> None:
    """Built here by TensorRT-RTX; it is chosen, found whole, and read as far as that goes without a driver."""
    build(bundle.root, BuildOptions(targets=("sm89",), stages=(Stage.VQGAN,), profiles=(SMALL,)))
    bundle = open_bundle(bundle.root)
    there = Cuda()
    host = Host("tensorrt-rtx", tensorrt_rtx, there, there.device())
    engine = TensorRTEngine(bundle, host)
    assert engine.graphs(Stage.VQGAN) == ("model",)
    if real_cuda.cudaGetDeviceCount()[0] != real_cuda.cudaError_t.cudaSuccess:
        with pytest.raises(EngineError, match=r"\.plan: tensorrt-rtx cannot load it: \S"):
            engine.load(Stage.VQGAN)
    (plan,) = bundle.entry(Stage.VQGAN).plans
    with pytest.raises(EngineError, match=r"they are for 64x64 to 128x128, 1 image\. Choose"):
        choose(bundle, Stage.VQGAN, (plan,), {"latents": (1, 4, 64, 64)}, None)
    path = bundle.root / plan.path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(EngineError, match=r"\.plan: the plan is damaged: expected SHA-256"):
        engine.load(Stage.VQGAN)


def change(bundle: Bundle, stage: Stage, suffix: str) -> Bundle:
    """The bundle as if files of that suffix were others than when plans were built."""
    path = bundle.root / "cascade.json"
    content = json.loads(path.read_text())
    for plan in content["stages"][stage]["plans"]:
        for source in plan["sources"]:
            if source["path"].endswith(suffix):
                source |= {"fingerprint": "0" * 64, "sha256": "0" * 64}
    path.write_text(json.dumps(content))
    return open_bundle(bundle.root)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_plans_of_other_weights_are_refused(bundle: Bundle, make: Make, suffix: str) -> None:
    bundle = change(with_plan(bundle, Stage.VQGAN), Stage.VQGAN, suffix)
    with pytest.raises(EngineError, match="was built from other weights or graphs than the bundle has now; make"):
        make(bundle).load(Stage.VQGAN)


def test_plans_that_take_other_weights(bundle: Bundle, trt: FakeTensorRT, make: Make) -> None:
    plain(trt)
    kind: dict[str, Any] = {"backend": "tensorrt", "version": trt.__version__}
    given: list[Path] = []

    def refit(engine: Any, graph: Path) -> None:
        given.append(graph)

    for refittable, suffix, runs in (
        (True, ".safetensors", True),
        (False, ".safetensors", False),
        (True, ".onnx", False),
    ):
        there = change(with_plan(bundle, Stage.VQGAN, refittable=refittable, **kind), Stage.VQGAN, suffix)
        assert make(there, "tensorrt").graphs(Stage.VQGAN) == ()
        engine = make(there, "tensorrt", refit=refit)
        assert engine.graphs(Stage.VQGAN) == (("model",) if runs else ())
        if runs:
            engine.load(Stage.VQGAN)(latents())
        else:
            with pytest.raises(EngineError, match="was built from other weights"):
                engine.load(Stage.VQGAN)
    assert given == [bundle.root / "vqgan/model.onnx"]
    current = with_plan(there, Stage.VQGAN, name="current", refittable=True, **kind)
    make(current, "tensorrt", refit=refit).load(Stage.VQGAN)(latents())
    assert len(given) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "the plan is missing; build it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged: expected 10000 bytes, it has 9999"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), r"damaged: expected SHA-256 \w+\.\.\., found"),
    ],
)
def test_damaged_plans_are_refused(bundle: Bundle, make: Make, damage: Callable[[Path], None], message: str) -> None:
    bundle = with_plan(bundle, Stage.VQGAN)
    damage(bundle.root / bundle.entry(Stage.VQGAN).plans[0].path)
    with pytest.raises(EngineError, match=rf"vqgan/model.plan.plan: .*{message}.*--stage vqgan --arch sm89$"):
        make(bundle).load(Stage.VQGAN)


def test_what_tensorrt_says_comes_in_one_line(
    bundle: Bundle, make: Make, monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRT
) -> None:
    bundle = with_plan(bundle, Stage.VQGAN)
    deserialize = trt._deserialize
    monkeypatch.setattr(trt, "_deserialize", lambda content, logger: deserialize(b"junk", logger))
    with pytest.raises(EngineError, match=r"plan: tensorrt-rtx cannot load it: IRuntime.*kEXPECTED_MAGIC_TAG$"):
        make(bundle).load(Stage.VQGAN)


def test_stages_leave_under_a_budget_and_come_back(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    for stage in (Stage.TEXT_ENCODER, Stage.VQGAN, Stage.DECODER):
        bundle = with_plan(bundle, stage, weights=1_000_000)
    engine = make(bundle, memory_budget=2_500_000)
    vqgan, decoder, text = (engine.load(stage) for stage in (Stage.VQGAN, Stage.DECODER, Stage.TEXT_ENCODER))
    assert [bool(stage.device_bytes) for stage in (vqgan, decoder, text)] == [False, True, True]
    bound = vqgan.bind(latents())
    for _ in range(2):
        np.testing.assert_array_equal(bound({})["images"], expected(bundle, Stage.VQGAN, latents())["images"])
        assert [bool(stage.device_bytes) for stage in (vqgan, decoder, text)] == [True, False, True]
        assert gpu.taken <= 2_500_000
        decoder._ready(decoder._plans[0])
        assert [bool(stage.device_bytes) for stage in (vqgan, decoder, text)] == [True, True, False]
        text._ready(text._plans[0])
        assert [bool(stage.device_bytes) for stage in (vqgan, decoder, text)] == [False, True, True]


def test_stages_of_several_bundles_share_the_budget(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    for stage in (Stage.TEXT_ENCODER, Stage.VQGAN, Stage.DECODER):
        bundle = with_plan(bundle, stage, weights=1_000_000)
    engines = [make(bundle, memory_budget=2_500_000) for _ in range(2)]
    mixed = MixedEngine(engines[0], {Stage.DECODER: engines[1]})
    loaded: Any = [mixed.load(stage) for stage in (Stage.VQGAN, Stage.DECODER, Stage.TEXT_ENCODER)]
    assert [bool(stage.device_bytes) for stage in loaded] == [False, True, True]
    assert gpu.taken <= 2_500_000
    loaded[0](latents())
    assert [bool(stage.device_bytes) for stage in loaded] == [True, False, True]


def test_a_full_gpu_makes_room_too(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    for stage in (Stage.TEXT_ENCODER, Stage.VQGAN):
        bundle = with_plan(bundle, stage, weights=1_000_000)
    gpu.total = 1_500_000
    engine = make(bundle)
    text = engine.load(Stage.TEXT_ENCODER)
    vqgan = engine.load(Stage.VQGAN)
    assert (text.device_bytes, bool(vqgan.device_bytes)) == (0, True)
    gpu.total = 1_001_000
    with pytest.raises(
        EngineError, match=r"vqgan: the GPU's memory does not hold it \(.*free\); choose a smaller size"
    ):
        vqgan(latents(2, 64))
    assert gpu.taken == 0
    gpu.total = 900_000
    with pytest.raises(EngineError, match=r"vqgan: the GPU's memory does not hold it \(.*OutOfMemory"):
        vqgan(latents())


def test_a_budget_below_one_stage(bundle: Bundle, gpu: FakeGpu, make: Make) -> None:
    bundle = with_plan(bundle, Stage.VQGAN, weights=3 << 20)
    with pytest.raises(EngineError, match=r"vqgan: its plan needs 0.00 GiB .*the budget is 0.00 GiB; raise"):
        make(bundle, memory_budget=2 << 20).load(Stage.VQGAN)
    gc.collect()
    assert gpu.taken == 0


@pytest.mark.parametrize(
    ("wishes", "kept"),
    [
        ({}, 800_000),
        ({"memory_budget": 700_000}, 700_000 - 200_000 - 100_000),
        ({"memory_budget": 310_000}, 10_000),
    ],
)
def test_weights_are_streamed(bundle: Bundle, trt: FakeTensorRT, make: Make, wishes: Any, kept: int) -> None:
    """1,000,000 bytes of plan, of which 800,000 may stay on the host; 100,000 are needed between layers."""
    plain(trt)
    bundle = with_plan(
        bundle,
        Stage.VQGAN,
        backend="tensorrt",
        version=trt.__version__,
        weights=1_000_000,
        streamable=800_000,
        scratch=100_000,
    )
    runner = make(bundle, "tensorrt", **wishes).load(Stage.VQGAN)
    for _ in range(3):
        np.testing.assert_array_equal(runner(latents())["images"], expected(bundle, Stage.VQGAN, latents())["images"])
    assert trt.gpu.reserved == 200_000 + kept + 100_000
    assert ("launch" in trt.gpu.calls) == (kept == 800_000)


def test_make_engine_and_auto(bundle: Bundle, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(Stage.PRIOR, "conditioning"), (Stage.PRIOR, "step")]
    others = [(Stage.TEXT_ENCODER, "model"), (Stage.DECODER, "model"), (Stage.VQGAN, "encoder"), (Stage.VQGAN, "model")]
    for stage, graph in (*parts, *others):
        with pytest.raises(EngineError, match="CUDAExecutionProvider"):
            make_engine("auto", bundle, "cuda")
        bundle = with_plan(bundle, stage, graph)
    engine = make_engine("auto", bundle, "cuda", memory_budget=1 << 20)
    assert (engine.name, engine.room.budget) == ("tensorrt-rtx", 1 << 20)  # type: ignore[attr-defined]
    assert make_engine("tensorrt-rtx", bundle).name == "tensorrt-rtx"
    trt.__version__ = "1.8.0.0"
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        make_engine("auto", bundle, "cuda")
    assert make_engine("auto", bundle).name == "onnxruntime"


def test_a_host_knows_its_gpu(trt: FakeTensorRT) -> None:
    host = open_host("tensorrt-rtx")
    assert isinstance(host, Host)
    assert isinstance(host.cuda, Cuda)
    assert (host.device.name, host.device.capability, host.cuda.driver_version()) == (
        "NVIDIA Fake 4090",
        "sm89",
        "13.0",
    )


def test_plans_of_earlier_versions(bundle: Bundle) -> None:
    """A manifest may name plans that take weights as inputs: they are left out, the others stay."""
    bundle = with_plan(bundle, Stage.TEXT_ENCODER)
    content = json.loads((bundle.root / "cascade.json").read_text())
    (plan,) = content["stages"]["text_encoder"]["plans"]
    weight = {"name": "w", "path": "w.safetensors", "offset": 0, "bytes": 4, "dtype": "F32", "shape": [1]}
    inside = {"ranges": {"w.safetensors": [[4, 8]]}, "sha256": "0" * 64}
    content["stages"]["text_encoder"]["plans"] = [
        {**plan, "weight_inputs": [], "built_in": None},
        {**plan, "path": "text_encoder/other.plan", "weight_inputs": [weight], "built_in": inside},
    ]
    (bundle.root / "cascade.json").write_text(json.dumps(content))
    assert open_bundle(bundle.root).entry(Stage.TEXT_ENCODER).plans == bundle.entry(Stage.TEXT_ENCODER).plans

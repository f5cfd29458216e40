"""CUDA graphs of ONNX Runtime, on a stand-in that has their traps: see `helpers.fake_ort_cuda`.

The results of a graph are compared with ONNX Runtime's CPU sessions on the same inputs, bit for bit.
"""

import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from cascadekit import Cascade
from cascadekit.cli import main
from cascadekit.runtime.engines import cuda_graphs
from cascadekit.runtime.engines.device_arrays import DeviceMemory, resolved
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.engines.onnxruntime_gpu import GpuStage
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.hoisted import CONDITIONING, MODULATION, STEP
from cascadekit.schemas.manifest import GraphEntry, PortEntry
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle
from helpers.fake_ort_cuda import CPU, CUDA, FakeOrtCuda, FakeSession

SIZES = ((16, 24), (24, 16), (16, 16), (32, 16), (16, 32), (24, 24))  # of the decoder's latents
ROUNDS = 3


@pytest.fixture
def bundle(tiny: Path) -> Bundle:
    return open_bundle(tiny / "bundle")


@contextmanager
def gpu(**how: Any) -> Iterator[FakeOrtCuda]:
    ort = FakeOrtCuda(**how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", ort)
        yield ort


def decoder_inputs(size: tuple[int, int], seed: int, batch: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"sample": (batch, 4, *size), "clip_text_pooled": (batch, 1, 12), "effnet": (batch, 16, 3, 2)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**arrays, "timestep_ratio": rng.uniform(0.1, 1, batch).astype(np.float32)}


def split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs that are bound, and those that change in every step."""
    changing = ("sample", "timestep_ratio")
    return {n: v for n, v in inputs.items() if n not in changing}, {n: inputs[n] for n in changing}


class Pair:
    """A decoder on the CPU and one on the stand-in, called alike."""

    def __init__(self, bundle: Bundle, **how: Any) -> None:
        self.expected = OnnxRuntimeEngine(bundle, threads=1).load(Stage.DECODER)
        self.said: list[str] = []
        with gpu(**how) as self.ort:
            found = OnnxRuntimeEngine(bundle, "cuda", threads=1, say=self.said.append).load(Stage.DECODER)
        assert isinstance(found, GpuStage)
        self.found = found

    @property
    def session(self) -> FakeSession:
        return self.ort.sessions[0]

    def image(self, size: tuple[int, int], seed: int, batch: int = 1, steps: int = ROUNDS) -> Any:
        """Bind conditions and make steps; every step has other inputs. Returns the bound stage."""
        constants, _ = split(decoder_inputs(size, seed, batch))
        run = self.found.bind(constants)
        for step in range(steps):
            self.step(run, constants, size, seed=100 * seed + step, batch=batch)
        return run

    def step(self, run: Any, constants: dict[str, Any], size: tuple[int, int], *, seed: int, batch: int = 1) -> None:
        _, changing = split(decoder_inputs(size, seed, batch))
        wanted = self.expected({**constants, **changing})
        np.testing.assert_array_equal(run(changing)["noise_pred"], wanted["noise_pred"])


def test_replays_equal_runs(bundle: Bundle) -> None:
    """Every input changes: those of a step, and the conditions from image to image, at three shapes in turn."""
    pair = Pair(bundle)
    shapes = [(SIZES[0], 1), (SIZES[1], 1), (SIZES[0], 2)]
    for number in range(2 * len(shapes)):
        size, batch = shapes[number % len(shapes)]
        pair.image(size, seed=number, batch=batch)
    assert pair.said == []
    ids = [name for name, _ in pair.session.captured]
    assert ids == ["1", "2", "3"]
    assert all(pair.session.passes[name] == 2 for name in ids)  # the passes before the capture; then replays alone
    assert all(pair.session.replays[name] == 2 * ROUNDS for name in ids)
    assert pair.session.passes["-1"] == len(shapes)  # each graph was proved once


def test_the_host_reads_the_prediction_alone(bundle: Bundle) -> None:
    pair = Pair(bundle)
    pair.image(SIZES[0], seed=1, steps=2)
    pair.ort.downloads.clear()
    pair.ort.uploads.clear()
    inputs = decoder_inputs(SIZES[0], seed=1)
    pair.image(SIZES[0], seed=2, steps=4)
    assert pair.ort.downloads == [inputs["sample"].nbytes] * 4
    assert sum(pair.ort.uploads) == sum(array.nbytes for array in inputs.values()) + 3 * (
        inputs["sample"].nbytes + inputs["timestep_ratio"].nbytes
    )


def test_the_number_of_graphs_is_bounded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    pair = Pair(bundle)
    for number, size in enumerate([*SIZES, *SIZES]):
        pair.image(size, seed=number, steps=2)
        assert pair.session.alive <= 2
    names = [name for name, _ in pair.session.captured]
    assert len(set(names)) == len(names) == 2 * len(SIZES)  # no id serves two shapes
    assert pair.session.released == list(range(1, 2 * len(SIZES) - 1))  # the oldest first
    assert len(pair.ort.memory) <= 3 * 5  # the buffers of a released graph are freed


def test_captures_end_where_releases_may_do_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(cuda_graphs, "MOST_CAPTURES", 3)
    pair = Pair(bundle)
    for number, size in enumerate([*SIZES, *SIZES]):
        pair.image(size, seed=number, steps=2)
    assert len(pair.session.captured) == 3
    without = Pair(bundle, releases=False)  # an ONNX Runtime that cannot release
    for number, size in enumerate([*SIZES, *SIZES]):
        without.image(size, seed=number, steps=2)
    assert [name for name, _ in without.session.captured] == ["1", "2"]
    assert without.session.passes["-1"] > 0


def test_two_images_at_once_share_no_buffers(bundle: Bundle) -> None:
    """As when the steps of two images of one size are interleaved, or a batch goes through in parts."""
    pair = Pair(bundle)
    runs = [(pair.image(SIZES[0], seed, steps=1), split(decoder_inputs(SIZES[0], seed))[0]) for seed in (1, 2)]
    for seed in range(4):
        for run, constants in runs:
            pair.step(run, constants, SIZES[0], seed=50 + seed)
    assert len(pair.session.captured) == 2
    del runs, run
    pair.image(SIZES[0], seed=3)
    assert len(pair.session.captured) == 2  # the buffers came back


def test_other_threads_run_without_capture(bundle: Bundle) -> None:
    pair = Pair(bundle)
    pair.image(SIZES[0], seed=1)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            pair.image(SIZES[0], seed=2)
            pair.image(SIZES[1], seed=3)
        except BaseException as error:
            failed.append(error)

    before = len(pair.session.captured), pair.session.passes["-1"]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert (len(pair.session.captured), pair.session.passes["-1"]) == (before[0], before[1] + 2 * ROUNDS)
    pair.image(SIZES[0], seed=4)
    assert pair.said == []


def test_nothing_is_loaded_while_a_graph_is_captured(bundle: Bundle) -> None:
    """Another thread that loads a stage waits; without the lock the stand-in ends the capture with error 900."""
    pair = Pair(bundle)
    loaded: list[Any] = []

    def load() -> None:
        loaded.append(OnnxRuntimeEngine(bundle, "cuda", threads=1).load(Stage.VQGAN))

    threads: list[threading.Thread] = []

    def begin() -> None:
        threads.append(threading.Thread(target=load))
        threads[-1].start()
        threads[-1].join(0.2)  # without the lock it ends within that time
        assert not loaded

    pair.ort.on_capture = begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", pair.ort)
        pair.image(SIZES[0], seed=1)
        threads[0].join()
    assert len(loaded) == 1
    assert pair.said == []


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"refuses": True}, r"decoder: runs without a CUDA graph, because onnxruntime refuses it: .* Memcpy nodes"),
        ({"fails_to_capture": True}, r"decoder: runs without a CUDA graph, because CUDA failure 900: .*"),
        ({"stale": ["sample"]}, r"decoder: runs without a CUDA graph, because its replay is .* away from a run .*"),
        ({"stale": ["timestep_ratio"]}, r"decoder: runs without .* its replay is .* away .*"),
    ],
)
def test_a_graph_that_does_not_work_is_not_used(bundle: Bundle, how: dict[str, Any], line: str) -> None:
    pair = Pair(bundle, **how)
    for seed, size in enumerate([*SIZES[:2], *SIZES[:2]]):
        pair.image(size, seed)
    (said,) = pair.said
    assert re.fullmatch(line, said)


def test_without_cuda_graphs(bundle: Bundle) -> None:
    with gpu() as ort:
        engine = OnnxRuntimeEngine(bundle, "cuda", cuda_graph=False)
        constants, changing = split(decoder_inputs(SIZES[0], 0))
        run = engine.load(Stage.DECODER).bind(constants)
        for _ in range(3):
            run(changing)
    assert "enable_cuda_graph" not in ort.asked[0]["providers"][0][1]
    assert ort.sessions[0].passes == {"-1": 3}


@pytest.mark.parametrize("option", ["--cuda-graph", "--no-cuda-graph"])
def test_the_option_of_generate(tiny: Path, tmp_path: Path, option: str) -> None:
    words = "--device cuda --engine onnxruntime --size 64x64 --prior-steps 1 --decoder-steps 1 --seed 0".split()
    with gpu() as ort:
        bundle, output = str(tiny / "bundle"), str(tmp_path / "x.png")
        result = CliRunner().invoke(main, ["generate", bundle, "a cat", *words, option, "-o", output])
    assert result.exit_code == 0, result.output
    captured = [session.graphs for session in ort.sessions]
    assert (len(captured), sum(captured)) == (6, 2 * (option == "--cuda-graph"))  # the steps of prior and decoder


def test_keys_and_values_stay_on_the_device(bundle: Bundle) -> None:
    """The conditioning graph writes where the step's graph reads; a second prompt is seen by the same CUDA graph."""
    rng = np.random.default_rng(0)

    def conditions() -> dict[str, Any]:
        shapes = {"clip_text_pooled": (1, 1, 12), "clip_text": (1, 77, 12), "clip_img": (1, 1, 10)}
        entry = bundle.entry(Stage.PRIOR).graphs[CONDITIONING]
        sizes = {port.name: port.dims for port in entry.inputs}
        fixed = {name: (*shapes[name][:2], sizes[name][2]) for name in shapes}
        return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in fixed.items()}

    ratios = np.linspace(1, 0.2, 5, dtype=np.float32)
    cpu = OnnxRuntimeEngine(bundle, threads=1)
    first, step = cpu.load(Stage.PRIOR, CONDITIONING), cpu.load(Stage.PRIOR, STEP)
    with gpu() as ort:
        engine = OnnxRuntimeEngine(bundle, "cuda", threads=1)
        device_first, device_step = engine.load(Stage.PRIOR, CONDITIONING), engine.load(Stage.PRIOR, STEP)
    channels = next(port.dims[1] for port in bundle.entry(Stage.PRIOR).inputs if port.name == "sample")
    for prompt in range(3):
        given = {**conditions(), "timestep_ratios": ratios}
        wanted = dict(first(given))
        ort.downloads.clear()
        kept = dict(device_first.keep(given, (MODULATION,)))
        assert ort.downloads == []  # `read` is bound on the host
        np.testing.assert_array_equal(kept[MODULATION], wanted[MODULATION])
        modulation = kept.pop(MODULATION)
        wanted.pop(MODULATION)
        assert all(not isinstance(array, np.ndarray) for array in kept.values())
        ort.uploads.clear()
        run = device_step.bind(kept)
        for row in range(len(ratios)):
            sample = rng.standard_normal((1, channels, 6, 4 + 2 * (prompt == 2)), dtype=np.float32)
            changing = {"sample": sample, MODULATION: modulation[row : row + 1]}
            np.testing.assert_array_equal(run(changing)["noise_pred"], step({**wanted, **changing})["noise_pred"])
        assert len(ort.uploads) == 2 * len(ratios)  # sample and modulation; no key, no value
        del run, kept
    assert [name for name, _ in ort.sessions[1].captured] == ["1", "2"]  # the third prompt has another size


SMALL = {"width": 128, "height": 128, "prior_steps": 3, "decoder_steps": 2}


def test_whole_images(tiny: Path) -> None:
    """Sizes, prompts, batches in parts, and two images whose steps are interleaved, with stages loaded once."""
    calls = [
        {"prompt": "a cat", **SMALL},
        {"prompt": "a dog", **SMALL, "width": 192},
        {"prompt": ["a", "b", "c"], **SMALL, "decoder_guidance": 2.0},
        {"prompt": "another cat", **SMALL},
    ]
    with Cascade.open(tiny / "bundle", threads=1, rows=2) as cascade:
        expected = [cascade.generate(seed=number, **call).decoder_latents for number, call in enumerate(calls)]  # type: ignore[arg-type]
    with gpu() as ort, Cascade.open(tiny / "bundle", "cuda", threads=1, rows=2) as cascade:
        for number, call in enumerate(calls):
            found = cascade.generate(seed=number, **call).decoder_latents  # type: ignore[arg-type]
            np.testing.assert_array_equal(found, expected[number])
        _interleaved(cascade)
    assert all(session.alive <= cuda_graphs.MOST_GRAPHS for session in ort.sessions)
    assert sum(len(session.captured) for session in ort.sessions) > 4


def _interleaved(cascade: Cascade) -> None:
    embeds = [cascade.encode_prompt(text) for text in ("a cat", "a dog")]
    size: dict[str, Any] = {"height": 128, "width": 128, "steps": 3}
    alone = [[step.latents for step in cascade.prior(each, seed=0, **size)] for each in embeds]
    both = [cascade.prior(each, seed=0, **size) for each in embeds]
    for number, steps in enumerate(zip(*both, strict=True)):
        for which, step in enumerate(steps):
            np.testing.assert_array_equal(step.latents, alone[which][number])


def test_real_bindings_on_the_cpu(bundle: Bundle) -> None:
    """ONNX Runtime's own bindings and values, in the host's memory: the same numbers, at addresses that stay."""
    entry = bundle.entry(Stage.DECODER).graphs["model"]
    session = onnxruntime.InferenceSession(bundle.graph(Stage.DECODER), providers=[CPU])
    memory = DeviceMemory(onnxruntime, "cpu")
    how: dict[str, Any] = {"captures": False, "say": print}
    stage = GpuStage(Stage.DECODER, entry, session, memory, **how)
    for seed, size in enumerate([*SIZES[:2], SIZES[0]]):
        constants, _ = split(decoder_inputs(size, seed))
        run = stage.bind(constants)
        for number in range(ROUNDS):
            changing = split(decoder_inputs(size, 10 * seed + number))[1]
            wanted = session.run(["noise_pred"], {**constants, **changing})[0]
            np.testing.assert_array_equal(run(changing)["noise_pred"], wanted)
    with pytest.raises(EngineError, match=r"decoder, input sample: expected float32 \[batch=1"):
        run({"sample": np.zeros((1, 3, 8, 8), np.float32), "timestep_ratio": np.ones(1, np.float32)})


def test_real_values_are_lent_again() -> None:
    memory = DeviceMemory(onnxruntime, "cpu")
    specs = {"keys": ((2, 3, 4), "float16"), "values": ((2, 3, 4), "float32")}
    first, second = memory.lend(specs), memory.lend(specs)
    addresses = [[array.value.data_ptr() for array in each.values()] for each in (first, second)]
    assert len({address for each in addresses for address in each}) == 4
    first["keys"].write(np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    seen = first["keys"].read()
    keys = first.pop("keys")
    del first
    third = memory.lend(specs)
    assert not {array.value.data_ptr() for array in third.values()} & set(addresses[0])  # `keys` is still lent
    del keys
    fourth = memory.lend(specs)
    assert [array.value.data_ptr() for array in fourth.values()] == addresses[0]
    fourth["keys"].write(np.zeros((2, 3, 4), np.float16))
    np.testing.assert_array_equal(seen, np.arange(24, dtype=np.float16).reshape(2, 3, 4))  # a copy, no view


def test_shapes_of_ports() -> None:
    assert resolved(("batch", 3, "4*height", "width"), {"batch": 2, "height": 5, "width": 7}) == (2, 3, 20, 7)
    with pytest.raises(KeyError, match="context"):
        resolved(("batch", "context", 8), {"batch": 2})


def test_keys_and_values_in_half_precision(tmp_path: Path) -> None:
    """Ports in the type that the graphs compute in: fp16 is written and read on the device, without a cast."""
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    writes = _graph([("text", single)], [("keys", half)], ("Cast", ["text"], ["keys"], {"to": half}))
    reads = _graph(
        [("sample", single), ("keys", half)],
        [("noise_pred", single)],
        ("Cast", ["keys"], ["wide"], {"to": single}),
        ("Mul", ["sample", "wide"], ["noise_pred"], {}),
    )
    ort, memory = FakeOrtCuda(), None
    stages = []
    for name, graph in (("writes", writes), ("reads", reads)):
        onnx.save(graph, tmp_path / name)
        options = {"providers": [(CUDA, {"enable_cuda_graph": "1" if name == "reads" else "0"})]}
        session = ort.InferenceSession(tmp_path / name, onnxruntime.SessionOptions(), **options)
        ports = [
            tuple(PortEntry(name=p.name, dtype=NAMES[p.type.tensor_type.elem_type], dims=("batch", 4)) for p in each)
            for each in (graph.graph.input, graph.graph.output)
        ]
        entry = GraphEntry(path=name, opset=20, inputs=ports[0], outputs=ports[1])
        memory = memory or DeviceMemory(ort)
        how: dict[str, Any] = {"captures": name == "reads", "say": pytest.fail}
        stages.append(GpuStage(Stage.PRIOR, entry, session, memory, **how))
    rng = np.random.default_rng(0)
    for _ in range(3):
        text = rng.standard_normal((2, 4), dtype=np.float32)
        kept = stages[0].keep({"text": text}, ())
        assert kept["keys"].dtype == np.float16
        run = stages[1].bind(kept)
        for _ in range(3):
            sample = rng.standard_normal((2, 4), dtype=np.float32)
            wanted = sample * text.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(run({"sample": sample})["noise_pred"], wanted)
        del run, kept
    assert len(ort.sessions[1].captured) == 1
    assert {array.dtype for array in ort.memory.values()} == {np.dtype("float16"), np.dtype("float32")}
    with pytest.raises(EngineError, match=r"input keys: expected float16 \[batch=2, 4\], found float32 \[2, 4\]"):
        stages[1].bind({"keys": text})({"sample": sample})


def test_keys_and_values_in_bf16(tmp_path: Path) -> None:
    """NumPy and ONNX Runtime's Python have no arrays of bf16, so these ports stay in the device's memory. The bindings
    are ONNX Runtime's own, in the host's memory."""
    wide, narrow = TensorProto.FLOAT, TensorProto.BFLOAT16
    writes = _graph([("text", wide)], [("keys", narrow)], ("Cast", ["text"], ["keys"], {"to": narrow}))
    reads = _graph(
        [("sample", wide), ("keys", narrow)],
        [("noise_pred", wide)],
        ("Cast", ["keys"], ["wide"], {"to": wide}),
        ("Mul", ["sample", "wide"], ["noise_pred"], {}),
    )
    memory, stages = DeviceMemory(onnxruntime, "cpu"), []
    for graph in (writes, reads):
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=[CPU])
        ports = [
            tuple(PortEntry(name=p.name, dtype=NAMES[p.type.tensor_type.elem_type], dims=("batch", 4)) for p in each)
            for each in (graph.graph.input, graph.graph.output)
        ]
        entry = GraphEntry(path="graph", opset=20, inputs=ports[0], outputs=ports[1])
        how: dict[str, Any] = {"captures": False, "say": pytest.fail}
        stages.append(GpuStage(Stage.PRIOR, entry, session, memory, **how))
    rng = np.random.default_rng(0)
    for _ in range(3):
        text, sample = rng.standard_normal((2, 2, 4), dtype=np.float32)
        kept = stages[0].keep({"text": text}, ())
        assert kept["keys"].dtype == ml_dtypes.bfloat16
        wanted = sample * text.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(stages[1].bind(kept)({"sample": sample})["noise_pred"], wanted)


NodeParts = tuple[str, list[str], list[str], dict[str, Any]]  # operator, inputs, outputs, attributes
NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


def _graph(
    inputs: list[tuple[str, int]],
    outputs: list[tuple[str, int]],
    *nodes: NodeParts,
) -> onnx.ModelProto:
    ports = [[helper.make_tensor_value_info(n, kind, ("batch", 4)) for n, kind in each] for each in (inputs, outputs)]
    made = [helper.make_node(kind, given, found, **options) for kind, given, found, options in nodes]
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(helper.make_graph(made, "half", *ports), opset_imports=opset, ir_version=10)

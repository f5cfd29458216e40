"""The prediction of memory: weights counted as the networks and the graphs hold them, and how the rest goes with the
size, the batch and the policy. tests/test_real_size.py measures it."""

import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from cascadekit import Cascade, Settings, export
from cascadekit.runtime.memory import choose_policy, free_memory, prediction
from cascadekit.runtime.memory.choose_policy import chosen_policy
from cascadekit.runtime.memory.prediction import OUTPUT, PROCESS, Peak, _kept, loaded_bytes, predict_peak
from cascadekit.runtime.memory.residency import AUTO, RESIDENT, STAGED, MemoryPolicy
from cascadekit.schemas.config_json import from_json, to_json
from cascadekit.schemas.manifest import Manifest
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import PRESETS, EffnetEncoderConfig, Stage, Variant
from cascadekit.storage.bundle import Bundle, open_bundle
from helpers.whole import Whole

SETTINGS = Settings(1024, 1024)
CASCADE = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
CARDS = (6, 8, 12, 24)  # GB of memory


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Bundle:
    return open_bundle(tiny / "bundle")


def stored(bundle: Bundle, stage: Stage, graph: str) -> int:
    """Bytes of the weights that the ONNX file takes from the stage's fp32 weights, by onnx's own reading."""
    model = onnx.load(bundle.graph(stage, graph), load_external_data=False)
    sizes = {
        (entry["location"], entry["offset"]): math.prod(tensor.dims) * 4
        for tensor in model.graph.initializer
        if (entry := {each.key: each.value for each in tensor.external_data})
    }
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("stage", "graph"),
    [
        (Stage.PRIOR, "model"),
        (Stage.PRIOR, "conditioning"),
        (Stage.PRIOR, "step"),
        (Stage.VQGAN, "model"),
        (Stage.VQGAN, "encoder"),
    ],
)
def test_weights_are_those_of_the_graphs(bundle: Bundle, stage: Stage, graph: str) -> None:
    assert loaded_bytes(bundle.manifest, stage, graph) == pytest.approx(stored(bundle, stage, graph), rel=0.02)


def test_the_parts_take_less_than_the_whole(bundle: Bundle) -> None:
    whole, *parts = (loaded_bytes(bundle.manifest, Stage.PRIOR, name) for name in ("model", "conditioning", "step"))
    assert max(parts) < whole < sum(parts)  # keys and values are in both


def test_half_precision_takes_half(tiny: Path, tmp_path: Path) -> None:
    export(tiny / "model", tmp_path / "half", stages=[Stage.DECODER], precision=Precision.FP16)
    half, whole = (open_bundle(path).manifest for path in (tmp_path / "half", tiny / "bundle"))
    assert 2 * loaded_bytes(half, Stage.DECODER) == loaded_bytes(whole, Stage.DECODER)


def peak(bundle: Bundle, policy: MemoryPolicy = STAGED, images: int = 1, **changes: object) -> Peak:
    return predict_peak(bundle.manifest, policy, replace(SETTINGS, **changes), images)  # type: ignore[arg-type]


def test_how_a_peak_goes(bundle: Bundle) -> None:
    assert peak(bundle).stage is Stage.VQGAN  # activations, where weights are as small as these
    assert peak(bundle).nbytes < peak(bundle, RESIDENT).nbytes
    weights = sum(
        loaded_bytes(bundle.manifest, stage, graph)
        for stage, graph in [
            (Stage.TEXT_ENCODER, "model"),
            (Stage.PRIOR, "conditioning"),
            (Stage.PRIOR, "step"),
            (Stage.DECODER, "model"),
            (Stage.VQGAN, "model"),
        ]
    )
    assert peak(bundle, MemoryPolicy("budget", weights)).nbytes <= peak(bundle, RESIDENT).nbytes
    assert peak(bundle, MemoryPolicy("budget", 1)) == peak(bundle)
    once, twice = (peak(bundle, width=width).nbytes - PROCESS for width in (1024, 2048))
    assert twice == pytest.approx(2 * once, rel=0.02)  # activations go with the pixels
    pixels = 1024 * 1024
    two, four = (peak(bundle, images=images) for images in (2, 4))
    assert four.stage is Stage.VQGAN  # which decodes one image at a time; the pixels of all stay
    assert four.nbytes - two.nbytes == 2 * OUTPUT * pixels


def of_real_size(bundle: Bundle, variant: Variant, precision: Precision) -> Manifest:
    """The tiny bundle's manifest with the configs of the published networks."""
    stages = {}
    for stage, entry in bundle.manifest.stages.items():
        if stage in CASCADE:
            size = variant if stage in (Stage.PRIOR, Stage.DECODER) else Variant.FULL
            config = to_json(PRESETS[stage, size])
            stages[stage] = entry.model_copy(update={"config": config, "precision": precision})
    return bundle.manifest.model_copy(update={"stages": stages})


def test_cards_in_the_docs(bundle: Bundle) -> None:
    """The table of docs/gpu.md has what `predict_peak` computes for an image of 1024x1024 on a GPU."""
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = text[text.index("| cascade | precision |") :].split("\n\n")[0].splitlines()[2:]
    for variant in (Variant.LITE, Variant.FULL):
        for precision in (Precision.FP16, Precision.FP32):
            manifest = of_real_size(bundle, variant, precision)
            sizes = [predict_peak(manifest, p, SETTINGS, 1, device="cuda").nbytes / 1e9 for p in (STAGED, RESIDENT)]
            cards = [next((f"{card} GB" for card in CARDS if gb <= 0.95 * card), "none") for gb in sizes]
            row = f"| {variant} | {precision} | {sizes[0]:.1f} GB | {cards[0]} | {sizes[1]:.1f} GB | {cards[1]} |"
            assert row in table, row


def test_a_peak_on_a_gpu(bundle: Bundle) -> None:
    """Weights are on the GPU once; keys and values stay beside the step's graph: 67 MB of the lite prior in fp32."""
    manifest = of_real_size(bundle, Variant.LITE, Precision.FP16)
    parts = [loaded_bytes(manifest, Stage.PRIOR, graph) for graph in ("conditioning", "step")]
    others = [loaded_bytes(manifest, stage) for stage in CASCADE if stage is not Stage.PRIOR]
    peak_bytes = predict_peak(manifest, RESIDENT, SETTINGS, 1, device="cuda").nbytes
    assert sum(parts) + sum(others) < peak_bytes < sum(parts) + sum(others) + 4e9
    assert _kept(manifest, SETTINGS, 1) == pytest.approx(67e6, rel=0.01)
    assert _kept(of_real_size(bundle, Variant.FULL, Precision.FP16), SETTINGS, 1) == pytest.approx(178e6, rel=0.01)


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit less what is used, pages of files apart, as the kernel's cgroup-v2 documentation has them."""
    content = {"max": "3000000000\n", "current": "1000000000\n", "stat": "anon 1\ninactive_file 5\n"}
    for name, text in content.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    assert free_memory.free_memory() == 2_000_000_005
    (tmp_path / "memory.max").write_text("max\n")
    assert (free_memory.free_memory() or 0) > 0


def test_auto_keeps_all_stages_where_they_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are those that the docs name: half of the free memory, four fifths of the GPU's."""
    lite = of_real_size(bundle, Variant.LITE, Precision.FP16)
    for device, share, place in (("cpu", 0.5, "free_memory"), ("cuda", 0.8, "_gpu_memory")):
        settings = Settings(*lite.default_size)
        needed = predict_peak(lite, RESIDENT, settings, 1, choose_policy.EVERYTHING, device=device, process=8 << 20)
        for memory, policy in ((needed.nbytes / share + 1, RESIDENT), (needed.nbytes / share - 1e6, STAGED)):
            monkeypatch.setattr(choose_policy, place, lambda memory=memory: memory)
            assert chosen_policy(AUTO, lite, device) == policy
            assert chosen_policy(STAGED, lite, device) == STAGED
    monkeypatch.setattr(choose_policy, "free_memory", lambda: None)  # a system that does not say
    assert chosen_policy(AUTO, lite, "cpu") == STAGED


def test_a_cascade_opens_with_the_policy_that_fits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, policy in ((1 << 40, RESIDENT), (1 << 20, STAGED)):
        monkeypatch.setattr(choose_policy, "free_memory", lambda memory=memory: memory)
        with Cascade.open(bundle.root, threads=1) as cascade:
            assert cascade.residency.policy == policy


def test_a_prior_without_parts_keeps_nothing_on_the_gpu(tiny: Path, tmp_path: Path) -> None:
    """Such a bundle was refused with a KeyError: only graphs of a conditioning and of a step leave keys and values."""
    export(tiny / "model", tmp_path / "vqgan", stages=[Stage.VQGAN])
    manifest = open_bundle(tmp_path / "vqgan").manifest
    assert predict_peak(manifest, STAGED, SETTINGS, 1, device="cuda").stage is Stage.VQGAN


def test_a_backbone_counts_what_its_convolutions_return(whole: Whole) -> None:
    """As onnx infers the shapes in the exported graph, without the 1x1 maps of squeeze-excitation."""
    opened, side = open_bundle(whole.bundle), 256
    model = onnx.load(opened.graph(Stage.EFFNET_ENCODER, "model"), load_external_data=False)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, side, side), strict=True):
        dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    convolutions = [shapes[node.output[0]] for node in inferred.node if node.op_type == "Conv"]
    counted = sum(math.prod(shape) for shape in convolutions if shape[-1] > 1) / side**2
    config = from_json(Stage.EFFNET_ENCODER, opened.entry(Stage.EFFNET_ENCODER).config)
    assert isinstance(config, EffnetEncoderConfig)
    assert prediction._backbone_values(config) == pytest.approx(counted, rel=0.02)

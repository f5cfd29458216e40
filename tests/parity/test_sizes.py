"""`verify` compares sizes at, between and off the points of plans' profiles, and the prior as in a generation."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.parity.image_sizes import choose_sizes
from cascadekit.runtime.engines.tensorrt import cuda
from cascadekit.runtime.engines.tensorrt import host as nvidia
from cascadekit.schemas.config_json import from_json
from cascadekit.schemas.profiles import Bounds, parse_image_size, profile_for
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle
from helpers.fake_gpu import FakeGpu, FakeTensorRT, add_plan, without_plans
from helpers.standins import accept_changes

# Width x height of a plan that no small case fits, and which an image of 256x256 is outside of.
LARGE = ("272x264", "280x264", "320x320x2")
DRAWING = {
    Stage.TEXT_ENCODER: ("model",),
    Stage.PRIOR: ("conditioning", "step"),
    Stage.DECODER: ("model",),
    Stage.VQGAN: ("model",),
}


def with_plans(bundle: Bundle, stage: Stage, graph: str, *sizes: Sequence[str], **wishes: Any) -> Bundle:
    """The bundle with a plan of as many profiles, each from its least, likeliest and largest size."""
    entry = bundle.entry(stage)
    config, inputs = from_json(stage, entry.config), entry.graphs[graph].inputs
    profiles = [profile_for(config, graph, inputs, Bounds(*map(parse_image_size, three))) for three in sizes]
    return add_plan(bundle, stage, profiles, graph=graph, weights=200_000, **wishes)


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    return without_plans(tiny / "bundle", tmp_path / "bundle")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    trt = FakeTensorRT(gpu)
    monkeypatch.setattr(cuda, "import_cuda_runtime", lambda: gpu)
    monkeypatch.setattr(nvidia, "import_tensorrt", lambda backend: trt)


def verified(bundle: Bundle, tiny: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the report as JSON, and what was said beside it."""
    arguments = ["verify", str(bundle.root), "--against", str(tiny / "model"), "--json", "--no-verdict", *options]
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, json.loads(result.stdout) if result.stdout else {}, result.stderr


def names(report: dict[str, Any]) -> list[str]:
    return [comparison["name"] for comparison in report["comparisons"]]


def shown(bundle: Bundle, engine: str, **wishes: Any) -> list[str]:
    """The prior's sizes, in short."""
    sizes = choose_sizes(bundle.manifest, engine, **wishes).by_stage[Stage.PRIOR]
    return [str(size).removesuffix(" of its profile").removesuffix(" its profile").strip() for size in sizes]


def test_points_of_profiles(bundle: Bundle) -> None:
    """In width x height, and between them multiples of 8 but not of 16."""
    assert shown(bundle, "onnxruntime", named=(96, 64)) == ["96x64"]
    bundle = with_plans(bundle, Stage.PRIOR, "step", ("768x512", "768x768", "1536x1024x2"))
    every = ["768x512 least", "776x536 between sizes", "768x768 likeliest", "1536x1024 largest"]
    assert shown(bundle, "onnxruntime") == ["768x512 least", "760x504 outside"]
    assert shown(bundle, "onnxruntime", every=True) == [*every, "760x504 outside"]
    assert shown(bundle, "tensorrt-rtx", every=True) == every  # it is bound to them
    assert shown(bundle, "tensorrt") == []
    chosen = choose_sizes(bundle.manifest, "tensorrt-rtx")
    assert chosen.left_out == ((768, 768), (776, 536), (1536, 1024))
    assert (chosen.image, choose_sizes(bundle.manifest, "onnxruntime").image) == ((768, 512), (256, 256))
    bundle = with_plans(bundle, Stage.PRIOR, "conditioning", ("64x64", "64x64", "64x64"))
    assert shown(bundle, "onnxruntime")[-2:] == ["64x64 least", "1544x64 outside"]  # no image is smaller


def test_every_stage_is_compared_at_its_own_points(bundle: Bundle, tiny: Path) -> None:
    """Latents of ceil(side / 42.67) and ceil(side / 4), at three timesteps."""
    bundle = with_plans(bundle, Stage.PRIOR, "step", ("80x64", "80x64", "160x128"))
    bundle = with_plans(bundle, Stage.VQGAN, "model", ("72x72", "72x80", "72x80"))
    code, report, _ = verified(bundle, tiny, "--stage", "prior", "--stage", "vqgan")
    assert code == 0, report
    at = [name for name in names(report) if "profile" in name]
    latents = (
        "height 2, width 2, tokens 77, images 1{}, 80x64 least of its profile",
        "height 3, width 3, tokens 77, images 1{}, 88x88 between sizes of its profile",
        "height 3, width 4, tokens 77, images 1{}, 160x128 largest of its profile",
        "height 2, width 4, tokens 77, images 1{}, 168x64 outside its profile",
    )
    calls = (("0.95, batch 1", ""), ("0.5, batch 2", ", guided"), ("0.05, batch 1", ""))
    prior = [f"prior: noise_pred (t {t}, {size.format(guided)})" for size in latents for t, guided in calls]
    assert at == [
        *prior,
        "vqgan: images (batch 1, height 18, width 18, 72x72 least of its profile)",
        "vqgan: images (batch 1, height 20, width 18, 72x80 likeliest of its profile)",
        "vqgan: images (batch 1, height 16, width 16, 64x64 outside its profile)",
    ]


def test_what_takes_long_is_left_out_and_said_so(bundle: Bundle, tiny: Path) -> None:
    bundle = with_plans(bundle, Stage.PRIOR, "step", ("64x64", "64x64", "1024x1024"))
    code, report, said = verified(bundle, tiny, "--stage", "prior")
    assert code == 0
    assert "left out: 1024x1024, for which there are plans as well; --sizes all" in said
    assert not any("1024" in name for name in names(report))
    code, report, said = verified(bundle, tiny, "--stage", "prior", "--sizes", "all")
    assert code == 0
    assert "left out" not in said
    assert any("height 24, width 24, tokens 77, images 1, 1024x1024 largest" in name for name in names(report))


# The prior in two parts


def weight_of_another(graph: onnx.GraphProto, node: str, other: str) -> None:
    (found,) = (each for each in graph.node if each.name == node)
    assert found.input[1] != other
    found.input[1] = other


def tanh_gelu(graph: onnx.GraphProto, node: str) -> None:
    (found,) = (each for each in graph.node if each.name == node)
    found.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


@pytest.mark.parametrize(
    ("which", "plant", "places"),
    [
        ("step", weight_of_another, ("up_blocks.0.0.channelwise.4", "down_blocks.0.0.channelwise.4.weight")),
        ("step", tanh_gelu, ("up_blocks.1.0.channelwise.1",)),
        ("conditioning", weight_of_another, ("up_blocks.0.1.mapper", "down_blocks.0.1.mapper.weight")),
    ],
)
def test_a_fault_in_one_part_is_noticed(
    bundle: Bundle, tiny: Path, which: str, plant: Callable[..., None], places: tuple[str, ...]
) -> None:
    """The whole is healthy, and says so; what images are drawn with is not."""
    path = bundle.root / bundle.entry(Stage.PRIOR).graphs[which].path
    model = onnx.load(path, load_external_data=False)
    plant(model.graph, *places)
    onnx.save(model, path)
    accept_changes(bundle.root)
    code, report, _ = verified(bundle, tiny, "--stage", "prior")
    verdicts = {c["name"]: c["passed"] for c in report["comparisons"]}
    assert code == 1
    assert len(verdicts) == 6
    assert verdicts == {name: "in two parts" not in name for name in verdicts}


def test_an_engine_of_plans_is_compared_inside_them(bundle: Bundle, tiny: Path, gpu: None) -> None:
    """The prior by its two parts, all there is of it; the image at the nearest size that plans take."""
    for stage, graphs in DRAWING.items():
        for graph in graphs:
            bundle = with_plans(bundle, stage, graph, LARGE)
    code, report, said = verified(bundle, tiny, "--engine", "tensorrt-rtx")
    assert code == 0, (report, said)
    found = names(report)
    prior = [name for name in found if name.startswith(("prior: ", "teacher-forced: prior "))]
    assert prior
    assert all("in two parts" in name for name in prior)
    for size in ("272x264 least", "280x288 between", "280x264 likeliest", "320x320 largest"):
        assert sum(size in name for name in found) == 7  # prior and decoder at three timesteps, the vqgan
    assert not any("outside" in name for name in found)
    assert "teacher-forced: prior pass 4, noise_pred in two parts" in found
    assert "trajectory: image" in found
    assert report["image_psnr_db"] is not None or report["images_equal"]
    assert "prior in two parts (t 0.95, batch 1, height 6, width 6, tokens 77, images 1)" in report["left_out"]
    assert len(report["left_out"]) == 3 + 3 + 2


def test_plans_for_one_size_get_no_image(bundle: Bundle, tiny: Path, gpu: None) -> None:
    """They take 20 steps alone, and the decoder's no guidance; what is not compared is named."""
    for stage, graphs in DRAWING.items():
        for graph in graphs:
            bundle = with_plans(bundle, stage, graph, ("264x272x1",) * 3)
    code, report, said = verified(bundle, tiny, "--engine", "tensorrt-rtx")
    assert code == 0, (report, said)
    assert sorted(name.partition(":")[0] for name in names(report) if "least" in name) == [
        *("decoder", "decoder", "prior", "vqgan")
    ]
    (no_image,) = (what for what in report["left_out"] if what.startswith("the image: "))
    assert "timestep_ratios [4] (it takes [20] to [20])" in no_image
    assert "trajectory: image" not in names(report)
    assert report["image_psnr_db"] is None


def test_without_any_plan_for_what_is_asked(bundle: Bundle, tiny: Path, gpu: None) -> None:
    bundle = with_plans(bundle, Stage.PRIOR, "conditioning", LARGE)
    code, _, said = verified(bundle, tiny, "--engine", "tensorrt-rtx", "--stage", "prior")
    assert code == 1
    assert "prior: the bundle has no tensorrt-rtx plan" in said

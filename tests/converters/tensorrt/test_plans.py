"""Real plans by TensorRT-RTX, of every stage, for the GPUs and precisions they are made for."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from cascadekit import export
from cascadekit.bench.standins import write_stand_in
from cascadekit.cli import main
from cascadekit.converters.tensorrt import BuildOptions, build
from cascadekit.runtime.engines.tensorrt.plan_header import read_header
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.profiles import DEFAULT, Bounds, parse_image_size
from cascadekit.schemas.stages import (
    PROJ_BLOCKS_ENDS,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
)
from cascadekit.storage.bundle import open_bundle
from helpers.efficientnets import narrow_controlnet

STATIC = Bounds(*[parse_image_size("768x512")] * 3)
GRAPHS = {
    Stage.TEXT_ENCODER: ["model"],
    Stage.PRIOR: ["conditioning", "step"],
    Stage.DECODER: ["model"],
    Stage.VQGAN: ["model"],
}
EFFNET = EffnetEncoderConfig()
INPAINTING = ControlNetConfig(4, PROJ_BLOCKS_ENDS, None, 64)
OTHERS = [
    ImageEncoderConfig(128, 256, 2, 2, 64, image_size=28),
    EFFNET,
    PreviewerConfig(c_hidden=16),
    narrow_controlnet(1),
    INPAINTING,
    ControlNetConfig(16, PROJ_BLOCKS_ENDS, "large", 64),
    ControlNetConfig(512, PROJ_BLOCKS_ENDS, "simple", 64),
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("precision", "targets", "bounds"),
    [
        ("bf16", "sm89", STATIC),
        pytest.param("fp16", "sm75", DEFAULT, marks=pytest.mark.slow),
        pytest.param("bf16", "sm120", DEFAULT, marks=pytest.mark.slow),
        pytest.param("fp16", "sm75", STATIC, marks=pytest.mark.slow),
        pytest.param("bf16", "sm80 sm86 sm89", DEFAULT, marks=pytest.mark.slow),
        pytest.param("bf16", "sm120", STATIC, marks=pytest.mark.slow),
        pytest.param("bf16", "sm80 sm86 sm89", STATIC, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "dynamic" if value is DEFAULT else "static",
)
def test_the_cascade(
    exported: Callable[[str], Path], tmp_path: Path, precision: str, targets: str, bounds: Bounds
) -> None:
    bundle = shutil.copytree(exported(precision), tmp_path / "bundle")
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*.onnx")}
    built = build(bundle, BuildOptions(targets=tuple(targets.split()), profiles=(bounds,)))
    found = {stage: [b.plan.graph for b in built if b.stage is stage] for stage in GRAPHS}
    assert found == GRAPHS
    manifest = open_bundle(bundle).manifest
    for stage, entry in manifest.stages.items():
        assert [plan.graph for plan in entry.plans] == GRAPHS[stage]
        for plan in entry.plans:
            content = (bundle / plan.path).read_bytes()
            assert content[:4] == b"vtrt"
            assert (plan.bytes, plan.sha256) == (len(content), hashlib.sha256(content).hexdigest())
            header = read_header(bundle / plan.path)
            assert header is not None
            assert (header.bytes, header.version) == (len(content), plan.backend_version)
            assert header.targets == plan.targets == tuple(targets.split())
            assert plan.precision == precision
            assert entry.is_current(plan)
            graph = onnx.load(bundle / entry.graphs[plan.graph].path, load_external_data=False).graph
            names = [value.name for value in graph.input]
            assert list(plan.profiles[0].ports) == names
            for name in names:  # TensorRT keeps names of inputs as they are
                assert name.encode() in content
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*.onnx")} == before
    assert not list(bundle.rglob(".*"))


# Every network once, and every GPU more than once; the marker `slow` has the other pairs. It also has two networks with
# the backbone of the ControlNet for Canny; tests of converters/onnx build the effnet encoder.
GPUS = [("fp16", "sm75", STATIC), ("bf16", "sm80 sm86 sm89", DEFAULT), ("bf16", "sm120", DEFAULT)]
PAIRS = [
    pytest.param(
        config,
        *gpu,
        id=f"{config.stage}-{gpu[0]}-{gpu[1].replace(' ', '-')}",
        marks=() if (number - place) % len(GPUS) == 0 and config not in (EFFNET, INPAINTING) else pytest.mark.slow,
    )
    for number, config in enumerate(OTHERS)
    for place, gpu in enumerate(GPUS)
]


@pytest.mark.parametrize(("config", "precision", "targets", "bounds"), PAIRS)
def test_the_other_stages(
    exported_network: Callable[..., Path], config: NetworkConfig, precision: str, targets: str, bounds: Bounds
) -> None:
    """Batch norms are islands in fp32: folded, they would leave float weights in a half graph."""
    bundle = exported_network(config, Precision(precision))
    wanted = tuple(targets.split())
    (built,) = build(bundle, BuildOptions(targets=wanted, profiles=(bounds,)))
    assert (bundle / built.plan.path).stat().st_size == built.plan.bytes
    assert open_bundle(bundle).entry(config.stage).plans == (built.plan,)
    assert built.plan.targets == wanted
    assert built.plan.precision == precision


def test_weights_that_are_links(original: Path, tmp_path: Path) -> None:
    """To the model's own files, which is how an export without a new dtype leaves them."""
    export(original, tmp_path / "bundle", stages=[Stage.VQGAN], weights="link", target=Target.TENSORRT)
    weights = tmp_path / "bundle/vqgan/stage_a.safetensors"
    assert weights.samefile(original / "stage_a.safetensors")
    (built,) = build(tmp_path / "bundle", BuildOptions(targets=("sm89",), profiles=(STATIC,)))
    assert built.plan.sources[1].path == "vqgan/stage_a.safetensors"
    assert built.plan.sources[1].sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_fp32_and_its_size(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights of fp32 take twice the room of bf16's, as the header says."""
    sizes = {}
    for precision in ("fp32", "bf16"):
        bundle = shutil.copytree(exported(precision), tmp_path / precision)
        (built,) = build(bundle, BuildOptions(targets=("sm89",), stages=(Stage.TEXT_ENCODER,)))
        header = read_header(bundle / built.plan.path)
        assert header is not None
        sizes[precision] = header.weight_bytes
    assert sizes["fp32"] == pytest.approx(2 * sizes["bf16"], rel=0.01)


@pytest.mark.parametrize(("kind", "target"), [("int8", "sm75"), ("int4", "sm80"), ("fp8", "sm89")])
def test_quantised_weights(tmp_path: Path, kind: str, target: str) -> None:
    """Each for the oldest GPU that has it; of a network as wide as a block of int8."""
    config = TextEncoderConfig(128, 256, 2, 2, 64, vocab_size=99, eos_token_id=98)
    model = write_stand_in(tmp_path / "source", config, "BF16").parent
    arguments = f"export {model} -o {tmp_path / 'bundle'} --precision fp16 --target tensorrt --quantize {kind}"
    result = call(*arguments.split())
    assert result.exit_code == 0, result.output
    graph = onnx.load(tmp_path / "bundle/text_encoder/model.onnx", load_external_data=False).graph
    assert "DequantizeLinear" in {node.op_type for node in graph.node}
    (built,) = build(tmp_path / "bundle", BuildOptions(targets=(target,)))
    assert built.plan.targets == (target,)


def test_several_profiles_and_every_graph(bundle: Path) -> None:
    """A plan of its own for Turing is not made from bf16; here one plan serves two profiles, in order."""
    narrow = Bounds(*map(parse_image_size, ("256x256", "256x256", "512x512x2")))
    wishes = BuildOptions(targets=("sm89",), stages=(Stage.VQGAN,), graphs=("model",))
    (one,) = (built.plan for built in build(bundle, wishes))
    both = BuildOptions(**vars(wishes) | {"profiles": (DEFAULT, narrow), "graphs": ("model", "encoder")})
    two = {b.plan.graph: b.plan for b in build(bundle, both)}
    for graph in ("model", "encoder"):
        assert [profile.max.height for profile in two[graph].profiles] == [1536, 512]
    assert two["model"].bytes > 1.2 * one.bytes  # kernels of both
    assert len(open_bundle(bundle).manifest.stages[Stage.VQGAN].plans) == 3


def test_turing_gets_a_plan_of_its_own(exported: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(exported("fp16"), tmp_path / "bundle")
    result = call("build", bundle, "--arch", "2080 ti,rtx 4090", "--arch", "sm80", "--stage", "vqgan", "--json")
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)
    assert [plan["targets"] for plan in plans] == [["sm75"], ["sm80", "sm89"]]
    assert all(plan["how"] == "built" and plan["seconds"] > 0 and plan["peak_rss"] > 1e8 for plan in plans)


def test_from_original_files_in_one_command(original: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    result = call("build", original, "-o", bundle, "--arch", "sm89", "--static", "256x256", "--stage", "vqgan")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "vqgan model sm89 bf16" in words
    assert "vqgan/model for sm89: 0 s of about 1" in result.stderr
    entry = open_bundle(bundle).entry(Stage.VQGAN)
    assert (entry.precision, entry.target) == ("bf16", "tensorrt")


def test_inspect_and_validate(bundle: Path) -> None:
    stage = ("--stage", "vqgan")
    assert call("build", bundle, "--arch", "sm86,sm89", *stage, "--opt", "1344x768").exit_code == 0
    (plan,) = open_bundle(bundle).entry(Stage.VQGAN).plans
    result = call("inspect", bundle)
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "vqgan model sm86 sm89 bf16 512x512x1, 1344x768x1, 1536x1536x2 tensorrt-rtx" in words
    assert f"{plan.path} ok" in words
    assert call("validate", bundle).exit_code == 0

    content = bytearray((bundle / plan.path).read_bytes())
    content[40_000] ^= 1
    (bundle / plan.path).write_bytes(content)
    result = call("validate", bundle)
    assert result.exit_code == 1
    assert (
        f"{plan.path}: its SHA-256 is not that of the manifest; build it again with `cascadekit build`" in result.stdout
    )

    (bundle / plan.path).write_bytes(content[:32] + bytes([4]) + content[33:])  # for sm86 alone
    result = call("inspect", bundle, "--json")
    assert result.exit_code == 1
    state = json.loads(result.stdout)["stages"]["vqgan"]["plans"][0]["state"]
    assert state == "its header says targets sm86, expected sm86 sm89; build it again"

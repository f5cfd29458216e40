"""Planted faults are found at their block, and healthy bundles have none."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.inside.bisect import bisect
from cascadekit.parity.inside.module_map import block_of
from cascadekit.parity.reference.loading import reference_engine
from cascadekit.parity.sample_inputs import hardest_input, make_inputs
from cascadekit.runtime.engines.int8_saturation import int8_saturates
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers import faults
from helpers.faults import planted

TEXT, LAYERS = "text_encoder", "text_model.encoder.layers"

# stage, fault, place, block that is to be named
FAULTS = [
    ("prior", "one_weight", "down_blocks.0.0.channelwise.0.weight", "down_blocks.0.0"),
    ("prior", "one_weight", "up_blocks.1.2.kv_mapper.1.weight", "up_blocks.1.2"),
    ("prior", "one_weight", "clip_img_mapper.weight", "clip_img_mapper"),
    ("decoder", "one_weight", "down_blocks.2.1.mapper.weight", "down_blocks.2.1"),
    ("decoder", "one_weight", "up_blocks.2.1.mapper_sca.bias", "up_blocks.2.1"),
    ("decoder", "one_weight", "up_repeat_mappers.1.0.weight", "up_repeat_mappers.1"),
    ("vqgan", "one_weight", "up_blocks.3.weight", "up_blocks.3"),
    ("vqgan", "one_weight", "out_block.0.bias", "out_block.0"),
    (TEXT, "one_weight", "text_model.embeddings.position_embedding.weight", "text_model.embeddings"),
    (TEXT, "one_weight", f"{LAYERS}.1.mlp.fc2.weight", f"{LAYERS}.1"),
    (TEXT, "one_weight", "text_projection.weight", "text_projection"),
    ("prior", "transposed", "down_blocks.1.2.attention.to_q.weight", "down_blocks.1.2"),
    ("prior", "transposed", "clip_txt_mapper.weight", "clip_txt_mapper"),
    ("decoder", "transposed", "up_upscalers.0.1.weight", "up_upscalers.0"),
    ("decoder", "transposed", "effnet_mapper.2.weight", "effnet_mapper.2"),
    ("vqgan", "transposed", "up_blocks.2.channelwise.0.weight", "up_blocks.2"),
    (TEXT, "transposed", f"{LAYERS}.0.self_attn.out_proj.weight", f"{LAYERS}.0"),
    ("prior", "half_island", "up_blocks.0.2.attention/weights", "up_blocks.0.2"),
    ("prior", "half_island", "down_blocks.1.0.channelwise.2/norm", "down_blocks.1.0"),
    ("decoder", "half_island", "down_blocks.3.0.norm", "down_blocks.3.0"),
    ("vqgan", "half_island", "up_blocks.4.norm1", "up_blocks.4"),
    (TEXT, "half_island", f"{LAYERS}.1.layer_norm2", f"{LAYERS}.1"),
    ("prior", "epsilon", "embedding.2", "embedding.2"),
    ("decoder", "epsilon", "effnet_mapper.3", "effnet_mapper.3"),
    ("decoder", "epsilon", "up_blocks.1.0.norm@1", "up_blocks.1.0"),
    ("vqgan", "epsilon", "up_blocks.1.norm2", "up_blocks.1"),
    (TEXT, "epsilon", f"{LAYERS}.0.layer_norm1", f"{LAYERS}.0"),
    ("prior", "no_bias", "up_blocks.1.0.depthwise", "up_blocks.1.0"),
    ("prior", "no_bias", "clf.1", "clf.1"),
    ("decoder", "no_bias", "up_blocks.3.0.channelwise.4@1", "up_blocks.3.0"),
    ("vqgan", "no_bias", "up_blocks.2.depthwise.1", "up_blocks.2"),
    (TEXT, "no_bias", f"{LAYERS}.0.mlp.fc1", f"{LAYERS}.0"),
    ("prior", "swapped", "up_blocks.0.2.attention.to_q.weight up_blocks.0.2.attention.to_k.weight", "up_blocks.0.2"),
    ("prior", "swapped", "down_blocks.0.0.channelwise.2.gamma down_blocks.0.0.channelwise.2.beta", "down_blocks.0.0"),
    ("decoder", "swapped", "up_blocks.1.0.channelwise.2.gamma up_blocks.1.0.channelwise.2.beta", "up_blocks.1.0"),
    (TEXT, "swapped", f"{LAYERS}.1.self_attn.q_proj.weight {LAYERS}.1.self_attn.k_proj.weight", f"{LAYERS}.1"),
    ("prior", "tanh_gelu", "up_blocks.1.0.channelwise.1", "up_blocks.1.0"),
    ("decoder", "tanh_gelu", "pixels_mapper.1", "pixels_mapper.1"),
    ("vqgan", "tanh_gelu", "up_blocks.4.channelwise.1", "up_blocks.4"),
    (TEXT, "tanh_gelu", f"{LAYERS}.0.mlp.activation_fn", f"{LAYERS}.0"),
    ("decoder", "attribute", "effnet/resized coordinate_transformation_mode=half_pixel", "effnet_mapper.0"),
    ("decoder", "attribute", "up_blocks.2.0/resized mode=nearest", "up_blocks.2.0"),
    ("vqgan", "attribute", "up_blocks.1.depthwise.0 mode=reflect", "up_blocks.1"),
]


class Remembering:
    """A loaded reference that computes nothing twice: faults are in bundles, not in it."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self._kept: dict[Any, dict[str, Any]] = {}

    def watch(
        self, inputs: Any, wanted: Any, given: Mapping[str, Any] | None = None, compute: str | None = None
    ) -> dict[str, Any]:
        key = (frozenset(wanted), frozenset(given or {}), compute)
        if key not in self._kept:
            self._kept[key] = self._stage.watch(inputs, wanted, given or {}, compute)
        return self._kept[key]

    def shapes(self, inputs: Any) -> dict[str, Any]:
        if "shapes" not in self._kept:
            self._kept["shapes"] = self._stage.shapes(inputs)
        return self._kept["shapes"]


@pytest.fixture(scope="module")
def references(tiny: Path) -> dict[Stage, Remembering]:
    model = open_model([tiny / "model"])
    engine = reference_engine(model, list(model.components))
    return {stage: Remembering(engine.load(stage)) for stage in model.components}


def inputs_of(bundle: Path, stage: Stage) -> Any:
    return hardest_input(make_inputs(stage, open_bundle(bundle).entry(stage), ClipTokenizer.open(None))).inputs


# Each fault once in each stage; the marker `slow` has further places.
PLACES = [
    pytest.param(*fault, marks=[pytest.mark.slow] * (fault[:2] in [earlier[:2] for earlier in FAULTS[:number]]))
    for number, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize(("stage", "fault", "place", "block"), PLACES)
def test_a_planted_fault_is_found_at_its_block(
    tiny: Path, tmp_path: Path, references: dict[Stage, Remembering], stage: str, fault: str, place: str, block: str
) -> None:
    bundle = planted(tiny / "bundle", stage, tmp_path / "bundle", getattr(faults, fault), place)
    found = bisect(open_bundle(bundle), Stage(stage), references[Stage(stage)], inputs_of(bundle, Stage(stage)))
    assert found.first is not None
    assert block_of(found.first.name)[0] == block, found.described()
    assert {point.block for point in found.faulty} == {block}, found.described()


@pytest.mark.parametrize(
    ("stage", "module", "block"),
    [
        ("prior", "down_blocks.0.0.channelwise.0", "down_blocks.0.0"),
        ("decoder", "down_blocks.2.2.attention.to_v", "down_blocks.2.2"),
        (TEXT, f"{LAYERS}.1.mlp.fc2", f"{LAYERS}.1"),
    ],
)
def test_a_fault_beyond_what_quantising_loses(
    tiny: Path, tmp_path: Path, references: dict[Stage, Remembering], stage: str, module: str, block: str
) -> None:
    """In 4 bits, whose healthy channels are off by a tenth."""
    healthy = VARIANTS["int4"](tiny)
    bundle = planted(healthy, stage, tmp_path / "bundle", faults.one_scale, module)
    found = bisect(open_bundle(bundle), Stage(stage), references[Stage(stage)], inputs_of(bundle, Stage(stage)))
    assert {point.block for point in found.faulty} == {block}, found.described()


VARIANTS = {
    "fp32": lambda root: root / "bundle",
    "fp16-safe": lambda root: _exported(root, precision=Precision.FP16, fp16_safe=3),
    "bf16": lambda root: _exported(root, precision=Precision.BF16),
    "int8": lambda root: _exported(root, quantize=Quantization.INT8),
    "int8-dynamic": lambda root: _exported(root, quantize=Quantization.INT8_DYNAMIC),
    "int4": lambda root: _exported(root, quantize=Quantization.INT4),
    "fp8": lambda root: _exported(root, quantize=Quantization.FP8),
}


def _exported(root: Path, **options: Any) -> Path:
    target = root / f"bundle-{abs(hash(repr(options)))}"
    if not target.exists():
        export(root / "model", target, weights="copy", **options)
    return target


@pytest.mark.parametrize("variant", VARIANTS)
def test_healthy_bundles_have_no_fault(tiny: Path, references: dict[Stage, Remembering], variant: str) -> None:
    if variant == "int8-dynamic" and int8_saturates():
        pytest.skip("no VNNI: ONNX Runtime's 8-bit products saturate on this CPU")
    bundle = open_bundle(VARIANTS[variant](tiny))
    for stage in bundle.manifest.stages:
        found = bisect(bundle, stage, references[stage], inputs_of(tiny / "bundle", stage))
        assert found, found.described()
        assert found.note.startswith("the graph computes in bf16") == (variant == "bf16")
        assert len(found.parts) > 20
        assert {part.name for part in found.depth} >= {p.name for p in bundle.entry(stage).outputs} - {"pooled"}
        final = found.parts[-1].accumulated
        assert final is not None
        assert final < {"fp32": 1e-6, "fp16-safe": 3e-3, "bf16": 3e-2}.get(variant, 0.2)
        if variant == "bf16":
            assert final > 1e-3  # rounded indeed


def test_slices_bound_memory_and_change_nothing(tiny: Path, references: dict[Stage, Remembering]) -> None:
    bundle, stage = open_bundle(tiny / "bundle"), Stage.DECODER
    inputs = inputs_of(tiny / "bundle", stage)
    whole = bisect(bundle, stage, references[stage], inputs)
    held: list[int] = []

    class Counting(Remembering):
        def watch(self, inputs: Any, wanted: Any, given: Any = None, compute: str | None = None) -> dict[str, Any]:
            found = super().watch(inputs, wanted, given, compute)
            held.append(sum(value.nbytes for value in found.values()))
            return found

    most = 1 << 20
    sliced = bisect(bundle, stage, Counting(references[stage]), inputs, slice_bytes=most)
    assert whole.slices == 1
    assert sliced.slices > 5
    assert max(held) <= most
    assert [point.name for point in sliced.parts] == [point.name for point in whole.parts]
    for one, other in zip(sliced.parts, whole.parts, strict=True):
        assert one.worst_channel == pytest.approx(other.worst_channel, abs=2e-7)


def test_an_overflow_is_told_with_the_ranges(tiny: Path, tmp_path: Path, references: dict[Stage, Remembering]) -> None:
    """A stream beyond 65504 in an fp16 bundle that was not made safe."""

    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    weights = next((model / "prior").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["down_blocks.0.0.channelwise.4.weight"] *= 30_000
    save_file(tensors, weights)
    export(model, tmp_path / "fp16", stages=[Stage.PRIOR], precision=Precision.FP16, fp16_safe="off")
    bundle = open_bundle(tmp_path / "fp16")
    reference = reference_engine(open_model([model]), [Stage.PRIOR]).load(Stage.PRIOR)
    found = bisect(bundle, Stage.PRIOR, reference, inputs_of(tiny / "bundle", Stage.PRIOR))
    assert found.first is not None
    assert found.first.label == "down_blocks.0.0 channelwise.4"
    assert found.first.nonfinite > 0
    assert found.first.max_abs > 65504
    line = found.described()[0]
    assert "max |down_blocks.0.0.channelwise.4|" in line
    assert "> 65 504 (fp16)" in line


def test_what_all_faulty_parts_share_is_suspected(
    tiny: Path, tmp_path: Path, references: dict[Stage, Remembering]
) -> None:
    """The timestep's angles in half precision: every timestep block is wrong, and the graph's angle is why."""
    bundle = planted(tiny / "bundle", "prior", tmp_path / "b", faults.half_island, "timestep_embedding/angle")
    found = bisect(open_bundle(bundle), Stage.PRIOR, references[Stage.PRIOR], inputs_of(bundle, Stage.PRIOR))
    assert {point.block for point in found.faulty} == {f"{way}_blocks.{n}.1" for way in ("down", "up") for n in (0, 1)}
    assert set(found.suspects) >= {"timestep_embedding/angle", "timestep_embedding/angle/narrowed"}
    assert all(name.startswith("timestep_embedding") for name in found.suspects)


def test_the_command_names_the_fault(tiny: Path, tmp_path: Path) -> None:
    bundle = planted(tiny / "bundle", "prior", tmp_path / "b", faults.no_bias, "up_blocks.1.0.channelwise.4")
    result = CliRunner().invoke(main, ["verify", str(bundle), "--against", str(tiny / "model"), "--bisect"])
    assert result.exit_code == 1
    assert "prior: up_blocks.1.0 channelwise.4: relative L2" in result.stdout
    assert "largest inputs: up_blocks.1.0.channelwise.2" in result.stdout
    assert "look at the nodes up_blocks.1.0.channelwise.2/rows, up_blocks.1.0.channelwise.4\n" in result.stdout
    result = CliRunner().invoke(
        main, ["verify", str(tiny / "bundle"), "--against", str(tiny / "model"), "--bisect", "--json"]
    )
    assert result.exit_code == 0
    stages = json.loads(result.stdout)["bisection"]
    assert [stage["first"] for stage in stages] == [None] * 4
    assert all(point["accumulated"] is None or point["accumulated"] < 1e-6 for s in stages for point in s["points"])

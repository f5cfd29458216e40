"""Planted faults are found at their block, and healthy bundles have none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import faults
from cascadekit.converters.model import open_model
from cascadekit.converters.reference import reference_engine
from cascadekit.runtime.bundle import open_bundle
from cascadekit.runtime.parity.bisect import bisect
from cascadekit.runtime.parity.cases import cases_of, odd_case
from cascadekit.runtime.parity.points import block_of
from cascadekit.runtime.tokenizer import ClipTokenizer
from cascadekit.schemas.stages import Stage
from faults import planted

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
    return odd_case(cases_of(stage, open_bundle(bundle).entry(stage), ClipTokenizer.open(None))).inputs


@pytest.mark.parametrize(("stage", "fault", "place", "block"), FAULTS)
def test_a_planted_fault_is_found_at_its_block(
    tiny: Path, tmp_path: Path, references: dict[Stage, Remembering], stage: str, fault: str, place: str, block: str
) -> None:
    bundle = planted(tiny / "bundle", stage, tmp_path / "bundle", getattr(faults, fault), place)
    found = bisect(open_bundle(bundle), Stage(stage), references[Stage(stage)], inputs_of(bundle, Stage(stage)))
    assert found.first is not None
    assert block_of(found.first.name)[0] == block, found.described()
    assert {point.block for point in found.faulty} == {block}, found.described()

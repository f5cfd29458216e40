"""Every node of every graph has a kernel in ONNX Runtime's CUDA provider, in all three types."""

import pytest
from onnx import TensorProto, helper

from cascadekit.converters.onnx import GraphOptions, write_graphs
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import (
    PRESETS,
    PROJ_BLOCKS_ALL,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    Variant,
)
from helpers.cuda_kernels import without_kernel
from helpers.graphs import places_of
from helpers.unets import ODD_DECODER, ODD_PRIOR

TEXT = TextEncoderConfig(64, 96, 2, 2, 24, vocab_size=50, eos_token_id=49)
CONFIGS: dict[str, NetworkConfig] = {
    "prior": PRESETS[Stage.PRIOR, Variant.TINY],
    "odd prior": ODD_PRIOR,
    "decoder": PRESETS[Stage.DECODER, Variant.TINY],
    "odd decoder": ODD_DECODER,
    "vqgan": PRESETS[Stage.VQGAN, Variant.TINY],
    "text encoder": TEXT,
    "text encoder, legacy end": TextEncoderConfig(64, 96, 2, 2, 24, vocab_size=50, eos_token_id=2),
    "image encoder": ImageEncoderConfig(32, 64, 2, 2, 24, "quick_gelu", image_size=28),
    "effnet encoder": EffnetEncoderConfig(),
    "previewer": PreviewerConfig(c_hidden=16),
    "inpainting": ControlNetConfig(4, (63, 2), c_proj=24),
    "super resolution": PRESETS[Stage.CONTROLNET_SUPER_RESOLUTION, Variant.FULL],
    "identity": ControlNetConfig(512, PROJ_BLOCKS_ALL, "simple", c_proj=24),
}


@pytest.mark.parametrize(
    ("target", "precision"), [*((Target.ORT, precision) for precision in Precision), (Target.PORTABLE, Precision.BF16)]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_node_has_a_kernel(config: NetworkConfig, target: Target, precision: Precision) -> None:
    options = GraphOptions(precision=precision, target=target)
    for name, model in write_graphs(config, places_of(config), options).items():
        assert not list(without_kernel(model)), name


def test_what_has_no_kernel_is_found() -> None:
    """A convolution in bf16 has one from opset 22. Pad has none, nor has what is not in the table."""
    value = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, (1, 2, 3, 3))
    weight = helper.make_tensor_value_info("w", TensorProto.BFLOAT16, (2, 2, 1, 1))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
        helper.make_node("BiasGelu", ["a", "w"], ["b"], "gelu", domain="com.microsoft"),
        helper.make_node("Pad", ["b", "pads"], ["c"], "pad"),
        helper.make_node("Tan", ["c"], ["d"], "tan"),
    ]
    pads = helper.make_tensor("pads", TensorProto.INT64, (8,), [0] * 8)
    out = helper.make_tensor_value_info("d", TensorProto.BFLOAT16, None)
    graph = helper.make_graph(nodes, "g", [value, weight], [out], [pads])
    found = {}
    for opset in (21, 22):
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        found[opset] = list(without_kernel(helper.make_model(graph, opset_imports=imports)))
    assert found[22] == ["Pad BFLOAT16 (pad)", "Tan BFLOAT16 (tan)"]
    assert found[21] == ["Conv BFLOAT16 (conv)", *found[22]]

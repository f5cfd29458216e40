"""All graphs have in common: ports, names, weights by reference, and that nothing is overlooked."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cascadekit.converters.onnx import write_graph
from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.stages import (
    PRESETS,
    ControlNetConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    UNetConfig,
    Variant,
)
from cascadekit.schemas.tensors import expected_tensors, is_counter
from cascadekit.storage.safetensors_reader import TensorRange
from helpers.efficientnets import narrow_controlnet, narrow_effnet
from helpers.graphs import open_session, run

TOLERANCE = 1e-5
TINY: dict[Stage, NetworkConfig] = {
    **{stage: config for (stage, variant), config in PRESETS.items() if variant is Variant.TINY},
    Stage.IMAGE_ENCODER: ImageEncoderConfig(8, 32, 2, 2, 12, image_size=15, patch_size=4),
    Stage.PREVIEWER: PreviewerConfig(c_in=6, c_hidden=32),  # whose random images are neither black nor white
}
STAGES = tuple(TINY)
# Only some of the tests below have these; test_effnet_encoder.py and test_controlnet.py have more, at released sizes.
OTHERS: dict[Stage, NetworkConfig] = {
    Stage.EFFNET_ENCODER: narrow_effnet(),
    Stage.CONTROLNET_CANNY: narrow_controlnet(1, (0, 63), c_proj=8),
    Stage.CONTROLNET_INPAINTING: narrow_controlnet(4, (5,), c_proj=8),
    Stage.CONTROLNET_IDENTITY: ControlNetConfig(512, (0, 4), "simple", c_proj=8),
}
CONFIGS = TINY | OTHERS
# Not computed with: the encoder half and codebook of the VQGAN, what multiplies the black pixels of the decoder.
UNUSED = ("in_block.", "down_blocks.", "vquantizer.")
# Modules without a node of their name: a bias is all that is read of them, or they are added and no more.
PARTS = {
    "pixels_mapper.0",
    "text_model.embeddings.position_embedding",
    "vision_model.embeddings.position_embedding",
}
SIZES = {
    Stage.PRIOR: {"batch": 2, "height": 3, "width": 5, "tokens": 4, "images": 2},
    Stage.DECODER: {"batch": 1, "height": 34, "width": 36, "effnet_height": 2, "effnet_width": 3},
    Stage.VQGAN: {"batch": 3, "height": 2, "width": 5},
    Stage.TEXT_ENCODER: {"batch": 2},
    Stage.IMAGE_ENCODER: {"batch": 2},
    Stage.PREVIEWER: {"batch": 2, "height": 3, "width": 5},
    Stage.EFFNET_ENCODER: {"batch": 2, "height": 33, "width": 20},
    Stage.CONTROLNET_CANNY: {"batch": 2, "height": 35, "width": 34},
    Stage.CONTROLNET_INPAINTING: {"batch": 1, "height": 3, "width": 36},
    Stage.CONTROLNET_IDENTITY: {"batch": 2, "height": 3, "width": 5},
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Stage:
    chosen: Stage = request.param
    return chosen


@pytest.fixture(params=CONFIGS)
def any_stage(request: pytest.FixtureRequest) -> Stage:
    chosen: Stage = request.param
    return chosen


def inputs_of(graph: Any) -> dict[str, np.ndarray]:
    stage = graph.config.stage
    if stage is not Stage.TEXT_ENCODER:
        values: dict[str, np.ndarray] = graph.inputs(**SIZES[stage])
        return values
    ids = np.random.default_rng(0).integers(0, graph.config.vocab_size, (2, 77))
    ids[:, -5:] = graph.config.eos_token_id
    return {"input_ids": ids, "attention_mask": (np.arange(77)[None] < [[60], [77]]).astype(np.int64)}


def needed(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    unused = {Stage.VQGAN: UNUSED, Stage.DECODER: ("pixels_mapper.0.weight",)}.get(config.stage, ())
    return {
        name: shape
        for name, shape in expected_tensors(config).items()
        if not name.startswith(unused) and not is_counter(name)
    }


def weights_for(config: NetworkConfig, dtype: str = "F32") -> dict[str, TensorRange]:
    """Entries as of a file that is not there."""
    offset, weights = 0, {}
    for name, shape in expected_tensors(config).items():
        length = math.prod(shape) * (4 if dtype == "F32" else 2)
        weights[name] = TensorRange(Path("weights.safetensors"), dtype, shape, offset, length)
        offset += length
    return weights


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def test_importing_the_writers_does_not_import_torch() -> None:
    code = "import sys, cascadekit.converters.onnx; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ports_and_header(export: Callable[..., Any], any_stage: Stage) -> None:
    model = load(export(CONFIGS[any_stage]).path)
    ports = ports_of(CONFIGS[any_stage])
    for values, expected in ((model.graph.input, ports.inputs), (model.graph.output, ports.outputs)):
        found = [
            (
                value.name,
                helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        assert found == [(port.name, port.dtype, port.dims) for port in expected]
    assert (model.producer_name, model.graph.name, model.ir_version) == ("cascadekit", any_stage, 10)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert model.doc_string
    assert model.graph.doc_string


def test_checker_accepts_the_file(export: Callable[..., Any], any_stage: Stage) -> None:
    onnx.checker.check_model(export(CONFIGS[any_stage]).path, full_check=True)


def test_shape_inference_arrives_at_the_output_dims(export: Callable[..., Any], any_stage: Stage) -> None:
    graph = export(CONFIGS[any_stage])
    inputs = inputs_of(graph)
    model = load(graph.path)
    for value in model.graph.input:
        value.CopyFrom(
            helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, inputs[value.name].shape)
        )
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shapes = {v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim) for v in inferred.graph.output}
    assert shapes == {name: value.shape for name, value in graph.run(inputs).items()}


def test_names_are_module_paths(export: Callable[..., Any], any_stage: Stage) -> None:
    """Every weight is read by the node named as its module or by a part of it, every value is made by its namesake."""
    graph = load(export(CONFIGS[any_stage]).path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(list(node.output) == [node.name] for node in graph.node if node.op_type != "Split")
    modules = {name.rsplit(".", 1)[0] for name in needed(CONFIGS[any_stage])} - PARTS
    assert modules - set(names) == set()


def test_weights_stay_in_their_file(export: Callable[..., Any], any_stage: Stage) -> None:
    exported = export(CONFIGS[any_stage])
    graph = load(exported.path).graph
    external = {tensor.name: tensor for tensor in graph.initializer if is_external(tensor)}
    assert external.keys() == needed(CONFIGS[any_stage]).keys()
    file = (exported.path.parent / "weights.safetensors").read_bytes()
    for name, tensor in external.items():
        where = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(where["offset"]), int(where["length"])
        assert where["location"] == "weights.safetensors"
        assert file[start : start + length] == exported.tensors[name].numpy().tobytes()
    constants = sum(tensor.ByteSize() for tensor in graph.initializer if not is_external(tensor))
    assert constants < 10_000
    used = {value for node in graph.node for value in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


@pytest.mark.parametrize("remainder", [1, 3, 6])
def test_weights_at_any_byte(
    export: Callable[..., Any], difference: Callable[..., float], stage: Stage, remainder: int
) -> None:
    graph = export(TINY[stage], remainder=remainder)
    inputs = inputs_of(graph)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


def test_one_altered_number_is_noticed(
    export: Callable[..., Any], difference: Callable[..., float], stage: Stage, tmp_path: Path
) -> None:
    """Each weight in turn: so all of them are connected, and the tolerance is no blank cheque.

    The weights become inputs of the graph, so that one session serves all of them."""
    exported = export(TINY[stage])
    inputs = inputs_of(exported)
    expected = exported.expected(inputs)
    model = onnx.load(exported.path)
    external = {tensor.name for tensor in filter(is_external, load(exported.path).graph.initializer)}
    weights = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer if t.name in external}
    for name, values in weights.items():
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape))
    rest = [tensor for tensor in model.graph.initializer if tensor.name not in external]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
    onnx.save(model, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    assert difference(run(session, {**inputs, **weights}), expected) <= TOLERANCE
    unnoticed = []
    for name, values in weights.items():
        if name.endswith(("to_k.bias", "k_proj.bias")):
            continue  # adds the same to all scores of a query, which softmax takes out again
        # The last number, since the first ones of mapper_sca and mapper_crp are multiplied by sin 0.
        place = (-1,) * values.ndim
        if name.endswith("token_embedding.weight"):  # there, of the row of a token that occurs
            place = (int(inputs["input_ids"][0, 0]), -1)
        before = values[place]
        values[place] += 1
        if difference(run(session, {**inputs, **weights}), expected) <= TOLERANCE:
            unnoticed.append(name)
        values[place] = before
    assert unnoticed == []


def test_unusable_weights_are_named_together(stage: Stage) -> None:
    config = TINY[stage]
    weights = weights_for(config)
    missing, reshaped, cast, cut = list(needed(config))[1:12:3]
    del weights[missing]
    weights[reshaped] = replace(weights[reshaped], shape=(7, 7))
    weights[cast] = replace(weights[cast], dtype="F8_E4M3")
    weights[cut] = replace(weights[cut], nbytes=2)
    with pytest.raises(ExportError) as caught:
        write_graph(config, weights)
    text = str(caught.value)
    shapes = {name: list(shape) for name, shape in expected_tensors(config).items()}
    assert f"{stage}: 4 weights" in text
    assert f"{missing}: missing, expected shape {shapes[missing]}" in text
    assert f"{reshaped}: shape [7, 7], expected {shapes[reshaped]}" in text
    assert f"{cast}: stored as F8_E4M3, expected F32, BF16, F16" in text
    assert f"{cut}: 2 bytes, expected {4 * math.prod(shapes[cut])}" in text


def test_without_any_weights_all_are_missing(any_stage: Stage) -> None:
    with pytest.raises(ExportError) as caught:
        write_graph(CONFIGS[any_stage], {})
    assert all(f"\n  {name}: missing" in str(caught.value) for name in needed(CONFIGS[any_stage]))


@pytest.mark.parametrize(
    ("stage", "changes", "reason"),
    [
        (Stage.PRIOR, {"self_attn": False}, "self_attn"),
        (Stage.PRIOR, {"switch_level": (True,)}, "switch_level"),
        (Stage.PRIOR, {"timestep_ratio_embedding_dim": 63}, "timestep_ratio_embedding_dim"),
        (Stage.PRIOR, {"num_attention_heads": (1, 7)}, "num_attention_heads"),
        (Stage.PRIOR, {"clip_image_in_channels": None}, "clip_image_in_channels"),
        (Stage.DECODER, {"kernel_size": 2}, "kernel_size"),
        (Stage.DECODER, {"num_attention_heads": (0, 0, 0, 1)}, "num_attention_heads"),
        (Stage.DECODER, {"pixel_mapper_in_channels": None}, "pixel_mapper_in_channels"),
        (Stage.TEXT_ENCODER, {"hidden_act": "relu"}, "hidden_act"),
        (Stage.TEXT_ENCODER, {"num_attention_heads": 3}, "num_attention_heads"),
        (Stage.IMAGE_ENCODER, {"hidden_act": "relu"}, "hidden_act"),
        (Stage.IMAGE_ENCODER, {"num_attention_heads": 3}, "num_attention_heads"),
    ],
)
def test_configs_without_a_graph(stage: Stage, changes: dict[str, Any], reason: str) -> None:
    config = replace(TINY[stage], **changes)
    with pytest.raises(ExportError, match=f"^{stage}: .*{reason}"):
        write_graph(config, weights_for(config))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("stage", [Stage.PRIOR, Stage.DECODER])
def test_released_sizes(stage: Stage, dtype: str, tmp_path: Path) -> None:
    config = PRESETS[stage, Variant.FULL]
    assert isinstance(config, UNetConfig)
    model = write_graph(config, weights_for(config, dtype))
    onnx.save(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 2_000_000
    external = [tensor.name for tensor in model.graph.initializer if is_external(tensor)]
    assert sorted(external) == sorted(needed(config))
    down = zip(config.down_num_layers_per_block, config.down_blocks_repeat_mappers, strict=True)
    up = zip(config.up_num_layers_per_block, config.up_blocks_repeat_mappers, strict=True)
    triples = sum(layers * passes for layers, passes in (*down, *up))
    assert 40 * triples < len(model.graph.node) < 90 * triples
    casts = [node.input[0] for node in model.graph.node if node.op_type == "Cast"]
    assert {*casts} == ({*external} if dtype == "BF16" else set())
    passes = max(*config.down_blocks_repeat_mappers, *config.up_blocks_repeat_mappers)
    assert max(Counter(casts).values(), default=passes) == passes  # again for each pass

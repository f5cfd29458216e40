"""Plans whose weights are inputs, and plans whose weights are streamed: real ones of TensorRT-RTX."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from cascadekit.converters.lora.bundle import apply_loras, undo_loras
from cascadekit.converters.tensorrt import BuildOptions, Built, build, builder, prune
from cascadekit.converters.tensorrt.plans_to_build import require_targets
from cascadekit.converters.tensorrt.weight_inputs import built_in, weight_inputs
from cascadekit.runtime.engines.tensorrt.plan_header import find_contradiction, read_header
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

SMALL = Bounds(*[parse_image_size("256x256")] * 3)
TEXT = BuildOptions(targets=("sm89",), stages=(Stage.TEXT_ENCODER,), profiles=(SMALL,))
APART = replace(TEXT, weights_as_inputs=True)


def one(bundle: Path, wishes: BuildOptions) -> Built:
    (built,) = build(bundle, wishes)
    assert open_bundle(bundle).entry(built.stage).plans[-1] == built.plan
    return built


def weight_bytes(plan: Path) -> int:
    header = read_header(plan)
    assert header is not None
    return header.weight_bytes


def write_lora(path: Path) -> Path:
    random = np.random.default_rng(0)
    up, down = (random.normal(0, 0.1, size).astype(np.float32) for size in ((32, 2), (2, 8)))
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": np.float32([2])}, path)
    return path


def test_weights_as_inputs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is smaller, says where its weights lie, and stays good with a LoRA in them."""
    whole = one(bundle, TEXT).plan
    plan = one(bundle, APART).plan
    assert plan.path != whole.path
    assert plan.bytes < whole.bytes
    assert weight_bytes(bundle / plan.path) < weight_bytes(bundle / whole.path)
    graph = bundle / "text_encoder/model.onnx"
    model = onnx.load(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {node.input[1] for node in model.graph.node if node.op_type in ("Gemm", "MatMul")}
    assert {weight.name for weight in plan.weight_inputs} == products & tensors.keys()
    for weight in plan.weight_inputs:
        content = (bundle / weight.path).read_bytes()[weight.offset : weight.offset + weight.bytes]
        assert content == tensors[weight.name].raw_data
        assert weight.dtype == "BF16"
        assert weight.shape == tuple(tensors[weight.name].dims)
        assert weight.name.encode() in (bundle / plan.path).read_bytes()

    apply_loras(bundle, [write_lora(tmp_path / "lora.safetensors")])
    entry = open_bundle(bundle).entry(Stage.TEXT_ENCODER)
    assert [entry.is_current(each) for each in (whole, plan)] == [False, True]
    monkeypatch.setattr(builder, "run_build", lambda *arguments: pytest.fail("a build was started"))
    again = one(bundle, APART)
    assert (again.how, again.plan) == ("kept", plan)
    prune(bundle)
    assert open_bundle(bundle).entry(Stage.TEXT_ENCODER).plans == (plan,)
    undo_loras(bundle)
    assert one(bundle, APART).plan == plan


def test_what_is_built_in(bundle: Path) -> None:
    """All the graph has in the file but its inputs: a change there is seen, one in an input is not."""
    graph = bundle / "prior/step.onnx"
    model = onnx.load(graph, load_external_data=False)
    inputs = weight_inputs(model, graph, bundle)
    inside = built_in(model, graph, bundle, inputs)
    ((path, ranges),) = inside.ranges.items()
    said = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]
    used = sum(int(each["length"]) for each in said if each)
    assert sum(stop - start for start, stop in ranges) + sum(weight.bytes for weight in inputs) == used
    file = bundle / path
    content = bytearray(file.read_bytes())
    for at, same in ((inputs[0].offset, True), (ranges[0][0], False), (ranges[-1][1] - 1, False)):
        content[at] ^= 1
        file.unlink()
        file.write_bytes(content)
        assert (built_in(model, graph, bundle, inputs) == inside) is same
        content[at] ^= 1


def test_weights_that_are_streamed(bundle: Path) -> None:
    """Its header says that no weights stay on the GPU; a plan that was not built so is not taken for one."""
    whole = one(bundle, TEXT).plan
    plan = one(bundle, replace(TEXT, weight_streaming=True)).plan
    assert (whole.weight_streaming, plan.weight_streaming) == (False, True)
    assert weight_bytes(bundle / whole.path) > 0
    assert weight_bytes(bundle / plan.path) == 0
    assert find_contradiction(bundle / plan.path, plan) is None
    wrong = whole.model_copy(update={"weight_streaming": True})
    problem = find_contradiction(bundle / whole.path, wrong)
    assert problem == (
        f"its header says {weight_bytes(bundle / whole.path)} bytes of weights stay on the GPU, expected 0: "
        "they are streamed"
    )


def test_wrong_requests(bundle: Path) -> None:
    both = BuildOptions("tensorrt", refittable=True, weights_as_inputs=True)
    with pytest.raises(UsageError, match="refittable=True and weights_as_inputs=True serve the same purpose"):
        require_targets(both, Precision.BF16)
    path = bundle / "cascade.json"
    path.write_text(path.read_text().replace('"quantization": "none"', '"quantization": "int8"'))
    with pytest.raises(UsageError, match="text_encoder: quantised weights cannot be inputs; build without"):
        build(bundle, APART)

"""How many kernels a step launches on a GPU, by the nodes of the written graphs of real size."""

from collections import Counter
from itertools import pairwise

import onnx
import pytest
from onnx import TensorProto

from cascadekit.converters.onnx import GraphOptions, write_graph
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from helpers.cuda_kernels import types_of
from helpers.graphs import places_of

LITE, FULL = Variant.LITE, Variant.FULL
PRIOR, DECODER = Stage.PRIOR, Stage.DECODER
FP16, BF16 = Precision.FP16, Precision.BF16
FREE = {"Shape", "Constant", "Reshape", "Squeeze", "Unsqueeze", "Identity"}  # nothing is computed
# ONNX Runtime folds constants of every type in these operators when it loads a graph, in others fp32 and int64.
FOLDED = {"Cast", "Concat", "Reshape", "Split", "Transpose"}
STORED = {Precision.FP32: "F32", Precision.FP16: "F16", Precision.BF16: "BF16"}
# What ran for a step before there were graphs for ONNX Runtime: the prior's step, the decoder's whole graph, portable.
BEFORE = {(PRIOR, LITE): 1359, (PRIOR, FULL): 2703, (DECODER, LITE): 2849, (DECODER, FULL): 6394}
# The same, where a Gemm or convolution with a bias counts twice, as ONNX Runtime adds biases of products in a launch of
# its own: the counts of the time before, for fp16.
BEFORE_WITH_BIASES = {(PRIOR, LITE): 1523, (PRIOR, FULL): 3027, (DECODER, LITE): 3227, (DECODER, FULL): 7280}
LAUNCHES = {
    (PRIOR, LITE, FP16): 658,
    (PRIOR, FULL, FP16): 1305,
    (PRIOR, LITE, BF16): 788,
    (PRIOR, FULL, BF16): 1563,
    (DECODER, LITE, FP16): 1394,
    (DECODER, LITE, BF16): 1696,
    (DECODER, FULL, FP16): 3121,
    (DECODER, FULL, BF16): 3775,
}


def launches(model: onnx.ModelProto) -> Counter[str]:
    """Nodes that launch a kernel, by operator. Shape arithmetic is on the CPU."""
    types = types_of(model)
    known = {tensor.name for tensor in model.graph.initializer}
    found: Counter[str] = Counter()
    for node in model.graph.node:
        kinds = {types[name] for name in node.input if name}
        foldable = node.op_type in FOLDED or kinds <= {TensorProto.FLOAT, TensorProto.INT64}
        if foldable and all(name in known for name in node.input if name):
            known.update(node.output)
        elif node.op_type not in FREE and kinds != {TensorProto.INT64}:
            found[node.op_type] += 1
    return found


def biases(model: onnx.ModelProto) -> int:
    """Products and convolutions that add a third input."""
    return sum(node.op_type in ("Gemm", "Conv") and len(node.input) > 2 for node in model.graph.node)


def beside_convolutions(model: onnx.ModelProto) -> int:
    """Transposes between channels last and a convolution. ONNX Runtime's option prefer_nhwc, which fp16 graphs get on
    CUDA, turns each convolution into one of channels last between two transposes, which cancel these."""
    convolutions = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    given, made = {node.input[0] for node in convolutions}, {node.output[0] for node in convolutions}
    users = Counter(name for node in model.graph.node for name in node.input)
    return sum(
        node.op_type == "Transpose"
        and (node.input[0] in made or (node.output[0] in given and users[node.output[0]] == 1))
        for node in model.graph.node
    )


def step_of(stage: Stage, variant: Variant, precision: Precision) -> onnx.ModelProto:
    config = PRESETS[stage, variant]
    options = GraphOptions(precision=precision, target=Target.ORT)
    return write_graph(config, places_of(config, STORED[precision], biases=True), options, "step")


@pytest.mark.parametrize(("stage", "variant", "precision"), LAUNCHES, ids=str)
def test_launches_of_a_step(stage: Stage, variant: Variant, precision: Precision) -> None:
    weights = places_of(PRESETS[stage, variant], STORED[precision], biases=True)
    model = step_of(stage, variant, precision)
    found = launches(model).total() - (beside_convolutions(model) if precision is FP16 else 0)
    assert found == LAUNCHES[stage, variant, precision]
    if precision is FP16:
        assert found <= BEFORE[stage, variant] / 2
        assert found + biases(model) <= BEFORE_WITH_BIASES[stage, variant] / 2
    for node in model.graph.node:
        if node.op_type == "Split":  # see PARTS in converters/onnx/conditions.py
            assert len(node.output) <= 32
        if node.op_type == "Cast" and precision is FP16:
            assert "channelwise" not in node.name or node.input[0] in weights or "/bias" in node.name


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_images_are_resized_where_their_sizes_may_differ(precision: Precision) -> None:
    """The decoder halves its sides three times and doubles them: 135 of an image of 1080 pixels comes back as 134."""
    sides = [1080 // 8]
    while len(sides) < 4:
        sides.append(sides[-1] // 2)
    assert all(2 * small < large for large, small in pairwise(sides))
    assert launches(step_of(DECODER, FULL, precision))["Resize"] == 3
    assert launches(step_of(PRIOR, FULL, precision))["Resize"] == 0


def test_what_bf16_launches_more() -> None:
    """The step in bf16 has the operators of fp16, but for the norm over pixels, which has no kernel in bf16. It also
    keeps its transposes, as there are no convolutions on channels last in bf16."""
    wide, narrow = (step_of(PRIOR, LITE, precision) for precision in (BF16, FP16))
    blocks = launches(narrow)["ReduceL2"]
    assert launches(wide) - launches(narrow) == {"Mul": blocks, "MatMul": blocks, "Sqrt": blocks, "Expand": 1}
    assert launches(narrow) - launches(wide) == {"ReduceL2": blocks}
    transposes = beside_convolutions(narrow)
    assert LAUNCHES[PRIOR, LITE, BF16] == LAUNCHES[PRIOR, LITE, FP16] + transposes + 2 * blocks + 1
    # Three more operators of ONNX Runtime 1.31 would save one launch a block each, see docs/graph.md: not enough.
    assert LAUNCHES[PRIOR, LITE, BF16] - 3 * blocks > BEFORE[PRIOR, LITE] / 2

"""How many kernels a step launches on a GPU, by the nodes of the written graphs of real size."""

from collections import Counter

import onnx
import pytest
from onnx import TensorProto

from cascadekit.converters.onnx import GraphOptions, write_graph
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from helpers.cuda_kernels import types_of
from helpers.graphs import places_of

LITE, FULL = Variant.LITE, Variant.FULL
FREE = {"Shape", "Constant", "Reshape", "Squeeze", "Unsqueeze", "Identity"}  # nothing is computed
# ONNX Runtime folds constants of every type in these operators when it loads a graph, in others fp32 and int64.
FOLDED = {"Cast", "Concat", "Reshape", "Split", "Transpose"}
STORED = {Precision.FP32: "F32", Precision.FP16: "F16", Precision.BF16: "BF16"}
# Launches of a step graph for portable, and for ort.
LAUNCHES = {
    (Stage.PRIOR, FULL, Precision.FP16): (2646, 1558),
    (Stage.PRIOR, FULL, Precision.BF16): (2646, 1815),
    (Stage.DECODER, LITE, Precision.FP16): (2637, 1646),
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


@pytest.mark.parametrize(("stage", "variant", "precision"), LAUNCHES, ids=str)
def test_launches_of_a_step(stage: Stage, variant: Variant, precision: Precision) -> None:
    config = PRESETS[stage, variant]
    weights = places_of(config, STORED[precision])
    targets = (Target.PORTABLE, Target.ORT)
    models = [write_graph(config, weights, GraphOptions(precision=precision, target=t), "step") for t in targets]
    assert tuple(launches(model).total() for model in models) == LAUNCHES[stage, variant, precision]
    for node in models[1].graph.node:
        if node.op_type == "Split":  # see AT_ONCE in converters/onnx/conditions.py
            assert len(node.output) <= 32
        if node.op_type == "Cast" and precision is Precision.FP16:
            assert "channelwise" not in node.name or node.input[0] in weights or "/bias" in node.name

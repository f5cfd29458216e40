"""Weights that stay in their file are cast to fp32 when their product is due, and values are probed once they are
there: neither is in memory for long."""

import json
import math
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import save_file

from cascadekit.converters.onnx import GraphOptions, write_graph
from cascadekit.runtime.engines.onnxruntime import CPU, keep_mapped
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.storage.safetensors_reader import read_header
from helpers.graphs import random_tensors

CONFIG = PRESETS[Stage.DECODER, Variant.TINY]


def ran(tmp_path: Path, options: GraphOptions = GraphOptions()) -> list[str]:  # noqa: B008 (frozen)
    """The operators of a graph with bf16 weights in ONNX Runtime's own order of execution."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in random_tensors(CONFIG, 0).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    weights = read_header(tmp_path / "weights.safetensors").tensors
    onnx.save(write_graph(CONFIG, weights, options), tmp_path / "model.onnx")
    how = onnxruntime.SessionOptions()
    how.enable_profiling, how.profile_file_prefix = True, str(tmp_path / "profile")
    how.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", how, providers=[CPU], disabled_optimizers=keep_mapped(how)
    )
    shapes = {"sample": (1, 4, 16, 16), "timestep_ratio": (1,), "clip_text_pooled": (1, 1, 12), "effnet": (1, 16, 2, 2)}
    session.run(None, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]


def test_a_weight_is_cast_when_its_product_is_due(tmp_path: Path) -> None:
    kinds = ran(tmp_path)
    casts = [position for position, kind in enumerate(kinds) if kind == "Cast"]
    assert len(casts) > 50
    before = [sum(kind == "Gemm" for kind in kinds[:position]) for position in casts]  # products that ran before each
    assert before[len(casts) * 3 // 4] > kinds.count("Gemm") / 2  # 0.7 of them; 0.4 in the order of the modules
    assert before[-1] >= kinds.count("Gemm") - 2


def test_a_weight_is_cast_for_each_pass_over_its_module(tmp_path: Path) -> None:
    """The tiny decoder runs the blocks of a level twice: their weights do not stay in fp32 from one pass to the other.
    Where casts are folded, each weight is there once."""
    kinds, passes = ran(tmp_path), CONFIG.up_blocks_repeat_mappers
    weights = read_header(tmp_path / "weights.safetensors").tensors
    cast = [node.input[0] for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Cast"]
    assert kinds.count("Cast") == len(cast)  # as ONNX Runtime ran them
    products = [name for name in weights if re.fullmatch(r"up_blocks.*\.channelwise\.[04]\.weight", name)]
    assert {cast.count(name) - passes[int(name.split(".")[1])] for name in products} == {0}
    assert min(passes) > 1
    how = onnxruntime.SessionOptions()
    how.log_severity_level, how.optimized_model_filepath = 3, str(tmp_path / "folded.onnx")
    how.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(tmp_path / "model.onnx", how, providers=[CPU])
    folded = onnx.load(tmp_path / "folded.onnx").graph.initializer
    wanted = sum(math.prod(weight.shape) for weight in weights.values())
    assert sum(math.prod(each.dims) for each in folded) < 1.05 * wanted


def test_a_value_is_probed_once_it_is_there(tmp_path: Path) -> None:
    kinds = ran(tmp_path, GraphOptions(probes=True))
    probes = [position for position, kind in enumerate(kinds) if kind == "ReduceMax"]
    assert len(probes) > 50
    before = [sum(kind == "Gemm" for kind in kinds[:position]) for position in probes]
    shares = [number / kinds.count("Gemm") for number in before]  # of the products that ran before each probe
    assert shares[0] < 0.1  # 1.0 where probes come last: all probed values are in memory until then
    assert 0.3 < shares[len(shares) // 2] < 0.7

"""Weights that stay in their file are cast to fp32 when their product is due, and not long before."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import save_file

from cascadekit.converters.onnx import write_graph
from cascadekit.runtime.engines.onnxruntime import CPU, keep_mapped
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.storage.safetensors_reader import read_header
from helpers.graphs import random_tensors

CONFIG = PRESETS[Stage.DECODER, Variant.TINY]


def test_a_weight_is_cast_when_its_product_is_due(tmp_path: Path) -> None:
    """In ONNX Runtime's own order of execution."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in random_tensors(CONFIG, 0).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    onnx.save(write_graph(CONFIG, read_header(tmp_path / "weights.safetensors").tensors), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=[CPU], disabled_optimizers=keep_mapped(options)
    )
    shapes = {"sample": (1, 4, 16, 16), "timestep_ratio": (1,), "clip_text_pooled": (1, 1, 12), "effnet": (1, 16, 2, 2)}
    session.run(None, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    casts = [position for position, kind in enumerate(ran) if kind == "Cast"]
    assert len(casts) > 50
    before = [sum(kind == "Gemm" for kind in ran[:position]) for position in casts]  # products that ran before each
    assert before[len(casts) * 3 // 4] > ran.count("Gemm") / 2  # 0.7 of them; 0.4 in the order of the modules
    assert before[-1] >= ran.count("Gemm") - 2

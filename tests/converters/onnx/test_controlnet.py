"""The ControlNet graphs in onnxruntime against the PyTorch reference."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper, shape_inference

from cascadekit import export as export_bundle
from cascadekit.schemas.stages import PRESETS, PROJ_BLOCKS_ALL, ControlNetConfig, NetworkConfig, Stage, Variant
from helpers.efficientnets import narrow_controlnet
from helpers.standins import write_stand_in

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 1e-6 is found

EFFICIENTNETS = {
    "canny": PRESETS[Stage.CONTROLNET_CANNY, Variant.FULL],
    "inpainting": narrow_controlnet(4, (63, 2), c_proj=24),
}
SUPER_RESOLUTION = PRESETS[Stage.CONTROLNET_SUPER_RESOLUTION, Variant.FULL]
IDENTITY = ControlNetConfig(512, PROJ_BLOCKS_ALL, "simple", c_proj=24)


@pytest.fixture(scope="module")
def super_resolution(export: Any) -> Iterator[Any]:
    """Made apart from the other graphs, as its weights are 800 MB."""
    graph = export.__wrapped__(SUPER_RESOLUTION)
    yield graph
    shutil.rmtree(graph.path.parent)
    gc.collect()


@pytest.mark.parametrize("sizes", [(1, 3, 3), (2, 35, 66), (1, 98, 67)], ids=str)
@pytest.mark.parametrize("config", EFFICIENTNETS.values(), ids=EFFICIENTNETS)
def test_efficientnet(
    export: Callable[..., Any], difference: Callable[..., float], config: NetworkConfig, sizes: tuple[int, int, int]
) -> None:
    graph = export(config)
    inputs = graph.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5)], ids=str)
def test_identity(export: Callable[..., Any], difference: Callable[..., float], sizes: tuple[int, int, int]) -> None:
    graph = export(IDENTITY)
    inputs = graph.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    outputs = graph.run(inputs)
    assert len(outputs) == 64
    assert difference(outputs, graph.expected(inputs)) <= TOLERANCE


@pytest.mark.slow  # 800 MB; its blocks are those of the smaller EfficientNet, and all its shapes are checked below
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5)], ids=str)
def test_super_resolution(super_resolution: Any, difference: Callable[..., float], sizes: tuple[int, int, int]) -> None:
    inputs = super_resolution.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    assert difference(super_resolution.run(inputs), super_resolution.expected(inputs)) <= TOLERANCE


def test_checker_accepts_super_resolution(catalog_folder: Path, tmp_path: Path) -> None:
    """With the release's shapes and a hole in place of the weights."""
    source = tmp_path / "source.safetensors"
    write_stand_in(catalog_folder / "original_controlnet_super_resolution.json", source, holes=True)
    export_bundle(source, tmp_path / "bundle", weights="link", hash=False)
    source.unlink()  # onnx refuses weights with two hard links
    path = tmp_path / "bundle" / SUPER_RESOLUTION.stage / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, (2, 16, 3, 5)))
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shapes = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in inferred.graph.output}
    assert shapes == {f"control.{block}": [2, 2048, 3, 5] for block in (0, 4, 8, 12, 51, 55, 59, 63)}


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    config = EFFICIENTNETS["inpainting"]
    graph = export(config, dtype=lambda _: torch.bfloat16)
    inputs = graph.inputs(batch=1, height=40, width=50)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(config).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round

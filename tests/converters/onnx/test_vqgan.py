"""Both VQGAN graphs in onnxruntime against the PyTorch reference and against diffusers."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from cascadekit.converters.onnx import write_graph
from cascadekit.parity.reference import load_vqgan_encoder
from cascadekit.schemas.errors import ExportError
from cascadekit.schemas.ports import vqgan_encoder_ports
from cascadekit.schemas.stages import VQGANConfig
from cascadekit.storage.safetensors_reader import read_header

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 3e-7 is found

CONFIGS = {
    "released form": VQGANConfig(bottleneck_blocks=3, embed_dim=24, num_vq_embeddings=8),
    "three levels": VQGANConfig(
        2,
        32,
        levels=3,
        latent_channels=5,
        out_channels=2,
        up_down_scale_factor=3,
        num_vq_embeddings=8,
        scale_factor=0.43,
    ),
    "one level": VQGANConfig(1, 16, levels=1, up_down_scale_factor=1, num_vq_embeddings=8),
}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (3, 8, 6), (1, 1, 9)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], config: VQGANConfig, sizes: tuple[int, int, int]
) -> None:
    graph = export(config)
    inputs = graph.inputs(**dict(zip(("batch", "height", "width"), sizes, strict=True)))
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_graph_follows_diffusers(
    export: Callable[..., Any], difference: Callable[..., float], config: VQGANConfig
) -> None:
    graph = export(config)
    theirs = PaellaVQModel(**asdict(config)).eval()
    theirs.load_state_dict(graph.tensors)
    inputs = graph.inputs(batch=2, height=5, width=7)
    with torch.no_grad():  # as in the last lines of diffusers' decoder pipeline
        decoded = theirs.decode(theirs.config.scale_factor * torch.from_numpy(inputs["latents"])).sample
    images = graph.run(inputs)
    assert difference(images, {"images": decoded.clamp(0, 1).numpy()}) <= TOLERANCE
    assert {0.0, 1.0} < set(np.unique(images["images"]))  # the clamp had something to do, and something was left


def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any], difference: Callable[..., float]
) -> None:
    config = CONFIGS["released form"]
    graph = export(config, dtype=lambda name: torch.float16 if "up_blocks" in name else torch.bfloat16)
    inputs = graph.inputs(batch=1, height=4, width=4)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(config).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round


@pytest.fixture
def encoder(export: Callable[..., Any]) -> Callable[[VQGANConfig], Any]:
    """A function for a session of the encoder's graph, which lies beside the decoder's and refers to the same file."""

    def opened(config: VQGANConfig) -> Any:
        path = export(config).path.with_name("encoder.onnx")
        weights = read_header(path.with_name("weights.safetensors")).tensors
        onnx.save(write_graph(config, weights, name="encoder"), path)
        onnx.checker.check_model(path, full_check=True)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    return opened


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (1, 8, 6)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_encoder_follows_the_reference_and_diffusers(
    export: Callable[..., Any],
    encoder: Callable[..., Any],
    difference: Callable[..., float],
    config: VQGANConfig,
    sizes: tuple[int, int, int],
) -> None:
    batch, height, width = sizes
    factor = vqgan_encoder_ports(config).ranges["height"].step
    images = np.random.default_rng(0).random((batch, 3, factor * height, factor * width), np.float32)
    tensors = export(config).tensors
    theirs = PaellaVQModel(**asdict(config)).eval()
    theirs.load_state_dict(tensors)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(images)).latents.numpy()
        ours = load_vqgan_encoder(config, tensors)(images=torch.from_numpy(images))
    found = {"latents": encoder(config).run(["latents"], {"images": images})[0]}
    assert found["latents"].shape == (batch, config.latent_channels, height, width)
    assert difference(found, {"latents": latents}) <= TOLERANCE
    assert difference(found, {name: value.numpy() for name, value in ours.items()}) <= TOLERANCE


def test_encoder_has_its_ports_and_reads_its_half(encoder: Callable[..., Any], export: Callable[..., Any]) -> None:
    config = CONFIGS["released form"]
    session, ports = encoder(config), vqgan_encoder_ports(config)
    for found, expected in ((session.get_inputs(), ports.inputs), (session.get_outputs(), ports.outputs)):
        assert [(port.name, tuple(port.shape)) for port in found] == [(port.name, port.dims) for port in expected]
    assert ports.outputs[0].dims == ("batch", 4, "height//4", "width//4")
    graph = onnx.load(export(config).path.with_name("encoder.onnx"), load_external_data=False).graph
    read = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    half = {name for name in export(config).tensors if name.startswith(("in_block.", "down_blocks."))}
    assert read == {name for name in half if not name.endswith("num_batches_tracked")}


def test_encoder_names_missing_weights() -> None:
    with pytest.raises(ExportError, match=r"vqgan_encoder: \d+ weights(.|\n)*down_blocks\.3\.0\.weight: missing"):
        write_graph(CONFIGS["released form"], {}, name="encoder")

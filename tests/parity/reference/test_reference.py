"""Building and loading, and the facts about the blocks that no oracle comparison states by itself."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from cascadekit.parity.reference import build_reference, load_reference
from cascadekit.runtime.engines.pytorch.networks.blocks import resize
from cascadekit.runtime.engines.pytorch.networks.unet import sinusoids
from cascadekit.schemas.errors import LayoutError
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.stages import PRESETS, NetworkConfig, Stage, UNetConfig, Variant
from cascadekit.schemas.tensors import expected_tensors

TINY_VQGAN = PRESETS[Stage.VQGAN, Variant.TINY]
TINY_PRIOR = PRESETS[Stage.PRIOR, Variant.TINY]
SIZES = {"batch": 2, "height": 34, "width": 22, "effnet_height": 3, "effnet_width": 5, "tokens": 9, "images": 2}


def needed(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """The tensors inference uses: all but the encoder and the codebook of the VQGAN."""
    return {
        name: shape
        for name, shape in expected_tensors(config).items()
        if config.stage is not Stage.VQGAN or name.startswith(("up_blocks.", "out_block."))
    }


def random_tensors(config: NetworkConfig) -> dict[str, Any]:
    return {name: torch.randn(shape) for name, shape in expected_tensors(config).items()}


@pytest.fixture(params=PRESETS, ids=lambda key: "-".join(key))
def preset(request: pytest.FixtureRequest) -> NetworkConfig:
    return PRESETS[request.param]


@cache
def without_values(preset: NetworkConfig) -> Any:
    """The network of a preset on the meta device."""
    with torch.device("meta"):
        return build_reference(preset).eval()


def test_keys_and_shapes_are_those_of_the_layout(preset: NetworkConfig) -> None:
    network = without_values(preset)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == needed(preset)


def test_inputs_and_outputs_are_the_ports(preset: NetworkConfig) -> None:
    ports, network = ports_of(preset), without_values(preset)
    assert list(inspect.signature(network.forward).parameters) == [port.name for port in ports.inputs]

    def shape(dims: tuple[int | str, ...]) -> list[int]:
        return [dim if isinstance(dim, int) else eval(dim, dict(SIZES)) for dim in dims]  # such as 4*height

    inputs = {p.name: torch.empty(shape(p.dims), dtype=getattr(torch, p.dtype), device="meta") for p in ports.inputs}
    outputs = network(**inputs)
    assert {name: (str(value.dtype), list(value.shape)) for name, value in outputs.items()} == {
        p.name: (f"torch.{p.dtype}", shape(p.dims)) for p in ports.outputs
    }


def test_every_parameter_belongs_to_the_module_of_its_key() -> None:
    network = build_reference(TINY_PRIOR)
    for name in network.state_dict():
        path, _, attribute = name.rpartition(".")
        assert hasattr(network.get_submodule(path), attribute)


def test_loading_shares_tensors_of_the_same_dtype() -> None:
    tensors = random_tensors(TINY_PRIOR)
    network = load_reference(TINY_PRIOR, tensors)
    assert not network.training
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == {
        name: value.data_ptr() for name, value in tensors.items()
    }
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loading_casts(dtype: Any) -> None:
    tensors = random_tensors(TINY_PRIOR)
    weights = load_reference(TINY_PRIOR, tensors, dtype).state_dict()
    assert all(torch.equal(weights[name], value.to(dtype)) for name, value in tensors.items())


class Lazy(Mapping[str, Any]):
    """Knows all names, and notes which tensors are read."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.read.append(name)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_only_what_is_needed_is_read_and_once() -> None:
    lazy = Lazy(random_tensors(TINY_VQGAN))
    load_reference(TINY_VQGAN, lazy)
    assert sorted(lazy.read) == sorted(needed(TINY_VQGAN))


def test_tensors_without_use_may_be_absent() -> None:
    tensors = random_tensors(TINY_VQGAN)
    load_reference(TINY_VQGAN, {name: tensors[name] for name in needed(TINY_VQGAN)})


def test_all_problems_are_named_together() -> None:
    tensors = random_tensors(TINY_PRIOR)
    del tensors["clf.1.bias"], tensors["embedding.1.weight"]
    tensors["clip_mapper.weight"] = torch.zeros(1)
    tensors["down_blocks.0.0.depthwise.bias"] = torch.zeros(3)
    with pytest.raises(LayoutError) as caught:
        load_reference(TINY_PRIOR, tensors)
    assert str(caught.value) == (
        "tensors of the prior: missing embedding.1.weight; missing clf.1.bias; unexpected clip_mapper.weight; "
        "down_blocks.0.0.depthwise.bias expected shape [64], found [3]"
    )


@pytest.mark.parametrize("key", [(Stage.PRIOR, "clip_image_in_channels"), (Stage.DECODER, "pixel_mapper_in_channels")])
def test_missing_channels_are_an_error(key: tuple[Stage, str]) -> None:
    stage, field = key
    config = PRESETS[stage, Variant.TINY]
    assert isinstance(config, UNetConfig)
    without: Any = {field: None}
    with pytest.raises(LayoutError, match=f"config of the {stage}: .*{field} is null"):
        build_reference(replace(config, **without))


def test_timestep_product_rounds_in_the_dtype() -> None:
    for dtype, product in ((torch.float32, 9500), (torch.bfloat16, 9472), (torch.float16, 9504)):
        value = sinusoids(torch.tensor([0.95]).to(dtype), 64)[0]
        assert value.dtype == dtype
        assert float(value[0]) == pytest.approx(float(torch.tensor(product).double().sin()), abs=5e-3)
    zero = sinusoids(torch.zeros(1), 64)[0]
    assert zero.tolist() == [0.0] * 32 + [1.0] * 32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resize_to_the_same_size_changes_no_bit(memory_format: Any) -> None:
    for height in range(1, 65):
        x = torch.randn(1, 3, height, 65 - height).to(memory_format=memory_format)
        assert torch.equal(resize(x, x), x)

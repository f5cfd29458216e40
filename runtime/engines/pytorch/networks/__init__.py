"""The networks in PyTorch, one file each, with keys named as in the diffusers layout. Importing it imports torch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .....schemas.errors import LayoutError
from .....schemas.stages import (
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    UNetConfig,
    VQGANConfig,
)
from .....schemas.tensors import expected_tensors, is_counter
from .controlnet import ControlNet
from .decoder import Decoder
from .effnet_encoder import EffnetEncoder
from .image_encoder import ImageEncoder
from .previewer import Previewer
from .prior import Prior
from .text_encoder import TextEncoder
from .vqgan import VQGANDecoder, VQGANEncoder

NETWORKS: Mapping[type[NetworkConfig], Callable[[Any], nn.Module]] = {
    VQGANConfig: VQGANDecoder,
    TextEncoderConfig: TextEncoder,
    ImageEncoderConfig: ImageEncoder,
    EffnetEncoderConfig: EffnetEncoder,
    PreviewerConfig: Previewer,
    ControlNetConfig: ControlNet,
}


def build_reference(config: NetworkConfig) -> nn.Module:
    """The network of `config` with torch's default initialisation, on torch's default device and dtype.

    Every network takes its input ports as keyword arguments and returns its output ports as a dict. Names and shapes
    are those of ``ports_of(config)``. Inputs have the dtype of the weights, but ids and masks stay int64. The network
    of a vqgan is its decoder half. BatchNorms are meant to run in eval mode.

    Raises LayoutError for a config that describes no network.
    """
    if isinstance(config, UNetConfig):
        return Prior(config) if config.stage is Stage.PRIOR else Decoder(config)
    return NETWORKS[type(config)](config)


def load_reference(
    config: NetworkConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """The network of `config` on `device`, holding `tensors` (named as in the diffusers layout), ready for inference.

    The network is built without storage. Tensors that are on `device` in `dtype` already become its weights without a
    copy, so the network and the caller share them. Only tensors of the network are read from the mapping, which may be
    lazy; the encoder and the codebook of a VQGAN are never read.

    Raises LayoutError naming every tensor that is missing, unexpected or of a wrong shape.
    """
    return _load(build_reference, config, tensors, dtype=dtype, device=device)


def load_vqgan_encoder(
    config: VQGANConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """The encoder half of the vqgan, loaded as `load_reference` does; its ports are ``vqgan_encoder_ports(config)``."""
    return _load(VQGANEncoder, config, tensors, dtype=dtype, device=device)


def _load(
    build: Callable[[Any], nn.Module],
    config: NetworkConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: str,
) -> nn.Module:
    with torch.device("meta"):
        network = build(config)
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    known = expected_tensors(config)
    weights = {
        name: tensors[name].to(device, None if is_counter(name) else dtype)  # one by one, as each is read
        for name in shapes
        if name in tensors
    }
    problems = [
        *(f"missing {name}" for name in shapes if name not in tensors),
        *(f"unexpected {name}" for name in tensors if name not in known),
        *(
            f"{name} expected shape {list(shapes[name])}, found {list(tensor.shape)}"
            for name, tensor in weights.items()
            if tuple(tensor.shape) != shapes[name]
        ),
    ]
    if problems:
        raise LayoutError(f"tensors of the {config.stage}: {'; '.join(problems)}")
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()

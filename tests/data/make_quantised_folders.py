"""Saves a small prior with diffusers, quantised by torchao, bitsandbytes and SDNQ, and hashes the dequantised values.

python tests/data/make_quantised_folders.py

needs diffusers 0.42.1, torchao 0.18.0, bitsandbytes 0.50.2 and sdnq 0.2.8. It writes a folder for each program into the
folder quantised_folders: config.json and weights as `save_pretrained` leaves them, and values.json with the SHA-256 of
each tensor of the network as the program dequantises the whole of it.

diffusers quantises with bitsandbytes only where there is a GPU, though bitsandbytes computes on a CPU as well. That
check and the moves between GPU and CPU are left out here; all else is the program's own."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from diffusers import BitsAndBytesConfig, StableCascadeUNet, TorchAoConfig
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from diffusers.quantizers.bitsandbytes.utils import dequantize_and_replace
from sdnq import SDNQConfig
from sdnq.dequantizer import dequantize_sdnq_model
from torchao.quantization import Int8WeightOnlyConfig

from cascadekit.schemas.config_json import to_json
from helpers.quantised import CONFIG, SAVED, tensor_sha256


def torchao_dequantised(network: Any) -> Any:
    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return network


def bitsandbytes_dequantised(network: Any) -> Any:
    """The work of diffusers' `network.dequantize()`, but for the moves to a GPU and back."""
    return dequantize_and_replace(
        network, network.hf_quantizer.modules_to_not_convert, network.hf_quantizer.quantization_config
    )


# The config of each folder, and the program's own way to undo it.
PROGRAMS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "torchao_int8": (TorchAoConfig(Int8WeightOnlyConfig()), torchao_dequantised),
    "bitsandbytes_nf4": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        bitsandbytes_dequantised,
    ),
    "bitsandbytes_int8": (BitsAndBytesConfig(load_in_8bit=True), bitsandbytes_dequantised),
    "sdnq_uint4": (
        SDNQConfig(
            weights_dtype="uint4",
            minimum_allowed_numel=1,
            minimum_allowed_channel_size=1,
            modules_to_not_convert=["clip_txt_mapper"],  # an odd number of values
        ),
        dequantize_sdnq_model,
    ),
}


def allow_bitsandbytes_on_the_cpu() -> None:
    for quantiser in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        quantiser.validate_environment = lambda self, *args, **kwargs: None
        quantiser.update_device_map = lambda self, device_map: {"": "cpu"}


def main() -> None:
    allow_bitsandbytes_on_the_cpu()
    torch.manual_seed(1)
    plain = StableCascadeUNet.from_config(to_json(CONFIG)).eval()
    for parameter in plain.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    with TemporaryDirectory() as folder:
        plain.to(torch.bfloat16).save_pretrained(folder)
        for name, (config, dequantised) in PROGRAMS.items():
            network = StableCascadeUNet.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
            network.register_to_config(_name_or_path="plain")  # a path of this machine
            network.save_pretrained(SAVED / name)
            values = {key: tensor_sha256(tensor) for key, tensor in dequantised(network).state_dict().items()}
            (SAVED / name / "values.json").write_text(json.dumps(values, indent=0) + "\n")
            print(name, sum(path.stat().st_size for path in (SAVED / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()

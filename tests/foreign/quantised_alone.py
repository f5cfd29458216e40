"""Quantises a model with torchao or bitsandbytes, in a process of its own, as transformers and diffusers look for both.

python -m foreign.quantised_alone KIND MODEL OUTPUT

Prior and decoder of the diffusers folder MODEL are quantised and saved below OUTPUT. Stability's sampler runs what was
quantised; its pictures become OUTPUT/pictures.npy."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableCascadeUNet, TorchAoConfig
from safetensors.torch import save_file

from helpers.format_pictures import PROMPTS, SEED
from helpers.stability_pictures import by_stability

STAGES = ("prior", "decoder")
BLOCK = 64  # values with one scale


def by_torchao(source: Path, folder: Path) -> StableCascadeUNet:
    """As diffusers quantises while it loads, and saves."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    network = StableCascadeUNet.from_pretrained(source, quantization_config=config, torch_dtype=torch.float32)
    network.save_pretrained(folder)
    return network


def by_bitsandbytes(source: Path, folder: Path, kind: str) -> StableCascadeUNet:
    """With the package's own Linear, as diffusers quantises with a GPU alone."""
    import bitsandbytes

    network = StableCascadeUNet.from_pretrained(source, torch_dtype=torch.float32)
    for name, layer in [*network.named_modules()]:
        # On CPUs that multiply bf16, bitsandbytes takes rows of whole blocks alone.
        if not isinstance(layer, torch.nn.Linear) or layer.in_features % BLOCK:
            continue
        four = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, quant_type=kind)
        four.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind)
        four.bias = layer.bias
        network.set_submodule(name, four.to("cpu"))
    folder.mkdir(parents=True)
    shutil.copyfile(source / "config.json", folder / "config.json")
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return network


KINDS: dict[str, Callable[[Path, Path], StableCascadeUNet]] = {
    "torchao_int8": by_torchao,
    "bitsandbytes_nf4": partial(by_bitsandbytes, kind="nf4"),
}


def main(kind: str, model: Path, output: Path) -> None:
    networks = {stage: KINDS[kind](model / stage, output / stage).eval() for stage in STAGES}
    np.save(output / "pictures.npy", by_stability(model, PROMPTS, SEED, **networks))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

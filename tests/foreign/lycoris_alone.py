"""Writes LoRAs with LyCORIS, in a process of its own, as it imports torchao where that is installed.

python -m foreign.lycoris_alone PRIOR OUTPUT

For each of ALGORITHMS, OUTPUT/ALGORITHM.safetensors is a random LoRA for the network in the folder PRIOR, and
OUTPUT/ALGORITHM_merged.safetensors the network as its layers compute with it. LyCORIS's own `merge_to` would
multiply LoHa and LoKr by alpha / rank twice (4.1.3), unlike its layers."""

import sys
from pathlib import Path

import torch
from diffusers import StableCascadeUNet
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import save_file

ALGORITHMS = ("locon", "loha", "lokr", "full")


@torch.no_grad()
def computed(network: StableCascadeUNet) -> dict[str, torch.Tensor]:
    """The network's tensors, where Linears have the weight and bias that follow from their outputs."""
    tensors = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):
            bias = layer(torch.zeros(1, layer.in_features))
            tensors[f"{name}.weight"] = (layer(torch.eye(layer.in_features)) - bias).T.contiguous()
            tensors[f"{name}.bias"] = bias[0]
    return tensors


def main(prior: Path, output: Path) -> None:
    output.mkdir()
    torch.manual_seed(0)
    for algorithm in ALGORITHMS:
        network = StableCascadeUNet.from_pretrained(prior, torch_dtype=torch.float32)
        LycorisNetwork.apply_preset({"target_module": ["SDCascadeAttnBlock", "SDCascadeTimestepBlock"]})
        made = create_lycoris(network, 1.0, linear_dim=3, linear_alpha=2.0, algo=algorithm)
        made.apply_to()
        for name, parameter in made.named_parameters():
            if "alpha" not in name:
                torch.nn.init.normal_(parameter.data, std=0.3)
        made.save_weights(str(output / f"{algorithm}.safetensors"), torch.float32, {})
        save_file(computed(network), output / f"{algorithm}_merged.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

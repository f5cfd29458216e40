"""Run as a script: torchvision's EfficientNetV2-S on given weights and images.

Arguments: a folder that holds torchvision, and three safetensors files: the backbone's tensors, the images, and the
features to write. A process of its own, as transformers would use a torchvision that it can import.
"""

import sys
from typing import Any


def import_torchvision() -> Any:
    """torchvision, also where its compiled operators, built for a torch with CUDA, do not load beside a torch without:
    it then fails to register what it knows of two of them, unless these are declared."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision
    return torchvision


def main(folder: str, weights: str, images: str, features: str) -> None:
    sys.path.insert(0, folder)
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    torchvision = import_torchvision()

    tensors = load_file(weights)
    network = torchvision.models.efficientnet_v2_s(weights=None).features.eval()
    channels = tensors["0.0.weight"].shape[1]
    if channels != 3:  # as a ControlNet does it
        network[0][0] = torch.nn.Conv2d(channels, 24, kernel_size=3, stride=2, bias=False)
    network.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        save_file({name: network(value).contiguous() for name, value in load_file(images).items()}, features)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run as a script: torchvision's EfficientNetV2-S on given weights and images.

Arguments: a folder that holds torchvision, and three safetensors files: the backbone's tensors, the images, and the
features to write. A process of its own, as transformers would use a torchvision that it can import; and torchvision's
operators, built for another torch than the CPU's, do not load, so that the two it asks for have to be declared first.
"""

import sys


def main(folder: str, weights: str, images: str, features: str) -> None:
    sys.path.insert(0, folder)
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

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

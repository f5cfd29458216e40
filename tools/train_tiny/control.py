"""The ControlNet of the canny kind: edges to what is added in front of some of stage C's residual blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cascadekit.runtime.engines.pytorch.networks.blocks import ResBlock, resize
from cascadekit.runtime.engines.pytorch.networks.controlnet import ControlNet
from cascadekit.runtime.engines.pytorch.networks.prior import Prior
from cascadekit.runtime.sampling.controlnets import FilterInputs, canny
from cascadekit.schemas.control import control_port

from .configs import CANNY
from .dataset import Dataset
from .device import to_device
from .diffusion import noise_loss
from .prior import BATCH, CAP, Inputs, Writer, predicted_noise, sample_latents
from .towers import encode
from .trainer import Plan, train

PLAN = Plan(steps=1200, rate=2e-3, average=0.995, warmup=50, sheet=300)
SIDE = 96  # of the control image: 32 for each of stage C's latents
NO_TEXT, NO_EDGES = 0.3, 0.1


def all_edges(data: Dataset, path: Path) -> None:
    """The edges of every plain picture, as the product's filter finds them, into `path` (n, 96, 96) uint8."""
    made = np.zeros((data.plain, SIDE, SIDE), np.uint8)
    for place in range(data.plain):
        picture = Image.fromarray(np.asarray(data.pictures[place]))
        given = FilterInputs(picture, (SIDE // 32, SIDE // 32), None, lambda pixels: pixels)
        made[place] = np.round(canny(given)[0, 0] * 255)
    np.save(path, made)


def make_controlnet() -> ControlNet:
    """Begins without any effect: the last projections are zero."""
    network = ControlNet(CANNY)
    for projection in network.projections:
        nn.init.zeros_(projection[2].weight)
    return network


@contextmanager
def controlled(prior: Prior, additions: dict[str, Tensor]) -> Iterator[None]:
    """Add `additions`, by port, in front of the residual blocks of `prior`, which are counted as they run."""
    blocks = [
        module
        for part in (prior.down_blocks, prior.up_blocks)
        for module in part.modules()
        if isinstance(module, ResBlock)
    ]

    def adding(addition: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = inputs
            repeated = addition.repeat(len(x) // len(addition), 1, 1, 1)
            return (x + resize(repeated, x), *rest)

        return add

    hooks = [
        block.register_forward_pre_hook(adding(additions[control_port(number)]))
        for number, block in enumerate(blocks)
        if control_port(number) in additions
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train_controlnet(
    folder: Path,
    inputs: Inputs,
    edges: NDArray[np.uint8],
    writer: Writer,
    decode: Callable[[Tensor, Path], None],
    steps: int | None,
) -> None:
    """`edges` (n, 96, 96) belong to the plain pictures. `decode` makes a sheet of stage C's latents."""
    network = make_controlnet()
    seen = torch.zeros(BATCH, 1, inputs.image_embeds.shape[1])

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(len(edges), size=BATCH)
        ids = inputs.words.captions[rows, rng.integers(inputs.words.captions.shape[1], size=BATCH)]
        ids = np.where(rng.random((BATCH, 1)) < NO_TEXT, inputs.words.empty, ids)
        shown = to_device(edges[rows] * (rng.random((BATCH, 1, 1)) >= NO_EDGES)).float()[:, None] / 255
        with torch.no_grad():
            hidden, pooled = encode(writer.text, ids, inputs.words)
        clean = to_device(inputs.semantic[rows])
        with controlled(writer.prior, network(control_image=shown)):
            return noise_loss(lambda x, t: predicted_noise(writer.prior, x, t, (hidden, pooled, seen)), clean, CAP)

    def show(_: nn.Module, path: Path) -> None:
        shown = to_device(edges[:16]).float()[:, None] / 255
        silent = np.broadcast_to(inputs.words.empty, inputs.words.captions[:16, 0].shape)
        with controlled(writer.prior, network(control_image=shown)):
            decode(sample_latents(writer, inputs.words, silent), path)

    train(folder, network, PLAN.cut(steps), loss, show)

"""What training stage B and stage C share: the noise schedule, the loss, the first weights, and sampling for sheets."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from cascadekit.runtime.engines.pytorch.networks.blocks import (
    Attention,
    AttentionBlock,
    ResBlock,
    SizeKeepingSwitch,
    TimestepBlock,
)
from cascadekit.runtime.engines.pytorch.networks.unet import UNet
from cascadekit.runtime.sampling.samplers import OFFSET, VARIANCE_LIMITS

# The weights on the way from the input to the predicted noise, which are the same thing where there is only noise. That
# has to stay right to a hundredth, so these weights may move only a little at a time.
STRAIGHT = ("embedding.1", "clf.1", "_downscalers", "_upscalers")

HIGH = (0.75, 0.98)  # ratios at which the text decides what there will be

Predict = Callable[[Tensor, Tensor], Tensor]  # latents and timestep ratios (B,) to the noise


def alpha_bar(t: Tensor) -> Tensor:
    """The share of the signal's variance left at ratio t, as the product's samplers have it."""
    least, most = (float(value) for value in VARIANCE_LIMITS)
    offset = float(OFFSET)
    angle = (t + offset) / (1 + offset) * math.pi / 2
    start = math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    return (angle.cos().square() / start).clamp(least, most)


def noise_loss(predict: Predict, clean: Tensor, cap: float, high: float = 0.0) -> dict[str, Tensor]:
    """The weighted error of the predicted noise at random ratios, spread evenly over the batch.

    Weighting by 1/ᾱ makes it the error of a "v" prediction: without that, the high ratios, where the content of a
    picture is decided, would hardly count. `cap` is the largest weight. A share `high` of the batch has ratios in HIGH
    alone, where the condition decides and the noisy sample tells little."""
    batch = len(clean)
    t = _ratios(batch, round(high * batch))
    bar = alpha_bar(t)
    noise = torch.randn_like(clean)
    wide = bar.view(-1, *[1] * (clean.ndim - 1))
    found = predict(wide.sqrt() * clean + (1 - wide).sqrt() * noise, t)
    error = (found - noise).square().flatten(1).mean(dim=1)
    weighted = (1 / bar).clamp(max=cap) * error
    return {
        "loss": weighted.mean(),
        "noise": error.mean(),
        "low": weighted[t < 0.25].mean(),
        "high": weighted[t > 0.75].mean(),
    }


def _ratios(batch: int, high: int) -> Tensor:
    """(batch,) ratios, evenly spread over 0..1 except for the first `high`, which are spread over HIGH."""
    some = HIGH[0] + (HIGH[1] - HIGH[0]) * (torch.rand(high) + torch.arange(high)) / max(1, high)
    rest = batch - high
    return torch.cat([some, (torch.rand(rest) + torch.arange(rest)) / rest])


@torch.no_grad()
def sample(predict: Predict, noise: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """diffusers' sampler: latents from `noise`."""
    x = noise
    ratios = torch.linspace(1, 0, steps + 1)
    for t, after in pairwise(ratios):
        bar, bar_after = alpha_bar(t), alpha_bar(after)
        alpha = bar / bar_after
        found = predict(x, t.expand(len(x)))
        x = (x - (1 - alpha) / (1 - bar).sqrt() * found) / alpha.sqrt()
        if after > 0:
            x = x + ((1 - alpha) * (1 - bar_after) / (1 - bar)).sqrt() * torch.randn(x.shape, generator=generator)
    return x


@torch.no_grad()
def initialise(network: UNet) -> None:
    """First weights with which the network predicts, nearly, its own input.

    That is the right answer where there is only noise, and it has to be given to within a hundredth. The norm after
    the embedding would take away the input's scale; a bias that is large beside the input keeps it."""
    for block in network.modules():
        match block:
            case ResBlock():
                block.channelwise[4].weight.zero_()
                block.channelwise[4].bias.zero_()
            case AttentionBlock():
                block.attention.to_out[0].weight.zero_()
                block.attention.to_out[0].bias.zero_()
            case TimestepBlock():
                for name in block.names:
                    block.get_submodule(name).weight.zero_()
                    block.get_submodule(name).bias.zero_()
            case SizeKeepingSwitch():
                for layer in block.blocks:
                    if isinstance(layer, nn.Conv2d):
                        nn.init.dirac_(layer.weight)
                        layer.bias.zero_()
    embedding = network.embedding[1]
    width, channels = embedding.weight.shape[:2]
    directions = torch.linalg.qr(torch.randn(width, channels))[0] * math.sqrt(width / channels) * 0.5
    embedding.weight.copy_(directions[:, :, None, None])
    constant = 1.5 * torch.sign(torch.randn(width))
    embedding.bias.copy_(constant - constant.mean())
    if network.config.switch_level is None:
        _carry_skip(network.up_blocks[-1][0])
        for mapper in network.up_repeat_mappers.modules():
            if isinstance(mapper, nn.Conv2d):
                nn.init.dirac_(mapper.weight)
                mapper.bias.zero_()
        # What else is added to the embedded sample keeps out of its way.
        basis = torch.linalg.qr(torch.cat([directions, torch.ones(width, 1)], dim=1))[0]
        rest = torch.eye(width) - basis @ basis.T
        for mapper in (network.effnet_mapper[2], network.pixels_mapper[2]):
            mapper.weight.copy_(torch.einsum("oc,cihw->oihw", rest, mapper.weight))
            mapper.bias.copy_(rest @ mapper.bias)
        upscaler = network.up_upscalers[-2][1]
        upscaler.weight.copy_(torch.einsum("oc,ichw->iohw", rest, upscaler.weight))
        upscaler.bias.copy_(rest @ upscaler.bias)


@torch.no_grad()
def fit_head(network: UNet, predict: Predict, shape: tuple[int, ...]) -> None:
    """Set the head, a 1x1 convolution, so that `predict` gives back pure noise of `shape` as nearly as it can."""
    features: list[Tensor] = []
    hook = network.clf[1].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    noise = torch.randn(shape)
    predict(noise, torch.ones(shape[0]))
    hook.remove()
    rows = features[0].permute(0, 2, 3, 1).flatten(0, 2)  # (n, width)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    patch = network.config.patch_size
    wanted = nn.functional.pixel_unshuffle(noise, patch).permute(0, 2, 3, 1).flatten(0, 2)
    ridge = 1e-4 * len(rows) * torch.eye(rows.shape[1])
    found = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)  # (width + 1, channels)
    network.clf[1].weight.copy_(found[:-1].T[:, :, None, None])
    network.clf[1].bias.copy_(found[-1])


def _carry_skip(block: ResBlock) -> None:
    """Add the skip to what goes through: gelu(a) - gelu(-a) is a."""
    first, last = block.channelwise[0], block.channelwise[4]
    width = last.weight.shape[0]
    place = torch.arange(width)
    for sign, row in ((1.0, 2 * place), (-1.0, 2 * place + 1)):
        first.weight[row] = 0.0
        first.weight[row, width + place] = sign
        first.bias[row] = 0.0
        last.weight[place, row] = sign


class BiasedAttention(Attention):
    """Attention in which some context rows count several times.

    All padding rows of a prompt from row 24 on are equal, so training computes one of them and adds the logarithm of
    their number to its scores."""

    bias: Tensor | None = None  # (m,) for a context of m rows

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        made = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        y: Tensor = self.to_out(made.transpose(1, 2).flatten(2))
        return y


def count_rows(network: UNet, bias: Tensor) -> None:
    """Make every attention of `network` count its context rows as `bias` says."""
    for block in network.modules():
        if isinstance(block, Attention):
            block.__class__ = BiasedAttention
            block.bias = bias[None, None, None]  # type: ignore[assignment]

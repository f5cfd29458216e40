"""The blocks that prior and decoder are made of; attribute names are the key names of the diffusers layout."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPSILON = 1e-6  # used by every norm in prior, decoder and vqgan, and by the division of the GRN


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image, without weights: (B, c, h, w) to (B, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), eps=NORM_EPSILON)  # (B, h, w, c)
        return x.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Scales channels by their energy over the image, relative to the other channels: (B, h, w, c) to (B, h, w, c).

    The layer comes from ConvNeXt V2 (arXiv:2301.00808, section 3.2). Its norm runs over height and width, so every
    output depends on the whole image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (B, 1, 1, c)
        relative = energy / (energy.mean(dim=-1, keepdim=True) + NORM_EPSILON)
        # The order of these sums is part of the network: in half precision another order rounds differently.
        y: Tensor = self.gamma * (x * relative) + self.beta + x
        return y


class ResBlock(nn.Module):
    """Depthwise convolution, then a perceptron per pixel that takes the skip as further channels.

    `x` (B, c, h, w) and `skip` (B, c_skip, h, w) give (B, c, h, w); `skip` is None where `skip_channels` is 0.
    """

    def __init__(self, channels: int, skip_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = ChannelNorm(channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels + skip_channels, channels * 4),
            nn.GELU(),
            GlobalResponseNorm(channels * 4),
            nn.Identity(),  # dropout in training; keeps the number of the layer after it
            nn.Linear(channels * 4, channels),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(self.depthwise(x))
        if skip is not None:
            y = torch.cat([y, skip], dim=1)  # (B, c + c_skip, h, w)
        y = x + self.channelwise(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class TimestepBlock(nn.Module):
    """Scales and shifts channels by the timestep and further scalar conditions.

    `x` (B, c, h, w) and `time` (B, (1 + conditions) * e), one embedding of e values each, give (B, c, h, w).
    """

    def __init__(self, channels: int, embedding_dim: int, conditions: tuple[str, ...]) -> None:
        super().__init__()
        self.names = ("mapper", *(f"mapper_{condition}" for condition in conditions))
        for name in self.names:
            self.add_module(name, nn.Linear(embedding_dim, channels * 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        parts = time.chunk(len(self.names), dim=1)
        mapped: list[Tensor] = [self.get_submodule(name)(part) for name, part in zip(self.names, parts, strict=True)]
        scale, shift = sum(mapped[1:], mapped[0])[:, :, None, None].chunk(2, dim=1)  # (B, c, 1, 1)
        return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention with queries `x` (B, n, c) and keys `context` (B, m, c), without a mask.

    Padding tokens therefore take part."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y: Tensor = self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))
        return y


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v per head of d channels: q (B, n, c), k and v (B, m, c) to (B, n, c).

    `mask` broadcasts to (B, heads, n, m), True where attention is allowed.
    """
    q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))  # (B, heads, n or m, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class AttentionBlock(nn.Module):
    """Attention of pixels over pixels and conditioning: x (B, c, h, w), clip (B, s, c_cond) to (B, c, h, w)."""

    def __init__(self, channels: int, conditioning_dim: int, heads: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.attention = Attention(channels, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(conditioning_dim, channels))

    def forward(self, x: Tensor, clip: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, h*w, c)
        context = torch.cat([pixels, self.kv_mapper(clip)], dim=1)  # (B, h*w + s, c)
        y: Tensor = self.attention(pixels, context)
        return x + y.transpose(1, 2).reshape(x.shape)


class SizeKeepingSwitch(nn.Module):
    """A change of width between two levels of equal size (``switch_level`` false): a 1x1 convolution.

    `blocks` has a second entry because the layout counts the resampling of a true ``switch_level``. `index` is the
    place of the convolution: 0 on the way down, 1 on the way up.
    """

    def __init__(self, in_channels: int, out_channels: int, index: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Identity(), nn.Identity())
        self.blocks[index] = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def image_mapper(in_channels: int, width: int) -> nn.Sequential:
    """Maps a conditioning image (B, in_channels, h, w) to the embedded sample's width, (B, width, h, w)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width * 4, kernel_size=1),
        nn.GELU(),
        nn.Conv2d(width * 4, width, kernel_size=1),
        ChannelNorm(width),
    )


def resize(x: Tensor, like: Tensor) -> Tensor:
    """`x` (B, c, h, w) in the height and width of `like`, bilinear with aligned corners, in the dtype of `x`.

    The result is `x` bit for bit where the sizes are equal, so callers need no branch.
    """
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)

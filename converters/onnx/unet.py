"""What prior and decoder share: embeddings, the three kinds of block, and the pyramid they form.

Semantics: diffusers ``StableCascadeUNet`` (models/unets/unet_stable_cascade.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ...schemas.errors import ExportError
from ...schemas.stages import Block, UNetConfig
from .builder import Graph
from .layers import Image, attention, convolution, normalised, pixel_shuffle, pointwise, resized, transposed_convolution

NORM_EPS = 1e-6  # of the LayerNorms and of the response normalisation's quotient
MAX_POSITIONS = 10000
# Where torch's float32 exp (MKL, hence x86) is not the float nearest to the true value, and by how many units;
# by size of the embedding. The releases have 64. With AVX2 instructions entry 22 is another one.
TORCH_EXP_MISSES: Mapping[int, Mapping[int, int]] = {64: {24: -1}}


@dataclass(frozen=True)
class Conditions:
    """What a block may look at besides its image."""

    timestep: str  # (B, e): embedding of timestep_ratio
    tokens: str  # (B*S, conditioning_dim): normalised clip tokens after SiLU, the same for every kv_mapper


def check_supported(config: UNetConfig) -> None:
    """Raises ExportError naming the settings that no release uses and no graph is written for."""
    embedding = config.timestep_ratio_embedding_dim
    levels = zip(config.num_attention_heads, config.block_out_channels, strict=True)
    attending = [pair for level, pair in enumerate(levels) if config.has_attention(level)]
    reasons = {
        "self_attn is false": not config.self_attn,
        "switch_level has a true entry": any(config.switch_level or ()),
        "kernel_size is even": config.kernel_size % 2 == 0,
        "timestep_ratio_embedding_dim is odd or less than 4": embedding % 2 != 0 or embedding < 4,
        "num_attention_heads does not divide block_out_channels": any(n < 1 or width % n for n, width in attending),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ExportError(f"{config.stage}: no graph can be written for its config: {'; '.join(found)}")


def timestep_frequencies(size: int) -> np.ndarray:
    """float32 (1, size/2): exp(-i ln(10000) / (size/2 - 1)), in the bits that torch computes for size 64.

    Bits matter, as angles reach 10000: one unit in the last place of a frequency near 1 turns its angle by 6e-4."""
    half = size // 2
    step = np.float32(-math.log(MAX_POSITIONS) / (half - 1))
    exponents = np.arange(half, dtype=np.float32) * step
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    for index, units in TORCH_EXP_MISSES.get(size, {}).items():
        frequencies.view(np.int32)[index] += units
    return frequencies[None]


def timestep_embedding(graph: Graph, config: UNetConfig, ratio: str) -> str:
    """(B,) -> (B, e): sines, then cosines, of the ratio at geometrically falling frequencies."""
    size = config.timestep_ratio_embedding_dim
    name = "timestep_embedding"
    position = graph.node("Mul", f"{name}/position", ratio, graph.scalar(MAX_POSITIONS))
    column = graph.node("Reshape", f"{name}/column", position, graph.integers(-1, 1))
    frequencies = graph.constant(f"{name}/frequencies", timestep_frequencies(size))
    angle = graph.node("Mul", f"{name}/angle", column, frequencies)  # (B, e/2)
    sine, cosine = graph.node("Sin", f"{name}/sin", angle), graph.node("Cos", f"{name}/cos", angle)
    return graph.node("Concat", name, sine, cosine, axis=1)


def zero_embedding(graph: Graph, config: UNetConfig) -> str:
    """(1, e): the embedding of the conditions sca and crp, which are 0 in every pipeline; sin 0 = 0, cos 0 = 1."""
    half = config.timestep_ratio_embedding_dim // 2
    return graph.constant("timestep_embedding/zero", np.repeat(np.array([[0, 1]], np.float32), half, axis=1))


def conditions(graph: Graph, config: UNetConfig, ratio: str, tokens: str) -> Conditions:
    """What the blocks look at; `tokens` are the mapped clip tokens (B, S, conditioning_dim)."""
    width = config.conditioning_dim
    normed = graph.layer_norm("clip_norm", tokens, width, eps=NORM_EPS)
    return Conditions(
        timestep=timestep_embedding(graph, config, ratio),
        tokens=graph.rows(graph.silu("clip_norm/silu", normed), width),
    )


def pooled_tokens(graph: Graph, config: UNetConfig) -> str:
    """clip_text_pooled (B, 1, p) -> (B, clip_seq, conditioning_dim)"""
    rows = graph.rows("clip_text_pooled", config.clip_text_pooled_in_channels)
    mapped = graph.linear("clip_txt_pooled_mapper", rows)
    shape = graph.integers(-1, config.clip_seq, config.conditioning_dim)
    return graph.node("Reshape", "clip_txt_pooled_mapper/tokens", mapped, shape)


def embed(graph: Graph, config: UNetConfig, sample: str) -> Image:
    """(B, in, H, W) -> (B, c, H/p, W/p). PixelUnshuffle and the 1x1 convolution after it are one convolution with
    stride p: unshuffled channels count (in, dy, dx), which is how the weight's bytes lie."""
    patch, width = config.patch_size, config.block_out_channels[0]
    dims = (width, config.in_channels, patch, patch)
    embedded = convolution(graph, "embedding.1", sample, width, dims=dims, strides=[patch, patch])
    return normalised(graph, "embedding.2", embedded, NORM_EPS)


def classify(graph: Graph, config: UNetConfig, image: Image, output: str) -> str:
    """(B, c, H/p, W/p) -> `output` (B, out, H, W)"""
    image = pointwise(graph, "clf.1", normalised(graph, "clf.0", image, NORM_EPS))
    return pixel_shuffle(graph, output, image, config.patch_size)


@dataclass(frozen=True)
class Pyramid:
    """The levels on the way down and up again, with everything their blocks need."""

    graph: Graph
    config: UNetConfig
    conditions: Conditions

    def write(self, image: Image) -> Image:
        """The embedded image through all levels; size and channels stay."""
        config = self.config
        skips = []
        for level in range(config.levels):
            if level > 0:
                image = self._downscaled(level, image)
            layers, passes = config.down_num_layers_per_block[level], config.down_blocks_repeat_mappers[level]
            image = self._level("down", level, level, layers, passes, image, None)
            skips.append(image)
        for position, level in enumerate(reversed(range(config.levels))):
            layers, passes = config.up_num_layers_per_block[position], config.up_blocks_repeat_mappers[position]
            skip = skips[level] if position > 0 else None
            image = self._level("up", position, level, layers, passes, image, skip)
            if level > 0:
                image = self._upscaled(position, level, image)
        return image

    def _downscaled(self, level: int, image: Image) -> Image:
        name = f"down_downscalers.{level}"
        normed = normalised(self.graph, f"{name}.0", image, NORM_EPS)
        if self.config.switch_level is not None:
            return pointwise(self.graph, f"{name}.1.blocks.0", normed)
        return convolution(self.graph, f"{name}.1", normed.first, self.config.block_out_channels[level], strides=[2, 2])

    def _upscaled(self, position: int, level: int, image: Image) -> Image:
        name = f"up_upscalers.{position}"
        normed = normalised(self.graph, f"{name}.0", image, NORM_EPS)
        if self.config.switch_level is not None:
            return pointwise(self.graph, f"{name}.1.blocks.1", normed)
        width = self.config.block_out_channels[level - 1]
        return transposed_convolution(self.graph, f"{name}.1", normed, width, strides=[2, 2])

    def _level(
        self, way: str, position: int, level: int, layers: int, passes: int, image: Image, skip: Image | None
    ) -> Image:
        """All blocks of a level, `passes` times over the same weights with a mapper between two passes."""
        kinds = self.config.block_types_per_layer[level]
        for i in range(passes):
            with self.graph.repeated(i):
                for index in range(layers * len(kinds)):
                    block = BLOCKS[kinds[index % len(kinds)]]
                    image = block(self, f"{way}_blocks.{position}.{index}", level, image, skip if index == 0 else None)
            if i < passes - 1:
                image = pointwise(self.graph, f"{way}_repeat_mappers.{position}.{i}", image)
        return image


def _res_block(pyramid: Pyramid, name: str, level: int, image: Image, skip: Image | None) -> Image:
    graph = pyramid.graph
    if skip is not None:
        # diffusers resizes only where sizes differ; where they agree this Resize is a copy. Levels of odd size need it.
        image = resized(graph, f"{name}/resized", image, skip.size)
    pads = [pyramid.config.kernel_size // 2] * 4
    hidden = convolution(
        graph, f"{name}.depthwise", image.first, image.channels, size=image.size, group=image.channels, pads=pads
    )
    hidden = normalised(graph, f"{name}.norm", hidden, NORM_EPS)
    if skip is not None:
        joined = graph.node("Concat", f"{name}/joined", hidden.last, skip.last, axis=3)
        hidden = hidden.with_last(joined, hidden.channels + skip.channels)
    rows = graph.linear(f"{name}.channelwise.0", hidden.rows)
    rows = graph.node("Gelu", f"{name}.channelwise.1", rows)
    rows = _response_norm(graph, f"{name}.channelwise.2", rows, graph.width(f"{name}.channelwise.0"))
    hidden = image.with_rows(graph.linear(f"{name}.channelwise.4", rows))
    return image.with_last(graph.node("Add", name, hidden.last, image.last))


def _response_norm(graph: Graph, name: str, rows: str, width: int) -> str:
    """GlobalResponseNorm of ConvNeXt V2 (https://arxiv.org/abs/2301.00808), (B*h*w, c) -> (B*h*w, c).

    gamma * (x * n) + beta + x, written as x * (gamma * n + 1) + beta: the first factor is one number per channel.
    The norm over h*w is spelt out because onnxruntime sums along a middle axis fast in ReduceSum only."""
    tokens = graph.node("Reshape", f"{name}/tokens", rows, graph.shape(graph.batch, -1, width))  # (B, h*w, c)
    squares = graph.node("Mul", f"{name}/squares", tokens, tokens)
    sums = graph.node("ReduceSum", f"{name}/sums", squares, graph.integers(1), keepdims=1)  # (B, 1, c)
    norm = graph.node("Sqrt", f"{name}/norm", sums)
    mean = graph.node("ReduceMean", f"{name}/mean", norm, graph.integers(-1), keepdims=1)  # (B, 1, 1)
    divisor = graph.node("Add", f"{name}/divisor", mean, graph.scalar(NORM_EPS))
    response = graph.node("Div", f"{name}/response", norm, divisor)
    scaled = graph.node("Mul", f"{name}/scaled", response, graph.weight(f"{name}.gamma", (width,)))
    gain = graph.node("Add", f"{name}/gain", scaled, graph.scalar(1.0))
    gained = graph.node("Mul", f"{name}/gained", tokens, gain)
    return graph.rows(graph.node("Add", name, gained, graph.weight(f"{name}.beta", (width,))), width)


def _timestep_block(pyramid: Pyramid, name: str, level: int, image: Image, skip: Image | None) -> Image:
    """x * (1 + a) + b, with a and b from the timestep and from the conditions, whose part is constant."""
    graph = pyramid.graph
    shift = graph.linear(f"{name}.mapper", pyramid.conditions.timestep)  # (B, 2c)
    for condition in pyramid.config.timestep_conditioning_type:
        constant = graph.linear(f"{name}.mapper_{condition}", zero_embedding(graph, pyramid.config))  # (1, 2c)
        shift = graph.node("Add", f"{name}/with_{condition}", shift, constant)
    shape = graph.integers(-1, 1, 1, 2 * image.channels)
    a, b = graph.split(f"{name}/ab", graph.node("Reshape", f"{name}/channels", shift, shape), axis=3, parts=2)
    gain = graph.node("Add", f"{name}/gain", a, graph.scalar(1.0))
    return image.with_last(graph.node("Add", name, graph.node("Mul", f"{name}/scaled", image.last, gain), b))


def _attention_block(pyramid: Pyramid, name: str, level: int, image: Image, skip: Image | None) -> Image:
    """Image tokens attend to themselves and to the clip tokens, in one softmax."""
    graph, width = pyramid.graph, image.channels
    normed = normalised(graph, f"{name}.norm", image, NORM_EPS)
    shape = graph.shape(graph.batch, -1, width)
    mapped = graph.linear(f"{name}.kv_mapper.1", pyramid.conditions.tokens)
    own = graph.node("Reshape", f"{name}/own", normed.last, shape)  # (B, h*w, c)
    given = graph.node("Reshape", f"{name}/given", mapped, shape)  # (B, S, c)
    keys = graph.node("Concat", f"{name}/keys", own, given, axis=1)
    out = attention(
        graph,
        f"{name}.attention",
        normed.rows,
        graph.rows(keys, width),
        width,
        pyramid.config.num_attention_heads[level],
        projections=("to_q", "to_k", "to_v", "to_out.0"),
    )
    return image.with_last(graph.node("Add", name, image.last, image.with_rows(out).last))


BLOCKS: Mapping[Block, Callable[[Pyramid, str, int, Image, Image | None], Image]] = {
    Block.RES: _res_block,
    Block.TIMESTEP: _timestep_block,
    Block.ATTENTION: _attention_block,
}

"""The parts that prior and decoder share: embeddings, the three kinds of block, and the pyramid they form.

Semantics: diffusers ``StableCascadeUNet`` (models/unets/unet_stable_cascade.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx import TensorProto

from ...schemas.errors import ExportError
from ...schemas.stages import Block, UNetConfig
from .conditions import Conditions
from .graph import Graph
from .layers import Image, attend, convolution, normalised, pixel_shuffle, pointwise, resized, transposed_convolution
from .streams import NORM_EPS, Streams

OUTERMOST = "down_blocks.0"


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


def embed(graph: Graph, config: UNetConfig, streams: Streams, sample: str) -> Image:
    """(B, in, H, W) -> (B, c, H/p, W/p). PixelUnshuffle and the 1x1 convolution after it are one convolution with
    stride p: unshuffled channels count (in, dy, dx), which is how the weight's bytes lie."""
    patch, width = config.patch_size, config.block_out_channels[0]
    dims = (width, config.in_channels, patch, patch)
    embedded = convolution(graph, "embedding.1", sample, width, dims=dims, strides=[patch, patch])
    return normalised(graph, "embedding.2", embedded, out=streams.of(OUTERMOST))


def classify(graph: Graph, config: UNetConfig, streams: Streams, image: Image, output: str) -> str:
    """(B, c, H/p, W/p) -> `output` (B, out, H, W)"""
    normed = normalised(graph, "clf.0", image, exponent=streams.of(f"up_blocks.{config.levels - 1}"))
    return pixel_shuffle(graph, output, pointwise(graph, "clf.1", normed), config.patch_size)


@dataclass(frozen=True)
class Pyramid:
    """The levels on the way down and up again, with everything their blocks need.

    `control` is the ControlNet residual for a residual block by its number in the order they run."""

    graph: Graph
    config: UNetConfig
    streams: Streams
    conditions: Conditions
    control: Mapping[str, str]

    def write(self, image: Image) -> Image:
        """The embedded image through all levels; size and channels stay."""
        config = self.config
        skips: list[Skip] = []
        for level in range(config.levels):
            if level > 0:
                image = self._downscaled(level, image)
            layers, passes = config.down_num_layers_per_block[level], config.down_blocks_repeat_mappers[level]
            image = self._level("down", level, level, layers, passes, image, None)
            skips.append(Skip(image, self.streams.of(f"down_blocks.{level}")))
        for position, level in enumerate(reversed(range(config.levels))):
            layers, passes = config.up_num_layers_per_block[position], config.up_blocks_repeat_mappers[position]
            skip = skips[level] if position > 0 else None
            image = self._level("up", position, level, layers, passes, image, skip)
            if level > 0:
                image = self._upscaled(position, level, image)
        return image

    def _downscaled(self, level: int, image: Image) -> Image:
        name = f"down_downscalers.{level}"
        out = self.streams.of(f"down_blocks.{level}")
        normed = self._normed_between(f"{name}.0", image, f"down_blocks.{level - 1}", out)
        if self.config.switch_level is not None:
            return pointwise(self.graph, f"{name}.1.blocks.0", normed, bias_exponent=out)
        width = self.config.block_out_channels[level]
        return convolution(self.graph, f"{name}.1", normed.first, width, strides=[2, 2], bias_exponent=out)

    def _upscaled(self, position: int, level: int, image: Image) -> Image:
        name = f"up_upscalers.{position}"
        out = self.streams.of(f"up_blocks.{position + 1}")
        normed = self._normed_between(f"{name}.0", image, f"up_blocks.{position}", out)
        if self.config.switch_level is not None:
            return pointwise(self.graph, f"{name}.1.blocks.1", normed, bias_exponent=out)
        width = self.config.block_out_channels[level - 1]
        return transposed_convolution(self.graph, f"{name}.1", normed, width, strides=[2, 2], bias_exponent=out)

    def _normed_between(self, name: str, image: Image, stream: str, out: int) -> Image:
        """The norm before a resampling: from one stream's exponent to the next one's."""
        return normalised(self.graph, name, image, exponent=self.streams.of(stream), out=out)

    def _level(
        self, way: str, position: int, level: int, layers: int, passes: int, image: Image, skip: "Skip | None"
    ) -> Image:
        """All blocks of a level, `passes` times over the same weights with a mapper between two passes."""
        kinds = self.config.block_types_per_layer[level]
        exponent = self.streams.of(f"{way}_blocks.{position}")
        for i in range(passes):
            with self.graph.repeated(i):
                for index in range(layers * len(kinds)):
                    block = BLOCKS[kinds[index % len(kinds)]]
                    image = block(self, f"{way}_blocks.{position}.{index}", level, image, skip if index == 0 else None)
                    self.graph.probe(image.last)
            if i < passes - 1:
                mapper = f"{way}_repeat_mappers.{position}.{i}"
                image = pointwise(self.graph, mapper, image, bias_exponent=exponent)
        return image


@dataclass(frozen=True)
class Skip:
    """The skip connection from the way down to a level on the way up, and the exponent of its values."""

    image: Image
    exponent: int


def _res_block(pyramid: Pyramid, name: str, level: int, image: Image, skip: Skip | None) -> Image:
    graph, exponent = pyramid.graph, pyramid.streams.of_block(name)
    image = _controlled(pyramid, name, image, exponent)
    if skip is not None:
        # diffusers resizes only where sizes differ; where they agree this Resize is a copy. Levels of odd size need it.
        image = resized(graph, f"{name}/resized", image, skip.image.size)
    pads = [pyramid.config.kernel_size // 2] * 4
    hidden = convolution(
        graph,
        f"{name}.depthwise",
        image.first,
        image.channels,
        size=image.size,
        bias_exponent=exponent,
        group=image.channels,
        pads=pads,
    )
    # What is joined to the skip is made as small as that is, and their product as much larger again.
    small = skip.exponent if skip is not None else 0
    hidden = normalised(graph, f"{name}.norm", hidden, exponent=exponent, out=small)
    if skip is not None:
        joined = graph.node("Concat", f"{name}/joined", hidden.last, skip.image.last, axis=3)
        hidden = hidden.with_last(joined, hidden.channels + skip.image.channels)
    rows = _perceptron(pyramid, name, hidden.rows, small, exponent)
    return image.with_last(graph.node("Add", name, image.with_rows(rows).last, image.last))


def _controlled(pyramid: Pyramid, name: str, image: Image, exponent: int) -> Image:
    """The image plus the ControlNet's residual for this block, resized to it, where there is one."""
    graph, port = pyramid.graph, pyramid.control.get(name)
    if port is None:
        return image
    residual = resized(graph, f"{name}/control", Image(graph, image.channels, first=port), image.size)
    if exponent:
        small = graph.node("Mul", f"{name}/small_control", residual.last, graph.scalar(2.0**-exponent))
        residual = residual.with_last(small)
    return image.with_last(graph.node("Add", f"{name}/controlled", image.last, residual.last))


def _perceptron(pyramid: Pyramid, name: str, rows: str, small: int, exponent: int) -> str:
    """channelwise of rows at 2^-small of what is meant, to 2^-exponent: (n, in) -> (n, c); in fp32 if so chosen."""
    graph, layer = pyramid.graph, f"{name}.channelwise"
    if graph.halved and name in graph.options.fp32_blocks:
        wide = graph.to_float(rows)
        with graph.island():
            result = _layers_of_perceptron(graph, layer, wide, small, exponent)
        return graph.node("Cast", f"{layer}.4/narrow", result, to=graph.type)
    return _layers_of_perceptron(graph, layer, rows, small, exponent)


def _layers_of_perceptron(graph: Graph, layer: str, rows: str, small: int, exponent: int) -> str:
    rows = graph.linear(f"{layer}.0", rows, alpha=2.0**small)
    graph.probe(rows)
    rows = graph.node("Gelu", f"{layer}.1", rows)
    graph.probe(rows)
    rows = _response_norm(graph, f"{layer}.2", rows, graph.width(f"{layer}.0"), exponent)
    graph.probe(rows)
    return graph.linear(f"{layer}.4", rows, bias_exponent=exponent)


def _response_norm(graph: Graph, name: str, rows: str, width: int, exponent: int) -> str:
    """2^-exponent of the GlobalResponseNorm of ConvNeXt V2 (https://arxiv.org/abs/2301.00808), (B*h*w, c) to the same.

    gamma * (x * n) + beta + x, written as x * (gamma * n + 1) + beta: the first factor is one number per channel.
    The norm over h*w, in fp32 always, is spelt out because onnxruntime sums along a middle axis fast in ReduceSum
    only."""
    tokens = graph.node("Reshape", f"{name}/tokens", rows, graph.shape(graph.batch, -1, width))  # (B, h*w, c)
    inside = graph.type
    wide = graph.to_float(tokens) if inside != TensorProto.FLOAT else tokens
    with graph.island():
        squares = graph.node("Mul", f"{name}/squares", wide, wide)
        sums = graph.node("ReduceSum", f"{name}/sums", squares, graph.integers(1), keepdims=1)  # (B, 1, c)
        norm = graph.node("Sqrt", f"{name}/norm", sums)
        mean = graph.node("ReduceMean", f"{name}/mean", norm, graph.integers(-1), keepdims=1)  # (B, 1, 1)
        divisor = graph.node("Add", f"{name}/divisor", mean, graph.scalar(NORM_EPS))
        response = graph.node("Div", f"{name}/response", norm, divisor)
        scaled = graph.node("Mul", f"{name}/scaled", response, graph.weight(f"{name}.gamma", (width,)))
        gain = graph.node("Add", f"{name}/gain", scaled, graph.scalar(1.0))
        if exponent:
            gain = graph.node("Mul", f"{name}/small_gain", gain, graph.scalar(2.0**-exponent))
    gain = gain if inside == TensorProto.FLOAT else graph.to_compute(gain)
    gained = graph.node("Mul", f"{name}/gained", tokens, gain)
    shift = graph.scaled_weight(f"{name}.beta", exponent, (width,))
    return graph.rows(graph.node("Add", name, gained, shift), width)


def _timestep_block(pyramid: Pyramid, name: str, level: int, image: Image, skip: Skip | None) -> Image:
    """x * (1 + a) + b, with a and b from the timestep."""
    graph = pyramid.graph
    gain, shift = pyramid.conditions.modulation(name, image.channels)
    return image.with_last(graph.node("Add", name, graph.node("Mul", f"{name}/scaled", image.last, gain), shift))


def _attention_block(pyramid: Pyramid, name: str, level: int, image: Image, skip: Skip | None) -> Image:
    """Image tokens attend to themselves and to the conditioning tokens, in one softmax."""
    graph, width, exponent = pyramid.graph, image.channels, pyramid.streams.of_block(name)
    own = normalised(graph, f"{name}.norm", image, exponent=exponent).rows
    qkv = pyramid.conditions.attended(name, width, own)
    mixed = attend(graph, f"{name}.attention", qkv, width, pyramid.config.num_attention_heads[level])
    out = f"{name}.attention.to_out.0"
    rows = graph.linear(out, graph.rows(mixed, width), exponent=exponent, bias_exponent=exponent)
    return image.with_last(graph.node("Add", name, image.last, image.with_rows(rows).last))


BLOCKS: Mapping[Block, Callable[[Pyramid, str, int, Image, Skip | None], Image]] = {
    Block.RES: _res_block,
    Block.TIMESTEP: _timestep_block,
    Block.ATTENTION: _attention_block,
}

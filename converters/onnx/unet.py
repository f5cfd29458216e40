"""The parts that prior and decoder share: embeddings, the three kinds of block, and the pyramid they form.

Semantics: diffusers ``StableCascadeUNet`` (models/unets/unet_stable_cascade.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...schemas.errors import ExportError
from ...schemas.stages import Block, UNetConfig
from ...schemas.unet_blocks import UNetBlock, blocks_of, next_blocks
from .conditions import Conditions
from .graph import Graph
from .layers import (
    AttentionInputs,
    Image,
    attend,
    convolution,
    linear_sum,
    normalised,
    normalised_convolution,
    normalised_sum,
    pixel_shuffle,
    pointwise,
    resized,
    transposed_convolution,
)
from .response_norm import responding_linear
from .streams import Streams

OUTERMOST = "down_blocks.0"


def check_supported(config: UNetConfig) -> None:
    """Raises ExportError for settings that no release uses and that no graph can be written for."""
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
    """(B, in, H, W) -> (B, c, H/p, W/p).

    PixelUnshuffle and the 1x1 convolution after it are written as one convolution with stride p. The unshuffled
    channels count (in, dy, dx), which is the order of the weight's bytes."""
    patch, width = config.patch_size, config.block_out_channels[0]
    dims = (width, config.in_channels, patch, patch)
    embedded = convolution(graph, "embedding.1", sample, width, dims=dims, strides=[patch, patch])
    return normalised(graph, "embedding.2", embedded, out=streams.of(OUTERMOST))


@dataclass(frozen=True)
class Pyramid:
    """The levels on the way down and up again, with everything their blocks need.

    `control` maps the names of residual blocks to the ports of their ControlNet residuals."""

    graph: Graph
    config: UNetConfig
    streams: Streams
    conditions: Conditions
    control: Mapping[str, str] = field(default_factory=dict)

    def write(self, image: Image) -> None:
        """Write all levels and the output noise_pred (B, out, H, W), from the embedded image (B, c, H/p, W/p)."""
        image = self._through_levels(image)
        exponent = self.streams.of(f"up_blocks.{self.config.levels - 1}")
        normed = normalised(self.graph, "clf.0", image, exponent=exponent)
        pixel_shuffle(self.graph, "noise_pred", pointwise(self.graph, "clf.1", normed), self.config.patch_size)

    def _through_levels(self, image: Image) -> Image:
        config = self.config
        skips: list[Skip] = []
        for level in range(config.levels):
            if level > 0:
                image = self._downscaled(level, image)
            image = self._passes("down", level, image)
            skips.append(Skip(image, self.streams.of(f"down_blocks.{level}")))
        for position, level in enumerate(reversed(range(config.levels))):
            image = self._passes("up", position, image, skips[level] if position > 0 else None)
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

    def _passes(self, way: str, position: int, image: Image, skip: "Skip | None" = None) -> Image:
        """All blocks of ``way_blocks.position``, in one or more passes with a mapper between two of them."""
        stream = f"{way}_blocks.{position}"
        blocks = [block for block in blocks_of(self.config) if block.name.startswith(f"{stream}.")]
        passes = getattr(self.config, f"{way}_blocks_repeat_mappers")[position]
        for i in range(passes):
            with self.graph.repeated(i):
                for block in blocks:
                    image = BLOCKS[block.kind](self, block, image, skip if block is blocks[0] else None)
                    self.graph.probe(image.last)
            if i < passes - 1:
                mapper, exponent = f"{way}_repeat_mappers.{position}.{i}", self.streams.of(stream)
                image = pointwise(self.graph, mapper, image, bias_exponent=exponent)
        return image


@dataclass(frozen=True)
class Skip:
    """The skip connection from the way down to a level on the way up, and the exponent of its values."""

    image: Image
    exponent: int


def _res_block(pyramid: Pyramid, block: UNetBlock, image: Image, skip: Skip | None) -> Image:
    graph, name, exponent = pyramid.graph, block.name, pyramid.streams.of_block(block.name)
    image = _controlled(pyramid, name, image, exponent)
    if skip is not None:
        # diffusers resizes only when sizes differ; for equal sizes this Resize is a copy. Levels of odd size need it.
        image = resized(graph, f"{name}/resized", image, skip.image.size)
    pads = [pyramid.config.kernel_size // 2] * 4
    # The image gets the exponent of the skip before they are joined; the first Linear multiplies it out again.
    small = skip.exponent if skip is not None else 0
    names = (f"{name}.depthwise", f"{name}.norm")
    hidden = normalised_convolution(graph, names, image, exponent=exponent, out=small, group=image.channels, pads=pads)
    if skip is not None:
        joined = graph.node("Concat", f"{name}/joined", hidden.last, skip.image.last, axis=3)
        hidden = hidden.with_last(joined, hidden.channels + skip.image.channels)
    if pyramid.conditions.defers(name):
        layer = f"{name}.channelwise"
        rows = _layers_of_perceptron(graph, layer, hidden, small, exponent=exponent, residual=image.rows)
        return image.with_rows(rows)
    rows = _perceptron(pyramid, name, hidden, small, exponent)
    return image.with_last(graph.node("Add", name, image.with_rows(rows).last, image.last))


def _controlled(pyramid: Pyramid, name: str, image: Image, exponent: int) -> Image:
    """The image plus the ControlNet's residual for this block, resized to the image, if there is one."""
    graph, port = pyramid.graph, pyramid.control.get(name)
    if port is None:
        return image
    residual = resized(graph, f"{name}/control", Image(graph, image.channels, first=port), image.size)
    if exponent:
        small = graph.node("Mul", f"{name}/small_control", residual.last, graph.scalar(2.0**-exponent))
        residual = residual.with_last(small)
    return image.with_last(graph.node("Add", f"{name}/controlled", image.last, residual.last))


def _perceptron(pyramid: Pyramid, name: str, image: Image, small: int, exponent: int) -> str:
    """The perceptron `channelwise`, to rows (B*h*w, c); computed in fp32 for blocks in ``options.fp32_blocks``.

    `image` holds 2^-`small` of its values, the result holds 2^-`exponent`."""
    graph, layer = pyramid.graph, f"{name}.channelwise"
    if graph.halved and name in graph.options.fp32_blocks:
        wide = Image(graph, image.channels, last=graph.to_float(image.last), size=image.size)
        with graph.island():
            result = _layers_of_perceptron(graph, layer, wide, small, exponent)
        return graph.node("Cast", f"{layer}.4/narrow", result, to=graph.type)
    return _layers_of_perceptron(graph, layer, image, small, exponent)


def _layers_of_perceptron(
    graph: Graph, layer: str, image: Image, small: int, exponent: int, residual: str | None = None
) -> str:
    rows = graph.activated(f"{layer}.0", f"{layer}.1", image.rows, alpha=2.0**small)
    graph.probe(rows)
    norm_and_linear = (f"{layer}.2", f"{layer}.4")
    return responding_linear(graph, norm_and_linear, rows, image.size, exponent=exponent, residual=residual)


def _timestep_block(pyramid: Pyramid, block: UNetBlock, image: Image, skip: Skip | None) -> Image:
    """x * (1 + a) + b, with a and b from the timestep. ONNX Runtime adds b in the norm of an attention block."""
    graph, name, conditions = pyramid.graph, block.name, pyramid.conditions
    gain, shift = conditions.modulation(name, image.channels)
    scaled = graph.node("Mul", f"{name}/scaled", image.last, gain)
    after = next_blocks(pyramid.config).get(name)
    pixel = conditions.one_shift(name, image.channels) if after and after.kind is Block.ATTENTION else None
    if pixel is None or after is None:
        return image.with_last(graph.node("Add", name, scaled, shift))
    exponent = pyramid.streams.of_block(name)
    normed, total = normalised_sum(
        graph, (f"{after.name}.norm", name), image.with_last(scaled), pixel, exponent=exponent
    )
    return total.with_norm(normed)


def _attention_block(pyramid: Pyramid, block: UNetBlock, image: Image, skip: Skip | None) -> Image:
    """Image tokens attend to themselves and to the conditioning tokens, in one softmax."""
    graph, name, width = pyramid.graph, block.name, image.channels
    exponent = pyramid.streams.of_block(name)
    own = (image.norm or normalised(graph, f"{name}.norm", image, exponent=exponent)).rows
    heads = pyramid.config.num_attention_heads[block.level]
    inputs = AttentionInputs(pyramid.conditions.attended(name, width, own), width, heads)
    mixed = attend(graph, f"{name}.attention", inputs)
    names = (f"{name}.attention.to_out.0", name)
    return linear_sum(graph, names, graph.rows(mixed, width), image, exponent=exponent)


BLOCKS: Mapping[Block, Callable[[Pyramid, UNetBlock, Image, Skip | None], Image]] = {
    Block.RES: _res_block,
    Block.TIMESTEP: _timestep_block,
    Block.ATTENTION: _attention_block,
}

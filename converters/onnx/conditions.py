"""The conditions of the blocks of prior and decoder: computed inside the graph, or fed to it.

Timestep blocks ask for a gain and a shift, attention blocks for keys and values of the conditioning tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from ...schemas.hoisted import MODULATION, modulation_width, timestep_blocks
from ...schemas.precision import Target
from ...schemas.stages import Block, UNetConfig
from ...schemas.unet_blocks import UNetBlock, blocks_of, next_blocks
from .graph import Graph
from .response_norm import deferred_bias
from .streams import NORM_EPS, Streams

# CUDA's Split of more than 32 parts, or of unequal ones, sends their addresses from the host in each run. A replay of a
# captured CUDA graph would use those of the first run.
PARTS = 32
MAX_POSITIONS = 10000.0
# Entries at which torch's float32 exp (MKL, hence x86) is not the float nearest to the true value, and the difference
# in units in the last place; by size of the embedding. The releases have size 64. With AVX2 entry 22 differs too.
TORCH_EXP_MISSES: Mapping[int, Mapping[int, int]] = {64: {24: -1}}


class Conditions(Protocol):
    """Gives each block its conditions, by the block's name and channels."""

    def modulation(self, name: str, width: int) -> tuple[str, str]:
        """Gain (1 + scale) and shift of a timestep block, (B, 1, 1, c) each. The shift has its stream's exponent."""

    def attended(self, name: str, width: int, own: str) -> tuple[str, str, str]:
        """Queries, keys and values of an attention block with the tokens `own` (B*n, c).

        The queries of `own` are (B*n, c). Keys and values of own and conditioning tokens are (B, n + tokens, c)."""

    def one_shift(self, name: str, width: int) -> str | None:
        """The shift of a timestep block as one pixel (1, 1, c), if all samples have the same."""
        return None

    def defers(self, block: str) -> bool:
        """True if the shift of the next timestep block has the bias of the residual block `block` in it."""
        return False


class Computed(Conditions):
    """Conditions that the graph computes; passes over the same blocks share them.

    `timestep` is the embedding (B, e). `tokens` are the conditioning tokens (B*tokens, channels), normalised and after
    SiLU, the same for every kv_mapper."""

    def __init__(self, graph: Graph, config: UNetConfig, streams: Streams, timestep: str, tokens: str) -> None:
        self._graph, self._config, self._streams = graph, config, streams
        self._timestep, self._tokens = timestep, tokens
        self._modulations: dict[str, tuple[str, str]] = {}
        self._given: dict[str, str] = {}

    def modulation(self, name: str, width: int) -> tuple[str, str]:
        if name not in self._modulations:
            with self._graph.repeated(0):
                self._modulations[name] = self._modulation(name, width)
        return self._modulations[name]

    def _modulation(self, name: str, width: int) -> tuple[str, str]:
        graph, shape = self._graph, self._graph.integers(-1, 1, 1, width)
        a, b = self.scale_and_shift(name, width)
        return graph.node("Reshape", f"{name}/gain", a, shape), graph.node("Reshape", f"{name}/shift", b, shape)

    def scale_and_shift(self, name: str, width: int) -> tuple[str, str]:
        """1 + scale and the shift of a timestep block, (B, c) each."""
        graph = self._graph
        with graph.island():  # constants: ONNX Runtime folds them in fp32 only
            bias = graph.weight(f"{name}.mapper.bias")
            for condition in self._config.timestep_conditioning_type:  # always 0, so its term (1, 2c) is constant
                constant = graph.linear(f"{name}.mapper_{condition}", zero_embedding(graph, self._config))
                bias = graph.node("Add", f"{name}/with_{condition}", bias, constant)
        bias = graph.to_compute(bias)
        mapped = graph.gemm(f"{name}.mapper", self._timestep, graph.weight(f"{name}.mapper.weight"), bias)
        a, b = graph.split(f"{name}/ab", mapped, axis=1, parts=2)
        exponent = self._streams.of_block(name)
        if exponent:
            b = graph.node("Mul", f"{name}/small", b, graph.scalar(2.0**-exponent))
        return graph.node("Add", f"{name}/one_more", a, graph.scalar(1.0)), b

    def attended(self, name: str, width: int, own: str) -> tuple[str, str, str]:
        """Keys and values of both kinds of token in one product."""
        graph = self._graph
        shape = graph.shape(graph.batch, -1, width)
        own_tokens = graph.node("Reshape", f"{name}/own", own, shape)  # (B, n, c)
        both = graph.node("Concat", f"{name}/both", own_tokens, self.given(name, width), axis=1)
        query = graph.linear(f"{name}.attention.to_q", own)
        key, value = graph.linears(f"{name}.attention", ("to_k", "to_v"), graph.rows(both, width))
        return query, key, value

    def given(self, name: str, width: int) -> str:
        """The conditioning tokens, mapped for one attention block: (B, tokens, c)."""
        if name not in self._given:
            graph = self._graph
            with graph.repeated(0):
                mapped = graph.linear(f"{name}.kv_mapper.1", self._tokens)
                shape = graph.shape(graph.batch, -1, width)
                self._given[name] = graph.node("Reshape", f"{name}/given", mapped, shape)
        return self._given[name]


class FedConditions(Conditions):
    """Conditions that are inputs of the graph: the ports of ``schemas.hoisted``.

    For ONNX Runtime, all samples have one modulation, and the product of a residual block adds the block's input in
    place of its bias b. The timestep block after it makes up for that: (x + b) * gain + shift is
    x * gain + (shift + b * gain)."""

    def __init__(self, graph: Graph, config: UNetConfig, streams: Streams) -> None:
        self._graph, self._config, self._streams = graph, config, streams
        self._shared = graph.options.target is Target.ORT
        self._before = dict(self._deferred()) if self._shared else {}
        self._deferring = frozenset(self._before.values())
        blocks = timestep_blocks(config)
        alike = [list(run) for _, run in groupby(blocks, lambda block: config.block_out_channels[block.level])]
        at_once = PARTS if self._before else PARTS // 2  # two Splits of each run, or one
        start = 0
        for run in (blocks[i : i + at_once] for blocks in alike for i in range(0, len(blocks), at_once)):
            end = start + 2 * config.block_out_channels[run[0].level] * len(run)
            columns = MODULATION
            if len(run) < len(blocks):
                bounds = (graph.integers(value) for value in (start, end, 1))
                columns = graph.node("Slice", f"{MODULATION}/{run[0].name}", MODULATION, *bounds)
            self._split(run, columns)
            start = end
        assert start == modulation_width(config)

    def _deferred(self) -> Iterator[tuple[str, str]]:
        """Yield timestep blocks, each with the residual block before it that can leave its bias to them."""
        options, following = self._graph.options, next_blocks(self._config)
        for block in blocks_of(self._config):
            after = following.get(block.name)
            alone = block.name in options.fp32_blocks or f"{block.name}.channelwise.4" in options.quantized
            if block.kind is Block.RES and after and after.kind is Block.TIMESTEP and not alone:
                yield after.name, block.name

    def _split(self, run: Sequence[UNetBlock], columns: str) -> None:
        """Write the rows of `run`, blocks of one width, from the columns of the modulation that are theirs."""
        graph, name = self._graph, f"{MODULATION}/{run[0].name}"
        if not self._before:
            parts = [f"{block.name}/{part}_row" for block in run for part in ("gain", "shift")]
            graph.split_equally(f"{name}/parts", columns, 1, parts)
            return
        width = self._config.block_out_channels[run[0].level]
        table = graph.node("Reshape", f"{name}/table", columns, graph.integers(len(run), 2 * width))
        gains, shifts = graph.split(f"{name}/halves", table, axis=1, parts=2)
        biases = [self._bias(block.name, width) for block in run]
        bias = graph.node("Concat", f"{name}/biases", *biases, axis=0)
        gained = graph.node("Mul", f"{name}/gained", gains, bias)
        shifts = graph.node("Add", f"{name}/shifted", shifts, gained)
        for part, rows in (("gain", gains), ("shift", shifts)):
            graph.split_equally(f"{name}/{part}s", rows, 0, [f"{block.name}/{part}_row" for block in run])

    def _bias(self, name: str, width: int) -> str:
        """(1, width): what the residual block before the timestep block `name` leaves to it."""
        before = self._before.get(name)
        if before is None:
            return self._graph.full_row(width, 0.0)
        return deferred_bias(self._graph, before, self._streams.of_block(before))

    def one_shift(self, name: str, width: int) -> str | None:
        if not self._shared:
            return None
        return self._graph.once("Reshape", f"{name}/pixel", f"{name}/shift_row", self._graph.integers(1, 1, width))

    def defers(self, block: str) -> bool:
        return block in self._deferring

    def modulation(self, name: str, width: int) -> tuple[str, str]:
        graph, shape = self._graph, self._graph.integers(-1, 1, 1, width)
        gain, shift = (graph.once("Reshape", f"{name}/{p}", f"{name}/{p}_row", shape) for p in ("gain", "shift"))
        return gain, shift

    def attended(self, name: str, width: int, own: str) -> tuple[str, str, str]:
        graph = self._graph
        shape = graph.shape(graph.batch, -1, width)
        query, *own_parts = graph.linears(f"{name}.attention", ("to_q", "to_k", "to_v"), own)
        both = []
        for part, rows in zip(("keys", "values"), own_parts, strict=True):
            tokens = graph.node("Reshape", f"{name}/own_{part}", rows, shape)  # (B, n, c)
            both.append(graph.node("Concat", f"{name}/all_{part}", tokens, f"{name}.{part}", axis=1))
        return query, both[0], both[1]


def write_conditions(graph: Graph, config: UNetConfig, conditions: Computed) -> None:
    """The outputs of a conditioning graph: `modulation` (steps, columns), and keys and values (B, tokens, c) of every
    attention block. They are the inputs of the step graph, see ``schemas.hoisted``."""
    columns = [
        part
        for block in timestep_blocks(config)
        for part in conditions.scale_and_shift(block.name, config.block_out_channels[block.level])
    ]
    graph.node("Concat", MODULATION, *columns, axis=1)
    for block in blocks_of(config):
        if block.kind is Block.ATTENTION:
            width = config.block_out_channels[block.level]
            rows = graph.rows(conditions.given(block.name, width), width)
            parts = graph.linears(f"{block.name}.attention", ("to_k", "to_v"), rows)
            shape = graph.shape(graph.batch, -1, width)
            for output, part in zip(("keys", "values"), parts, strict=True):
                graph.node("Reshape", f"{block.name}.{output}", part, shape)


def clip_tokens(graph: Graph, config: UNetConfig, tokens: str) -> str:
    """Mapped clip tokens (B, S, conditioning_dim), normalised and after SiLU: (B*S, conditioning_dim)."""
    width = config.conditioning_dim
    normed = graph.layer_norm("clip_norm", tokens, width, eps=NORM_EPS)
    return graph.rows(graph.silu("clip_norm/silu", normed), width)


def pooled_tokens(graph: Graph, config: UNetConfig) -> str:
    """clip_text_pooled (B, 1, p) -> (B, clip_seq, conditioning_dim)"""
    rows = graph.rows("clip_text_pooled", config.clip_text_pooled_in_channels)
    mapped = graph.linear("clip_txt_pooled_mapper", rows)
    shape = graph.integers(-1, config.clip_seq, config.conditioning_dim)
    return graph.node("Reshape", "clip_txt_pooled_mapper/tokens", mapped, shape)


def timestep_frequencies(size: int) -> np.ndarray:
    """float32 (1, size/2): exp(-i ln(10000) / (size/2 - 1)), bit for bit as torch computes it for size 64.

    Angles reach 10000, so one unit in the last place of a frequency near 1 changes its angle by 6e-4."""
    half = size // 2
    step = np.float32(-math.log(MAX_POSITIONS) / (half - 1))
    exponents = np.arange(half, dtype=np.float32) * step
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    for index, units in TORCH_EXP_MISSES.get(size, {}).items():
        frequencies.view(np.int32)[index] += units
    return frequencies[None]


def timestep_embedding(graph: Graph, config: UNetConfig, ratio: str) -> str:
    """(B,) fp32 -> (B, e): sines, then cosines, of the ratio at geometrically falling frequencies.

    It is always computed in fp32. diffusers multiplies by 10000 in the model's type, and bf16 rounds 9500 to 9472.
    This graph does not repeat that error, because a runtime that computes in a wider type would not repeat it."""
    name = "timestep_embedding"
    with graph.island():
        position = graph.node("Mul", f"{name}/position", ratio, graph.scalar(MAX_POSITIONS))
    column = graph.node("Reshape", f"{name}/column", position, graph.integers(-1, 1))
    frequencies = graph.constant(f"{name}/frequencies", timestep_frequencies(config.timestep_ratio_embedding_dim))
    angle = graph.node("Mul", f"{name}/angle", column, frequencies)  # (B, e/2)
    sine, cosine = graph.node("Sin", f"{name}/sin", angle), graph.node("Cos", f"{name}/cos", angle)
    return graph.to_compute(graph.node("Concat", name, sine, cosine, axis=1))


def zero_embedding(graph: Graph, config: UNetConfig) -> str:
    """(1, e) fp32: the embedding of the conditions sca and crp, always 0 in the pipelines: sin 0 = 0 and cos 0 = 1."""
    half = config.timestep_ratio_embedding_dim // 2
    return graph.constant("timestep_embedding/zero", np.repeat(np.array([[0, 1]], np.float32), half, axis=1))

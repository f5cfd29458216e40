"""Names and shapes of the layers that several networks share, and the blocks of their one backbone."""

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Entry = tuple[str, Shape]


def affine(name: str, *weight: int, out: int | None = None) -> Iterator[Entry]:
    """Weight and bias of a Linear or Conv (out channels first). A ConvTranspose gives its out channels as `out`."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[0] if out is None else out,)


def norm(name: str, width: int) -> Iterator[Entry]:
    """Weight and bias of a LayerNorm."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def batch_norm(name: str, width: int, *, learned: bool = True) -> Iterator[Entry]:
    """A BatchNorm2d: weight and bias if they are `learned`, the statistics, and the counter of steps."""
    if learned:
        yield from norm(name, width)
    yield f"{name}.running_mean", (width,)
    yield f"{name}.running_var", (width,)
    yield f"{name}.num_batches_tracked", ()


@dataclass(frozen=True)
class InvertedResidual:
    """A block of EfficientNetV2, `expansion` times wider inside than its input; `stride` is of the 3x3 convolution.

    A fused block has one 3x3 convolution in place of a 1x1, a depthwise 3x3 and squeeze-excitation."""

    path: str  # below the backbone
    fused: bool
    expansion: int
    stride: int
    into: int
    out: int

    @property
    def inner(self) -> int:
        return self.into * self.expansion

    @property
    def squeezed(self) -> int:
        """Channels between the two layers of squeeze-excitation."""
        return self.into // 4

    @property
    def has_skip(self) -> bool:
        """True when the block's input is added to its output."""
        return self.stride == 1 and self.into == self.out


# EfficientNetV2-S as in torchvision's ``efficientnet_v2_s().features``, which is Table 4 of arXiv:2104.00298: a stem,
# rows of blocks, and a 1x1 convolution. SiLU everywhere. Narrower backbones have other widths and fewer blocks.
# Channels of the stem, of each row, and of the last convolution.
EFFICIENTNET_WIDTHS = (24, 24, 48, 64, 128, 160, 256, 1280)
EFFICIENTNET_BLOCKS = (2, 4, 4, 6, 9, 15)  # of each row
EFFICIENTNET_EPSILON = 1e-3  # of every BatchNorm in it
# Each row: whether its blocks are fused, their expansion, and the stride of the first.
_ROWS = ((True, 1, 1), (True, 4, 2), (True, 4, 2), (False, 4, 2), (False, 6, 1), (False, 6, 2))
EFFICIENTNET_HEAD = str(len(_ROWS) + 1)  # the path of that 1x1 convolution; the stem's is 0


def inverted_residuals(widths: tuple[int, ...], blocks: tuple[int, ...]) -> Iterator[InvertedResidual]:
    """The blocks between stem and head in the order they run; `widths` and `blocks` as in EFFICIENTNET_WIDTHS and
    EFFICIENTNET_BLOCKS."""
    width = widths[0]
    for number, ((fused, expansion, stride), out, count) in enumerate(
        zip(_ROWS, widths[1:-1], blocks, strict=True), start=1
    ):
        for index in range(count):
            path, step = f"{number}.{index}", 1 if index else stride
            yield InvertedResidual(path, fused, expansion, stride=step, into=width, out=out)
            width = out


def efficientnet_v2(name: str, channels: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> Iterator[Entry]:
    """The backbone for images of `channels` channels; its output has ``widths[-1]`` channels."""
    yield from _conv_norm(f"{name}.0", widths[0], channels, 3)
    out = widths[0]
    for block in inverted_residuals(widths, blocks):
        yield from (_fused_block if block.fused else _block)(f"{name}.{block.path}.block", block)
        out = block.out
    yield from _conv_norm(f"{name}.{EFFICIENTNET_HEAD}", widths[-1], out, 1)


def _fused_block(name: str, block: InvertedResidual) -> Iterator[Entry]:
    if block.expansion == 1:  # nothing to contract again
        yield from _conv_norm(f"{name}.0", block.out, block.into, 3)
        return
    yield from _conv_norm(f"{name}.0", block.inner, block.into, 3)
    yield from _conv_norm(f"{name}.1", block.out, block.inner, 1)


def _block(name: str, block: InvertedResidual) -> Iterator[Entry]:
    yield from _conv_norm(f"{name}.0", block.inner, block.into, 1)
    yield from _conv_norm(f"{name}.1", block.inner, 1, 3)
    yield from affine(f"{name}.2.fc1", block.squeezed, block.inner, 1, 1)
    yield from affine(f"{name}.2.fc2", block.inner, block.squeezed, 1, 1)
    yield from _conv_norm(f"{name}.3", block.out, block.inner, 1)


def _conv_norm(name: str, out: int, into: int, kernel: int) -> Iterator[Entry]:
    """A convolution without bias and its BatchNorm."""
    yield f"{name}.0.weight", (out, into, kernel, kernel)
    yield from batch_norm(f"{name}.1", out)

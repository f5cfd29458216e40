"""Names and shapes of the layers and of the one backbone that several networks are built of."""

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Entry = tuple[str, Shape]


def affine(name: str, *weight: int, out: int | None = None) -> Iterator[Entry]:
    """Weight and bias of a Linear, Conv (out channels first) or, with `out`, a ConvTranspose."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[0] if out is None else out,)


def norm(name: str, width: int) -> Iterator[Entry]:
    """Weight and bias of a LayerNorm."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def batch_norm(name: str, width: int, *, learned: bool = True) -> Iterator[Entry]:
    """A BatchNorm2d: weight and bias if it has `learned` ones, the statistics, and the counter of its steps."""
    if learned:
        yield from norm(name, width)
    yield f"{name}.running_mean", (width,)
    yield f"{name}.running_var", (width,)
    yield f"{name}.num_batches_tracked", ()


@dataclass(frozen=True)
class _Row:
    """A run of `count` inverted residual blocks, each `expansion` times wider inside than at its entrance.
    Fused blocks have one 3x3 convolution where the others have a 1x1, a depthwise 3x3 and squeeze-excitation."""

    fused: bool
    expansion: int
    width: int
    count: int


# EfficientNetV2-S as in torchvision's ``efficientnet_v2_s().features``: a stem, these rows, a 1x1 convolution.
_STEM_WIDTH = 24
_ROWS = (
    _Row(fused=True, expansion=1, width=24, count=2),
    _Row(fused=True, expansion=4, width=48, count=4),
    _Row(fused=True, expansion=4, width=64, count=4),
    _Row(fused=False, expansion=4, width=128, count=6),
    _Row(fused=False, expansion=6, width=160, count=9),
    _Row(fused=False, expansion=6, width=256, count=15),
)
EFFICIENTNET_WIDTH = 1280


def efficientnet_v2_s(name: str, channels: int) -> Iterator[Entry]:
    """The backbone for images of `channels` channels; it gives EFFICIENTNET_WIDTH of them."""
    width = _STEM_WIDTH
    yield from _conv_norm(f"{name}.0", width, channels, 3)
    for number, row in enumerate(_ROWS, start=1):
        for index in range(row.count):
            block = f"{name}.{number}.{index}.block"
            yield from (_fused_block if row.fused else _block)(block, width, row)
            width = row.width
    yield from _conv_norm(f"{name}.{len(_ROWS) + 1}", EFFICIENTNET_WIDTH, width, 1)


def _fused_block(name: str, width: int, row: _Row) -> Iterator[Entry]:
    if row.expansion == 1:  # nothing to contract again
        yield from _conv_norm(f"{name}.0", row.width, width, 3)
        return
    inner = width * row.expansion
    yield from _conv_norm(f"{name}.0", inner, width, 3)
    yield from _conv_norm(f"{name}.1", row.width, inner, 1)


def _block(name: str, width: int, row: _Row) -> Iterator[Entry]:
    inner, squeezed = width * row.expansion, width // 4
    yield from _conv_norm(f"{name}.0", inner, width, 1)
    yield from _conv_norm(f"{name}.1", inner, 1, 3)
    yield from affine(f"{name}.2.fc1", squeezed, inner, 1, 1)
    yield from affine(f"{name}.2.fc2", inner, squeezed, 1, 1)
    yield from _conv_norm(f"{name}.3", row.width, inner, 1)


def _conv_norm(name: str, out: int, into: int, kernel: int) -> Iterator[Entry]:
    """A convolution without bias and its BatchNorm."""
    yield f"{name}.0.weight", (out, into, kernel, kernel)
    yield from batch_norm(f"{name}.1", out)

"""Computes the shapes that an engine is built for from the sizes of images.

An engine accepts every shape between a minimum and a maximum, and is fastest at the optimum between them. Users give
all three as image sizes: width, height, and the number of images at a time.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .control import is_control
from .errors import UsageError
from .limits import MAX_SIDE
from .manifest import PortEntry
from .plan_entries import ImageSize, PortShapes, ProfileEntry
from .sizes import latent_sizes
from .stages import ControlNetConfig, NetworkConfig, Stage, TextEncoderConfig, UNetConfig

Triple = tuple[int, int, int]  # least, likeliest, largest

TOKENS: Triple = (77, 77, 231)  # of text: CLIP's length, up to three texts in a row
IMAGE_PROMPTS: Triple = (1, 1, 4)
TEXTS = 16  # texts and chunks of texts that are encoded at once
STEPS: Triple = (1, 20, 100)  # of a schedule, all embedded at once
EFFNET_STRIDE = 32  # pixels of a side for each value of stage C's latents
CONTROL_STRIDE = 32

# A dim of an input, or a part of it as in "height/2".
_TERM = re.compile(r"(?P<name>\w+)(?:/(?P<divisor>[1-9]\d{0,3}))?")
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})(?:x(\d{1,9}))?")


@dataclass(frozen=True)
class Bounds:
    """The smallest, likeliest and largest images that an engine is built for."""

    min: ImageSize
    opt: ImageSize
    max: ImageSize

    def __post_init__(self) -> None:
        """Raises UsageError for sizes that cannot be generated and for bounds that are not in order."""
        for each in (self.min, self.opt, self.max):
            latent_sizes(each.height, each.width)
        for name in ("height", "width", "images"):
            least, likeliest, largest = (getattr(each, name) for each in (self.min, self.opt, self.max))
            if not least <= likeliest <= largest:
                raise UsageError(
                    f"{name}: least {least}, likeliest {likeliest}, largest {largest}: expected these in ascending "
                    "order; see min=..., opt=... and max=..."
                )

    @property
    def static(self) -> bool:
        """True when minimum, optimum and maximum are the same size."""
        return self.min == self.opt == self.max

    def __str__(self) -> str:
        return shown(self.opt) if self.static else ":".join(map(shown, (self.min, self.opt, self.max)))


def parse_image_size(text: str) -> ImageSize:
    """Read WIDTHxHEIGHT or WIDTHxHEIGHTxIMAGES, such as 1024x768x2. Raises UsageError for anything else."""
    found = _SIZE.fullmatch(text.strip().lower())
    if not found or not all(1 <= int(number) <= MAX_SIDE for number in found.groups() if number):
        raise UsageError(
            f"{text!r}: expected WIDTHxHEIGHT or WIDTHxHEIGHTxIMAGES, such as 1024x768x2, with numbers up to {MAX_SIDE}"
        )
    return ImageSize(width=int(found[1]), height=int(found[2]), images=int(found[3] or 1))


def shown(size: ImageSize) -> str:
    """Write a size as `parse_image_size` reads it."""
    return f"{size.width}x{size.height}x{size.images}"


DEFAULT = Bounds(*map(parse_image_size, ("512x512x1", "1024x1024x1", "1536x1536x2")))


def profile_for(config: NetworkConfig, graph: str, inputs: Iterable[PortEntry], bounds: Bounds) -> ProfileEntry:
    """The shapes that the graph `graph` of the network must accept for images within `bounds`.

    With guidance, prior and decoder have two samples for each image, so their batches reach twice the number of images.
    The vqgan decodes one image at a time. Counts of text tokens, image prompts and steps have their usual ranges, and
    with static bounds their usual values. Dims of a ControlNet's residuals always begin at 1, which means no residual.
    """
    sizes = _sizes(config, graph, bounds)
    ports = {}
    for port in inputs:
        static = bounds.static and not is_control(port.name)
        triples = [_triple(dim, port.name, sizes, config, bounds) for dim in port.dims]
        least, likeliest, largest = (tuple(triple[end] for triple in triples) for end in range(3))
        if static and config.stage is not Stage.TEXT_ENCODER:
            least = largest = likeliest
        ports[port.name] = PortShapes(min=least, opt=likeliest, max=largest)
    return ProfileEntry(min=bounds.min, opt=bounds.opt, max=bounds.max, ports=ports)


def _triple(dim: int | str, port: str, sizes: dict[str, Triple], config: NetworkConfig, bounds: Bounds) -> Triple:
    if isinstance(dim, int):
        return dim, dim, dim
    if is_control(port) and dim in (f"{port}.height", f"{port}.width"):
        return _control(dim.rpartition(".")[2], bounds)
    term = _TERM.fullmatch(dim)
    if not term or term["name"] not in sizes:
        raise UsageError(f"{config.stage}: no range is known for the dim {dim!r} of its input {port}")
    least, likeliest, largest = (size // int(term["divisor"] or 1) for size in sizes[term["name"]])
    return least, likeliest, largest


def _control(side: str, bounds: Bounds) -> Triple:
    """Sizes of a ControlNet's residuals: 1 for none, the size of stage C's latents, the size for a whole image."""
    likeliest = _latents(bounds.opt, "prior")[side]
    return 1, likeliest, max(likeliest, -(-getattr(bounds.max, side) // CONTROL_STRIDE))


def _sizes(config: NetworkConfig, graph: str, bounds: Bounds) -> dict[str, Triple]:
    """The range of each symbolic dim, except those of ControlNets' residuals."""
    batch = _batch(config.stage, graph, bounds)
    counts = {"batch": batch, "tokens": TOKENS, "images": IMAGE_PROMPTS, "steps": STEPS}
    if isinstance(config, UNetConfig):
        counts["context"] = _context(config)
    sides = [_sides(config, graph, bounds, each) for each in (bounds.min, bounds.opt, bounds.max)]
    return counts | {name: (sides[0][name], sides[1][name], sides[2][name]) for name in sides[0]}


def _batch(stage: Stage, graph: str, bounds: Bounds) -> Triple:
    least, likeliest, largest = bounds.min.images, bounds.opt.images, bounds.max.images
    if stage is Stage.PRIOR:
        return least, 2 * likeliest, 2 * largest
    if stage is Stage.DECODER:  # guidance is off by default
        return least, likeliest, 2 * largest
    if stage is Stage.TEXT_ENCODER:  # a prompt and a negative prompt; known texts are not encoded again
        return 1, 2, max(TEXTS, 2 * largest)
    if stage is Stage.IMAGE_ENCODER:
        return IMAGE_PROMPTS
    if stage is Stage.VQGAN and graph == "model":
        return 1, 1, 1
    return least, likeliest, largest


def _context(config: UNetConfig) -> Triple:
    """The number of conditioning tokens: the text's, and `clip_seq` for the pooled text and for each image prompt."""
    if config.stage is Stage.DECODER:
        return config.clip_seq, config.clip_seq, config.clip_seq
    least, likeliest, largest = (
        text + (1 + images) * config.clip_seq for text, images in zip(TOKENS, IMAGE_PROMPTS, strict=True)
    )
    return least, likeliest, largest


def _sides(config: NetworkConfig, graph: str, bounds: Bounds, size: ImageSize) -> dict[str, int]:
    """Heights and widths of the graph's inputs for images of `size`."""
    match config.stage:
        case Stage.PRIOR | Stage.PREVIEWER:
            return _latents(size, "prior")
        case Stage.DECODER:
            effnet = {f"effnet_{side}": length for side, length in _latents(size, "prior").items()}
            return _latents(size, "decoder") | effnet
        case Stage.VQGAN if graph == "model":
            return _latents(size, "decoder")
        case Stage.EFFNET_ENCODER:
            return _effnet_pixels(bounds, size)
        case _ if isinstance(config, TextEncoderConfig):
            return {}
        case _ if isinstance(config, ControlNetConfig) and config.bottleneck_mode == "simple":
            return _latents(size, "prior") if size == bounds.max != bounds.opt else {"height": 1, "width": 1}  # a face
        case _ if isinstance(config, ControlNetConfig) and config.bottleneck_mode == "large":
            return _latents(size, "prior")  # the latents of a smaller image
        case _:
            return {"height": size.height, "width": size.width}


def _effnet_pixels(bounds: Bounds, size: ImageSize) -> dict[str, int]:
    """Sides in pixels that give latents of stage C's size; the maximum also covers the largest image as it is."""
    wanted = {side: length * EFFNET_STRIDE for side, length in _latents(size, "prior").items()}
    if bounds.static or size != bounds.max:
        return wanted
    return {side: max(length, getattr(size, side)) for side, length in wanted.items()}


def _latents(size: ImageSize, stage: str) -> dict[str, int]:
    sizes = latent_sizes(size.height, size.width)
    height, width = sizes.prior if stage == "prior" else sizes.decoder
    return {"height": height, "width": width}

"""Generates the images of requests: opens their pictures and writes what was used into the metadata."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ...schemas.errors import UnsoundError, UsageError
from ...schemas.request import ControlRef, PictureRef, Request
from ...storage.file_hashes import sha256_unless_changed
from ..cascade import Cascade
from ..images.masks import open_mask
from ..images.pictures import as_picture, open_picture
from ..sampling.controlnets import INPAINTING, ControlPicture
from ..sampling.loop import OnStep
from ..sampling.noise import PlacedSeed
from ..text.tokenizer import LENGTH


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image, the request it answers, and the metadata to store in it."""

    request: Request
    image: Image.Image
    metadata: dict[str, Any]


def generate_requests(
    cascade: Cascade, requests: Sequence[Request], folder: Path, on_step: OnStep
) -> list[GeneratedImage]:
    """Generate the images of requests of one group together. Paths of pictures are relative to `folder`.

    Raises UsageError for a picture that cannot be opened or is not the one whose SHA-256 the request has,
    UnsoundError that names the requests whose images have values that are not finite."""
    try:
        return _generate(cascade, requests, folder, on_step)
    except UnsoundError as error:
        if len(requests) == 1 or not error.images:
            raise
        which = "; ".join(
            f"image {n + 1} is seed {requests[n].seed}, {requests[n].prompt[:40]!r}" for n in error.images
        )
        raise UnsoundError(f"{error} ({which})", error.images) from error


def _generate(cascade: Cascade, requests: Sequence[Request], folder: Path, on_step: OnStep) -> list[GeneratedImage]:
    first = requests[0]
    init = None if first.init_image is None else _open(first.init_image, folder)
    controls = [ControlPicture(each.name, _open(each, folder), each.strength) for each in first.controls]
    result = cascade.generate(
        [request.prompt for request in requests],
        negative=[request.negative for request in requests],
        seed=[PlacedSeed(request.seed, request.index, request.batch) for request in requests],
        settings=first.settings,
        image_prompts=[_open(picture, folder) for picture in first.image_prompts],
        init_image=init,
        mask=None if first.mask is None else _mask(_checked(first.mask, folder), init, controls),
        controls=controls,
        on_step=on_step,
    )
    used = with_hashes(first, folder)
    return [
        GeneratedImage(request, image, {**described, **used})
        for request, image, described in zip(requests, result.images, result.settings, strict=True)
    ]


def request_groups(
    requests: Sequence[Request], most: int, length: Callable[[Request], int] = lambda request: 0
) -> Iterator[list[Request]]:
    """Yield neighbours among `requests` that can be generated together, at most `most` at a time. `length` gives the
    length of a request's embeddings if lengths may differ: see `text_length`.

    Where guidance is rescaled, one at a time: the factor is taken from all images drawn together, as in Stability's
    code, and no image of several could be drawn again alone."""
    for _, group in groupby(requests, key=lambda request: (request.group, length(request))):
        members = list(group)
        size = 1 if members[0].settings.rescale else most
        yield from (members[start : start + size] for start in range(0, len(members), size))


def text_length(cascade: Cascade, request: Request) -> int:
    """The number of rows of the prompt's embeddings. Together with a longer prompt it would be padded with empty
    chunks, and the image would be another."""
    if not request.settings.long_prompts:
        return LENGTH
    weighted = request.settings.weighted
    found = cascade.encode_prompt(request.prompt, request.negative, weighted=weighted, long_prompts=True)
    return int(found.clip_text.shape[1])


def with_hashes(request: Request, folder: Path) -> dict[str, Any]:
    """The metadata of the request's pictures and LoRAs, each picture with its SHA-256."""
    found = request.to_json()
    for name in ("image_prompts", "controls"):
        if name in found:
            found[name] = [_with_hash(ref, folder) for ref in found[name]]
    for name in ("init_image", "mask"):
        if name in found:
            found[name] = _with_hash(found[name], folder)
    return {name: found[name] for name in ("image_prompts", "controls", "init_image", "mask", "loras") if name in found}


def _with_hash(ref: dict[str, Any], folder: Path) -> dict[str, Any]:
    rest = {name: value for name, value in ref.items() if name != "sha256"}  # sha256 always comes last
    return {**rest, "sha256": sha256_unless_changed(folder / ref["path"])}


def _open(picture: PictureRef, folder: Path) -> Image.Image:
    return open_picture(_checked(picture, folder))


def _mask(path: Path, init: Image.Image | None, controls: Sequence[ControlPicture]) -> Image.Image:
    """The mask of the initial picture, else of the one that the inpainting ControlNet looks at."""
    masked = [*([] if init is None else [init]), *(each.picture for each in controls if each.name == INPAINTING)]
    if not masked:
        raise UsageError(
            f"{path}: the mask needs a picture; give init_image=..., or a control {INPAINTING} with its picture"
        )
    return open_mask(path, as_picture(masked[0]).size)


def _checked(picture: PictureRef | ControlRef, folder: Path) -> Path:
    """The picture's path. Raises UsageError when its SHA-256 is not the one in the request."""
    path = folder / picture.path
    if picture.sha256 and path.is_file() and (found := sha256_unless_changed(path)) != picture.sha256:
        raise UsageError(
            f"{path}: expected the picture of SHA-256 {picture.sha256[:12]}..., found {found[:12]}...; "
            "name the right one with the option it belongs to"
        )
    return path

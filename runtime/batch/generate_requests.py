"""Generates the images of requests, and describes their pictures and LoRAs in the metadata."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL import Image

from ...schemas.errors import CascadeError, UnsoundError
from ...schemas.request import Request
from ...schemas.settings import Settings
from ..cascade import Cascade
from ..result import Result
from ..sampling.controlnets import ControlPicture
from ..sampling.loop import OnStep
from ..sampling.noise import PlacedSeed
from ..text.prompts import PromptEmbeds
from ..text.tokenizer_file import LENGTH
from .picture_hashes import PICTURE_FIELDS, with_hashes

MOST_PIXELS = 4 << 20  # of all images computed together, unless a number is given


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image, the request it answers, and the metadata to store in it."""

    request: Request
    image: Image.Image
    metadata: dict[str, Any]


def generate_requests(
    cascade: Cascade, requests: Sequence[Request], on_step: OnStep, *, after: Result | None = None
) -> list[GeneratedImage]:
    """Generate the images of requests of one group together. `after` is what `generate_prior` returned for them.

    Raises UsageError for a picture that cannot be opened or has another SHA-256 than the request says. Raises
    UnsoundError, which names the requests concerned, when values of images are not finite."""
    shared = with_hashes(requests[0])
    with _named(requests):
        prompts, negatives = [each.prompt for each in requests], [each.negative for each in requests]
        how: dict[str, Any] = {"negative": negatives, "after": after, "on_step": on_step}
        result = cascade.generate(prompts, **how, **_shared(shared, requests))
        images = result.images
    fields = shared.to_json()
    used = {
        name: list(fields[name]) if isinstance(fields[name], tuple) else fields[name]
        for name in (*PICTURE_FIELDS, "loras")
        if name in fields
    }
    return [
        GeneratedImage(request, image, {**described, **used})
        for request, image, described in zip(requests, images, result.settings, strict=True)
    ]


def generate_prior(cascade: Cascade, requests: Sequence[Request], embeds: PromptEmbeds) -> Result:
    """The prior's latents of requests of one group, whose prompts have these `embeds`. Raises what `generate_requests`
    raises."""
    with _named(requests):
        return cascade.generate(embeds=embeds, output="prior", **_shared(with_hashes(requests[0]), requests))


@contextmanager
def _named(requests: Sequence[Request]) -> Iterator[None]:
    """Name the requests that an UnsoundError concerns."""
    try:
        yield
    except UnsoundError as error:
        if len(requests) == 1 or not error.images:
            raise
        which = "; ".join(
            f"image {n + 1} is seed {requests[n].seed}, {requests[n].prompt[:40]!r}" for n in error.images
        )
        raise UnsoundError(f"{error} ({which})", error.images) from error


def _shared(shared: Request, requests: Sequence[Request]) -> dict[str, Any]:
    """The arguments of `Cascade.generate` from `shared`, the first request with its pictures' hashes, and all seeds."""
    return {
        "seed": [PlacedSeed(request.seed, request.index, request.batch) for request in requests],
        "settings": shared.settings,
        **given_pictures(shared),
    }


def given_pictures(request: Request) -> dict[str, Any]:
    """The pictures of a request as arguments of `Cascade.generate`."""
    return {
        "image_prompts": [picture.path for picture in request.image_prompts],
        "init_image": request.init_image.path if request.init_image else None,
        "mask": request.mask.path if request.mask else None,
        "controls": [ControlPicture(each.name, each.path, each.strength) for each in request.controls],
    }


def request_groups(
    requests: Sequence[Request],
    together: int | None = None,
    length: Callable[[Request], int] = lambda request: 0,
) -> Iterator[list[Request]]:
    """Yield neighbours among `requests` that can be generated together, at most `together` (None: `images_together`).

    `length` returns the length of a request's embeddings if lengths may differ: see `text_length`. Requests with
    rescaled guidance are generated one at a time. As in Stability's code, all images generated together share one
    factor, so no image of several could be generated again alone."""
    for _, group in groupby(requests, key=lambda request: (request.group, length(request))):
        members = list(group)
        settings = members[0].settings
        size = 1 if settings.rescale else together or images_together(settings)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def images_together(settings: Settings) -> int:
    """The number of images of one size that are computed at once if no number is given."""
    return max(1, MOST_PIXELS // (settings.width * settings.height))


def text_length(cascade: Cascade, request: Request) -> int:
    """The number of rows of the prompt's embeddings, 0 for a prompt that cannot be encoded.

    A longer prompt in the same batch would pad them with empty chunks, and the image would differ."""
    if not request.settings.long_prompts:
        return LENGTH
    with suppress(CascadeError):  # reported when the image is generated
        return int(encode_requests(cascade, [request]).clip_text.shape[1])
    return 0


def encode_requests(cascade: Cascade, requests: Sequence[Request]) -> PromptEmbeds:
    """The embeddings of requests whose prompts are read in the same way. Raises what `Cascade.encode_prompt` raises."""
    how = requests[0].settings
    prompts, negatives = [each.prompt for each in requests], [each.negative for each in requests]
    return cascade.encode_prompt(prompts, negatives, weighted=how.weighted, long_prompts=how.long_prompts)

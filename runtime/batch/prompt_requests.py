"""One request for each image, from prompts, a number of images, and seeds."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ...schemas.errors import UsageError
from ...schemas.limits import MAX_IMAGES
from ...schemas.manifest import Manifest
from ...schemas.request import Request, parse_request
from .image_jobs import check_request


def prompt_requests(
    manifest: Manifest, prompts: Sequence[str], images: int, seeds: Sequence[int], fields: Mapping[str, Any]
) -> list[Request]:
    """Return `images` requests for each prompt, in the order of `prompts`.

    `fields` are those that all requests share, such as "width" or "negative"; a "prompt" among them is used when
    `prompts` is empty. One seed, or none, makes all images one batch, with noise from one generator.
    Several seeds, one for each image, give each image its own generator. Without a seed, a random one is chosen.

    Raises UsageError for too many images, another number of seeds, or a request that the bundle cannot generate."""
    count = (len(prompts) or 1) * images
    if count > MAX_IMAGES:
        raise UsageError(f"{count} images: expected at most {MAX_IMAGES}; use several calls")
    if len(seeds) > 1 and len(seeds) != count:
        raise UsageError(f"{len(seeds)} seeds for {count} images; give one, or one for each")
    places = _places(seeds, count, fields)
    of_prompt = [
        parse_request({**fields, **words, **places[number * images]}, manifest.default_size)
        for number, words in enumerate([{"prompt": prompt} for prompt in prompts] or [{}])
    ]
    for request in of_prompt:
        check_request(request, manifest)
    # Requests of one prompt differ in seed, index and batch alone, and share everything else in memory.
    return [of_prompt[number // images].model_copy(update=place) for number, place in enumerate(places)]


def counted_requests(fields: Mapping[str, Any], count: int, manifest: Manifest) -> tuple[Request, ...]:
    """Return `count` requests of the same fields, whose seeds count on from the first; that is random if not given.

    Raises UsageError for a request that the bundle cannot generate, and for a seed beyond 64 bits."""
    first = parse_request({"seed": secrets.randbelow(1 << 32), **fields}, manifest.default_size)
    if count > 1 and first.batch > 1:
        raise UsageError("index and batch describe one image; leave them out to generate several")
    if first.seed + count > 2**64:
        raise UsageError(f"seed {first.seed}: too large for {count} images, whose seeds count on from it")
    check_request(first, manifest)
    return tuple(first.model_copy(update={"seed": first.seed + number}) for number in range(count))


def _places(seeds: Sequence[int], count: int, fields: Mapping[str, Any]) -> list[dict[str, int]]:
    """Seed, index and batch for each image."""
    if len(seeds) > 1:
        return [{"seed": seed, "index": 0, "batch": 1} for seed in seeds]
    if not seeds and "seed" in fields and count == 1:
        return [{}]
    seed = seeds[0] if seeds else fields.get("seed", secrets.randbelow(1 << 32))
    return [{"seed": seed, "index": index, "batch": count} for index in range(count)]

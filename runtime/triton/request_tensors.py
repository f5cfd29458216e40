"""The tensors of the Triton models `cascade` and `cascade_stream`, and the requests for images that they hold.

Each row of a request is one image. Types have Triton's names; the shapes are those of one row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ...schemas.errors import UsageError
from ...schemas.manifest import Manifest
from ...schemas.request import Request
from ..batch.prompt_requests import counted_requests
from ..serve.image_call import MOST_PARTIALS
from ..serve.image_queue import require_served


@dataclass(frozen=True)
class RowTensor:
    """The type of a tensor and the shape of one row of it, where -1 is any size."""

    type: str
    shape: tuple[int, ...] = (1,)
    optional: bool = True


# The names are those of a request's fields. An input that is not given has the default of `generate`; a seed is random.
INPUTS: Mapping[str, RowTensor] = {
    "prompt": RowTensor("STRING", optional=False),
    "negative": RowTensor("STRING"),
    "seed": RowTensor("UINT64"),
    "width": RowTensor("INT32"),
    "height": RowTensor("INT32"),
    "prior_steps": RowTensor("INT32"),
    "prior_guidance": RowTensor("FP64"),
    "decoder_steps": RowTensor("INT32"),
    "decoder_guidance": RowTensor("FP64"),
    "sampler": RowTensor("STRING"),
}
OUTPUTS: Mapping[str, RowTensor] = {
    "image": RowTensor("UINT8", (-1, -1, 3), optional=False),  # height, width, RGB
    "settings": RowTensor("STRING", optional=False),  # JSON: what generates the image again, its seed included
}
PREVIEWS = "previews"  # an input of `cascade_stream` alone: the number of previews of each image
STREAM_INPUTS = {**INPUTS, PREVIEWS: RowTensor("INT32")}
STREAM_OUTPUTS = {
    **OUTPUTS,
    "index": RowTensor("INT32", optional=False),  # the row of the request that the image belongs to
    "preview": RowTensor("INT32", optional=False),  # the number of a preview, from 1; 0 for the finished image
}


def parse_rows(tensors: Mapping[str, NDArray[Any]], manifest: Manifest) -> tuple[Request, ...]:
    """The requests in the inputs (rows, 1) of one call; `PREVIEWS` is left to `parse_previews`.

    Raises UsageError for what cannot be generated, and for rows whose images would differ in size."""
    if "prompt" not in tensors:  # the server does not ask for it where other inputs are optional
        raise UsageError("prompt: expected a text for each image, found none")
    given = {name: array for name, array in tensors.items() if name in INPUTS}
    requests = tuple(
        _parse_row({name: array[row, 0] for name, array in given.items()}, manifest)
        for row in range(len(given["prompt"]))
    )
    sizes = {f"{each.settings.width}x{each.settings.height}" for each in requests}
    if len(sizes) > 1:
        raise UsageError(f"rows of {' and '.join(sorted(sizes))}: expected one size; send a call for each")
    return requests


def parse_previews(tensors: Mapping[str, NDArray[Any]]) -> int:
    """The number of previews of each image of a call. Raises UsageError when it is out of range."""
    if PREVIEWS not in tensors:
        return 0
    numbers = {int(number) for number in tensors[PREVIEWS].flat}
    if len(numbers) != 1 or not 0 <= min(numbers) <= MOST_PARTIALS:
        found = ", ".join(map(str, sorted(numbers)))
        raise UsageError(f"{PREVIEWS}: expected one number from 0 to {MOST_PARTIALS}, found {found}")
    return numbers.pop()


def _parse_row(given: Mapping[str, Any], manifest: Manifest) -> Request:
    fields = {name: _plain(name, value) for name, value in given.items()}
    (request,) = counted_requests(fields, 1, manifest)
    require_served(request)
    return request


def _plain(name: str, value: Any) -> Any:
    """An element of a tensor as a plain value; strings arrive as bytes."""
    if not isinstance(value, bytes):
        return value.item() if hasattr(value, "item") else value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: expected text in UTF-8, found other bytes at {error.start}") from None

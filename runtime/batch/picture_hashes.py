"""The pictures of requests and their SHA-256, which shows later whether a picture is still the same."""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...schemas.errors import UsageError
from ...schemas.request import PictureRef, Request
from ...storage.file_hashes import sha256_unless_changed
from ..images.pictures import require_picture_file

PICTURE_FIELDS = ("image_prompts", "init_image", "mask", "controls")  # of a request and of an image's metadata

R = TypeVar("R", bound=PictureRef)


def with_hashes(request: Request, folder: Path = Path(), relative: Collection[str] = ()) -> Request:
    """The request with the present SHA-256 of its pictures. Paths in the fields `relative` start at `folder`.

    Raises UsageError for a picture that cannot be read, or whose SHA-256 is not the one in the request."""
    changes = {}
    for name in PICTURE_FIELDS:
        value = getattr(request, name)
        base = folder if name in relative else Path()
        if value:
            hashed = tuple(_hashed(ref, base) for ref in value) if isinstance(value, tuple) else _hashed(value, base)
            changes[name] = hashed
    return request.model_copy(update=changes)


def with_pictures(metadata: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """An image's metadata with what `change` makes of each picture in it."""
    given = {name: metadata[name] for name in PICTURE_FIELDS if metadata.get(name)}
    changed = {
        name: change(value) if isinstance(value, Mapping) else [change(each) for each in value]
        for name, value in given.items()
    }
    return {**metadata, **changed}


def pictures_of(requests: Iterable[Request]) -> list[str]:
    """The paths of all pictures that images are made from, each once."""
    values = [getattr(request, name) for request in requests for name in PICTURE_FIELDS]
    refs = [ref for value in values for ref in (value if isinstance(value, tuple) else (value,)) if ref is not None]
    return list(dict.fromkeys(ref.path for ref in refs))


def _hashed(ref: R, base: Path) -> R:
    path = base / ref.path
    require_picture_file(path)
    try:
        found = sha256_unless_changed(path)
    except OSError as error:
        raise UsageError(f"{path}: the picture cannot be read: {error.strerror}; check the file") from error
    if ref.sha256 not in (None, found):
        expected = f"expected the picture of SHA-256 {(ref.sha256 or '')[:12]}..., found {found[:12]}..."
        raise UsageError(f"{path}: {expected}; give the picture that the image was made from")
    return ref.model_copy(update={"path": str(path), "sha256": found})

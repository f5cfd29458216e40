"""Checks names of files that other files mention, before such a name becomes a path."""

import re
from typing import Annotated

from pydantic import AfterValidator

from .limits import MAX_NAME_BYTES, MAX_PATH_PARTS

# Names that Windows takes for a device, whatever the folder and the suffix.
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
ODD = re.compile(r"[\x00-\x1f\x7f/\\:]")  # a colon names a drive or a hidden stream on Windows


def problem_of_name(name: str) -> str | None:
    """Return why `name` cannot be a file's name on every system; None when it can."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "has half a surrogate pair"
    if not 1 <= size <= MAX_NAME_BYTES:
        return f"has {size} bytes, expected 1 to {MAX_NAME_BYTES}"
    if name in (".", ".."):
        return "leads to another folder"
    if ODD.search(name):
        return "has a slash, backslash, colon or control character"
    if name[-1] in ". ":
        return "ends with a dot or a space"
    return "is the name of a device" if DEVICE.fullmatch(name) else None


def problem_of_path(path: str) -> str | None:
    """Return why `path` does not lead from a folder to a file inside it; None when it does. Names have "/" between."""
    parts = path.split("/")
    if len(parts) > MAX_PATH_PARTS:
        return f"has {len(parts)} parts, expected at most {MAX_PATH_PARTS}"
    if path.startswith("/") or ".." in parts:
        return "leads out of the bundle"
    return next(filter(None, map(problem_of_name, parts)), None)


def _plain(name: str) -> str:
    if problem := problem_of_name(name):
        raise ValueError(f"{name[:80]!r} {problem}; expected a plain name")
    return name


def _inside(path: str) -> str:
    if problem := problem_of_path(path):
        raise ValueError(f"{path[:80]!r} {problem}; expected a path inside the bundle")
    return path


PlainName = Annotated[str, AfterValidator(_plain)]
RelativePath = Annotated[str, AfterValidator(_inside)]

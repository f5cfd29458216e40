"""Sources on the Hub and their spelling: hf://owner/repo[@revision][/path]."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ...schemas.errors import UsageError

FORM = "hf://owner/repo[@revision][/path]"
WEIGHTS = ".safetensors"
GGUF = ".gguf"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class HubSource:
    """A repository of models on the Hub, or a file or folder in one."""

    repo: str
    revision: str = "main"
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")

    @property
    def is_file(self) -> bool:
        return is_weights(self.path)


class HubPath(type(Path())):  # type: ignore[misc]  # the base is PosixPath or WindowsPath
    """A path on the Hub for messages. It keeps the two slashes of hf:// that pathlib would join."""

    def __str__(self) -> str:
        return re.sub("^hf:/+", "hf://", super().__str__().replace("\\", "/"))


def is_hub(source: str | Path) -> bool:
    """Return whether `source` is on the Hub. A Path, in which hf:// became hf:/, counts too."""
    return _spelling(source).startswith("hf:")


def parse(source: str | Path) -> HubSource:
    """Return the parts of an hf:// source. Slashes in a revision are written as %2F, except in refs/pr/1 and the like.

    Raises UsageError for a malformed source and for a pickle."""
    text = _spelling(source)
    match = re.fullmatch(
        r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(/(?P<path>.*))?", text
    )
    if not match:
        raise UsageError(f"{text}: expected {FORM}, such as hf://stabilityai/stable-cascade/stage_c.safetensors")
    if match["repo"].startswith(("datasets/", "spaces/", "kernels/", "buckets/")):
        raise UsageError(f"{text}: {match['repo'].split('/')[0]} hold no models; expected {FORM}")
    path = (match["path"] or "").rstrip("/")
    if path and not is_plain(path):
        raise UsageError(f"{text}: {path} is not a path in a repository; expected {FORM}")
    if path.lower().endswith(PICKLES):
        raise UsageError(
            f"{text}: a pickle by its name, which is not downloaded; name a {WEIGHTS} file, or download it yourself"
        )
    return HubSource(match["repo"], unquote(match["revision"] or "main"), path)


def is_weights(name: str) -> bool:
    """Return whether a file has the name of a safetensors or GGUF file. Before a download, only the name is known."""
    return name.lower().endswith((WEIGHTS, GGUF))


def is_plain(path: str) -> bool:
    """Return whether a path stays inside its repository. Paths come from the user or from a server."""
    return "\\" not in path and not {"", ".", ".."} & set(path.split("/"))


def _spelling(source: str | Path) -> str:
    return source.as_posix() if isinstance(source, Path) else source

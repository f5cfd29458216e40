"""The files of a repository: as the Hub lists them, or as the cache has them when the Hub cannot be reached."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.provenance import MAX_BYTES, is_provenance_name
from .select import base_name, select
from .source import HubSource


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it at a commit: size in bytes, and the SHA-256 of its content if it is a large file."""

    name: str
    commit: str
    size: int
    sha256: str | None


def list_files(wanted: HubSource) -> dict[str, HubFile]:
    """Return the files of a repository by name, without licences and model cards of unusual size."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(
            wanted.repo, revision=wanted.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a description of a repository ({error!r})") from error
    files = {}
    for one in info.siblings or ():
        name, size, digest = one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else ""
        sha256 = digest if re.fullmatch("[0-9a-f]{64}", digest) else None
        if not (is_provenance_name(base_name(name)) and size > MAX_BYTES):
            files[name] = HubFile(name, info.sha or wanted.revision, size, sha256)
    return files


def from_cache(wanted: HubSource, error: Exception, variant: str | None = None, lite: bool = False) -> Path:
    """Return the path in the cache that `fetch` would return. Raises `error` when any file is missing there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        raise error  # the Hub answered that there is no such revision or file
    try:
        names = _cached_names(wanted)
        needed = select(names, wanted, variant, lite) if names else ()
        patterns = [glob.escape(name) for name in needed if not is_provenance_name(base_name(name))]
        snapshot = snapshot_download(
            wanted.repo, revision=wanted.revision, local_files_only=True, allow_patterns=patterns or None
        )
    except LocalEntryNotFoundError:
        raise error from None
    path = Path(snapshot, wanted.path)
    if not path.exists():
        raise error
    return path


def _cached_names(wanted: HubSource) -> list[str]:
    """Return the files of the repository's last listing; none where huggingface_hub keeps no listings."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return []  # early versions of 1.x
    try:
        return [file.path for file in get_cached_repo_tree(wanted.repo, revision=wanted.revision)]
    except CachedRepoTreeNotFoundError:
        return []

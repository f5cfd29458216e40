"""Downloads into huggingface_hub's cache that continue after an interruption.

The library's own downloads start again from the first byte when the process is started again (huggingface_hub issue
4196, true of 2.4).
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ...schemas.callbacks import Say
from ...schemas.errors import CheckpointError
from ...schemas.messages import shown_bytes
from .hub_errors import http_error
from .repository import HubFile
from .source import HubSource

MAX_STALLS = 5  # attempts in a row without a new byte before a download is given up


def fetch_weights(wanted: HubSource, files: list[HubFile], say: Say) -> None:
    """Download the large `files` into the store of the cache, where huggingface_hub finds them for a snapshot."""
    from huggingface_hub import constants, hf_hub_download

    missing: list[tuple[HubFile, Path]] = []
    for file in files:
        plan = hf_hub_download(wanted.repo, file.name, revision=file.commit, dry_run=True)
        if plan.will_download and file.sha256 and file.size:
            # CACHE/models--OWNER--NAME/snapshots/COMMIT/the/file
            missing.append((file, Path(plan.local_path).parents[len(PurePosixPath(file.name).parts) + 1]))
    if not missing:
        return
    amount = "1 file" if len(missing) == 1 else f"{len(missing)} files"
    say(f"fetching {wanted}: {amount}, {sum(file.size for file, _ in missing) / 1e6:.1f} MB")
    _require_space(wanted, missing)
    if constants.HF_XET_HIGH_PERFORMANCE:
        return  # the variable asks for huggingface_hub's parallel transfer, which cannot be continued
    for file, repository in missing:
        _download(replace(wanted, path=file.name), file, repository, say)


def _require_space(wanted: HubSource, missing: list[tuple[HubFile, Path]]) -> None:
    needed = sum(file.size - _size(_partial(file, repository)) for file, repository in missing)
    folder = next(parent for parent in missing[0][1].parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{wanted}: {shown_bytes(needed)} are to be downloaded, {shown_bytes(free)} are free at {folder}; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def _partial(file: HubFile, repository: Path) -> Path:
    return repository / "blobs" / f"{file.sha256}.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(wanted: HubSource, file: HubFile, repository: Path, say: Say) -> None:
    """Download `file` into the store of its repository's cache, with the lock and the name of huggingface_hub."""
    blob, partial = repository / "blobs" / str(file.sha256), _partial(file, repository)
    lock = repository.parent / ".locks" / repository.name / f"{file.sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with _utils().WeakFileLock(lock):
        if blob.exists():  # another process was first
            return
        if done := _size(partial):
            say(f"{wanted}: continuing after {done / 1e6:.1f} of {file.size / 1e6:.1f} MB")
        _complete(wanted, file, partial)
        with partial.open("rb") as content:
            arrived = hashlib.file_digest(content, "sha256").hexdigest()
        if arrived != file.sha256:
            partial.unlink()
            raise CheckpointError(f"{wanted}: the bytes differ from those the Hub lists (SHA-256); try again")
        partial.replace(blob)


def _complete(wanted: HubSource, file: HubFile, partial: Path) -> None:
    """Append to `partial` until it has the size of `file`, over as many connections as that takes."""
    from huggingface_hub.errors import HfHubHTTPError

    if _size(partial) > file.size:
        partial.unlink()
    stalls = 0
    name = PurePosixPath(file.name).name
    with progress_bars()(total=file.size, initial=_size(partial), unit="B", unit_scale=True, desc=name) as bar:
        while (before := _size(partial)) < file.size:
            cut: Exception | None = None
            try:
                _append(wanted, file, partial, bar)
            except http_error() as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                cut = error
            after = _size(partial)
            stalls = 0 if after > before else stalls + 1
            if stalls >= MAX_STALLS:
                raise CheckpointError(
                    f"{wanted}: the download stopped at {after} of {file.size} bytes; try again, and it continues "
                    "from there"
                ) from cut
            if after < file.size:
                time.sleep(min(2**stalls, 10))


def _append(wanted: HubSource, file: HubFile, partial: Path, bar: Any) -> None:
    pinned = replace(wanted, revision=file.commit)  # a branch may move between two requests
    with ask(pinned, _size(partial), file.size) as answer, partial.open("ab") as out:
        if answer.status_code == 200:  # a server without range requests sends the whole file
            out.truncate(0)
        for block in blocks(answer, file.size - out.seek(0, os.SEEK_END)):
            out.write(block)
            out.flush()  # so that a later run can continue from here
            bar.update(out.tell() - bar.n)


@contextmanager
def ask(wanted: HubSource, start: int, stop: int) -> Iterator[Any]:
    """Yield the response to a request for bytes `start` to `stop` of a file. Its body is not read yet."""
    from huggingface_hub import constants, get_session, hf_hub_url

    url = hf_hub_url(wanted.repo, wanted.path, revision=wanted.revision)
    headers = {**_utils().build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        if answer.status_code != 416:  # 416: the file ends before `start`, which is no error here
            _utils().hf_raise_for_status(answer)
        yield answer


def blocks(answer: Any, limit: int) -> Iterator[bytes]:
    """Yield the body of a response, at most `limit` bytes of it."""
    if answer.status_code == 416:
        return
    for block in answer.iter_bytes():  # as they arrive: larger blocks would lose bytes at a break
        yield block[:limit]
        limit -= len(block)
        if limit <= 0:
            return


def progress_bars(*, shown: bool = True) -> Any:
    """Return huggingface_hub's class of progress bars, which obeys the user's settings and shows on terminals only."""

    class Bar(_utils().tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = options.get("disable") if shown else True
            super().__init__(*args, **options)

    return Bar


def _utils() -> Any:
    """Return huggingface_hub.utils, whose types do not declare all that it exports."""
    return import_module("huggingface_hub.utils")

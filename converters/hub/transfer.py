"""Downloads into huggingface_hub's cache that go on where they ended; its own start from zero (its issue 4196)."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ...schemas.errors import CheckpointError
from .errors import http_error
from .repository import File
from .source import HubSource

STALLS = 5  # attempts in a row that bring no byte before a download is given up

Tell = Callable[[str], object]  # given a line for the user


def fetch_weights(wanted: HubSource, files: list[File], tell: Tell) -> None:
    """Bring the large ones of `files` into the cache's store, from where huggingface_hub takes them into a snapshot."""
    from huggingface_hub import constants, hf_hub_download

    missing: list[tuple[File, Path]] = []
    for file in files:
        plan = hf_hub_download(wanted.repo, file.name, revision=file.commit, dry_run=True)
        if plan.will_download and file.sha256 and file.size:
            # CACHE/models--OWNER--NAME/snapshots/COMMIT/the/file
            missing.append((file, Path(plan.local_path).parents[len(PurePosixPath(file.name).parts) + 1]))
    if not missing:
        return
    amount = "1 file" if len(missing) == 1 else f"{len(missing)} files"
    tell(f"fetching {wanted}: {amount}, {sum(file.size for file, _ in missing) / 1e6:.1f} MB")
    _require_space(wanted, missing)
    if constants.HF_XET_HIGH_PERFORMANCE:
        return  # who sets it wants huggingface_hub's parallel transfer, though it cannot be continued
    for file, repository in missing:
        _download(replace(wanted, path=file.name), file, repository, tell)


def _require_space(wanted: HubSource, missing: list[tuple[File, Path]]) -> None:
    needed = sum(file.size - _size(_partial(file, repository)) for file, repository in missing)
    folder = next(parent for parent in missing[0][1].parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{wanted}: {needed / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} GB are free at {folder}; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def _partial(file: File, repository: Path) -> Path:
    return repository / "blobs" / f"{file.sha256}.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(wanted: HubSource, file: File, repository: Path, tell: Tell) -> None:
    """Fetch `file` into the store of its repository's cache, under the lock and name that huggingface_hub uses."""
    blob, partial = repository / "blobs" / str(file.sha256), _partial(file, repository)
    lock = repository.parent / ".locks" / repository.name / f"{file.sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with _utils().WeakFileLock(lock):
        if blob.exists():  # another process was first
            return
        if done := _size(partial):
            tell(f"{wanted}: going on after {done / 1e6:.1f} of {file.size / 1e6:.1f} MB")
        _complete(wanted, file, partial)
        with partial.open("rb") as content:
            arrived = hashlib.file_digest(content, "sha256").hexdigest()
        if arrived != file.sha256:
            partial.unlink()
            raise CheckpointError(f"{wanted}: other bytes arrived than the Hub lists (SHA-256); fetch it again")
        partial.replace(blob)


def _complete(wanted: HubSource, file: File, partial: Path) -> None:
    """Append to `partial` until it has the size of `file`, over as many connections as that takes."""
    from huggingface_hub.errors import HfHubHTTPError

    if _size(partial) > file.size:
        partial.unlink()
    stalls = 0
    name = PurePosixPath(file.name).name
    with bars()(total=file.size, initial=_size(partial), unit="B", unit_scale=True, desc=name) as bar:
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
            if stalls >= STALLS:
                raise CheckpointError(
                    f"{wanted}: the download stopped at {after} of {file.size} bytes; "
                    "run the same again, it goes on from there"
                ) from cut
            if after < file.size:
                time.sleep(min(2**stalls, 10))


def _append(wanted: HubSource, file: File, partial: Path, bar: Any) -> None:
    pinned = replace(wanted, revision=file.commit)  # a branch may move between two requests
    with ask(pinned, _size(partial), file.size) as answer, partial.open("ab") as out:
        if answer.status_code == 200:  # a server that knows no ranges sends all from the beginning
            out.truncate(0)
        for block in blocks(answer, file.size - out.seek(0, os.SEEK_END)):
            out.write(block)
            out.flush()  # what is there counts, however this ends
            bar.update(out.tell() - bar.n)


@contextmanager
def ask(wanted: HubSource, start: int, stop: int) -> Iterator[Any]:
    """The answer to a request for bytes `start` to `stop` of a file; its body is not read yet."""
    from huggingface_hub import constants, get_session, hf_hub_url

    url = hf_hub_url(wanted.repo, wanted.path, revision=wanted.revision)
    headers = {**_utils().build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        if answer.status_code != 416:  # the file ends before `start`: an answer, not an error
            _utils().hf_raise_for_status(answer)
        yield answer


def blocks(answer: Any, limit: int) -> Iterator[bytes]:
    """The body, no more than `limit` bytes whatever the server sends."""
    if answer.status_code == 416:
        return
    for block in answer.iter_bytes():  # as they come: to gather larger ones would lose what came before a break
        yield block[:limit]
        limit -= len(block)
        if limit <= 0:
            return


def bars(*, shown: bool = True) -> Any:
    """huggingface_hub's progress bar, which knows when the user wants none; on a terminal alone."""

    class Bar(_utils().tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = options.get("disable") if shown else True
            super().__init__(*args, **options)

    return Bar


def _utils() -> Any:
    """huggingface_hub.utils, where not all that is exported is typed as exported."""
    return import_module("huggingface_hub.utils")

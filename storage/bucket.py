"""Files in a bucket of an object store that speaks S3, read and put through pyarrow.

A put is whole or not there at all, so nothing half-written is left behind. A bucket has no locks.
"""

import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from ..schemas.errors import CascadeError, MissingPackageError, UsageError, reraise_interrupt
from .install_hint import install_hint

ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/")  # as s3://bucket, which Path shortens to s3:/bucket
BUCKET = re.compile(r"s3:/+[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?@]*)?")  # what else is in an address may be a key
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
KEY, SECRET, TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
CONNECTING, ANSWERING, ATTEMPTS = 5.0, 30.0, 3  # seconds to connect and for an answer; tries of a call
SHOWN = 300  # characters of an answer that means nothing to us
# Parts of what S3 says, and what it means with the next thing to try.
REASONS = {
    "NO_SUCH_BUCKET": "there is no such bucket; make it first, or correct the name",
    "NoSuchBucket": "there is no such bucket; make it first, or correct the name",
    "ACCESS_DENIED": f"access is denied; check what the key in ${KEY} may do with this bucket",
    "INVALID_ACCESS_KEY_ID": f"the store does not know the key in ${KEY}; correct it",
    "SIGNATURE_DOES_NOT_MATCH": f"the store does not take the secret in ${SECRET}; correct it",
    "NETWORK_CONNECTION": f"the store does not answer; check the network, and the address in ${ENDPOINTS[0]}",
}
Found = TypeVar("Found")


class BucketPath(PosixPath):
    """A file or folder in a bucket, as `s3://BUCKET/FOLDER/NAME`. It can be joined, read and put; nothing else.

    Keys of the store come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, with AWS_SESSION_TOKEN,
    AWS_REGION and AWS_ENDPOINT_URL_S3 where they are needed."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    @property
    def key(self) -> str:
        """The path as the store has it: bucket and name."""
        return "/".join(self.parts[1:])

    def open(self, *arguments: Any, **more: Any) -> Any:
        """The file, open for reading. Raises FileNotFoundError, and CascadeError when the store does not give it."""
        return _asked(self, lambda: _store().open_input_file(self.key))

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return _asked(self, lambda: bytes(file.read()))

    def put(self, content: bytes) -> None:
        """Write the file, whole; it replaces one of this name. Raises CascadeError when that fails."""

        def written() -> None:
            with _store().open_output_stream(self.key) as file:
                file.write(content)

        _asked(self, written)

    def names(self) -> set[str]:
        """The keys of all files in this folder. Raises UsageError for missing keys, and CascadeError when the bucket
        is not there or does not answer."""
        store = _store()
        from pyarrow.fs import FileSelector

        try:
            return {
                each.path for each in _asked(self, lambda: store.get_file_info(FileSelector(self.key, recursive=True)))
            }
        except FileNotFoundError:
            return set()


def output_folder(path: Path) -> Path:
    """`path` as an output: a BucketPath if it is an address of a bucket. Raises UsageError for other addresses."""
    if isinstance(path, BucketPath) or not ADDRESS.match(str(path)):
        return path
    if not BUCKET.fullmatch(str(path)):
        raise UsageError(
            "the address of the output: expected a folder, or s3://BUCKET/FOLDER without keys and options; names of "
            "buckets have 3 to 63 small letters, digits, dots and hyphens"
        )
    return BucketPath(path)


def on_disk(paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that are not in a bucket."""
    return [path for path in paths if not isinstance(path, BucketPath)]


def _asked(path: BucketPath, call: Callable[[], Found]) -> Found:
    """The store's answer to `call`. Its errors become CascadeError, except FileNotFoundError."""
    try:
        return call()
    except FileNotFoundError:
        raise
    except OSError as error:
        said = next((reason for part, reason in REASONS.items() if part in str(error)), str(error)[:SHOWN])
        raise CascadeError(f"{path}: {said}") from error


@cache
def _store() -> Any:
    """The store that the environment names. Raises UsageError without keys, MissingPackageError without pyarrow."""
    try:
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(
            f"an output in a bucket: {error.name} is not installed: {install_hint('ray')}"
        ) from error
    given = os.environ.get
    if missing := [name for name in (KEY, SECRET) if not given(name)]:
        names = " and ".join(f"${name}" for name in missing)
        raise UsageError(f"an output in a bucket: {names} not set; set the keys of the store in the environment")
    return S3FileSystem(
        access_key=given(KEY),
        secret_key=given(SECRET),
        session_token=given(TOKEN),
        region=next(filter(None, map(given, REGIONS)), None),
        endpoint_override=next(filter(None, map(given, ENDPOINTS)), None),
        connect_timeout=CONNECTING,
        request_timeout=ANSWERING,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # one call puts a small file
    )

"""What goes wrong with the Hub, in one line that says what to do."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ...schemas.errors import CascadeError, CheckpointError, UsageError, reraise_interrupt
from .source import FORM, HubSource


@contextmanager
def explaining(wanted: HubSource) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes one line that says what to do."""
    try:
        import huggingface_hub.errors  # noqa: F401
    except ImportError as error:
        reraise_interrupt(error)
        raise UsageError(f"{wanted}: hf:// sources need huggingface_hub: pip install huggingface_hub") from error
    try:
        yield
    except (http_error(), OSError, ValueError) as error:
        raise _explained(wanted, error) from error


def _explained(wanted: HubSource, error: Exception) -> CascadeError:
    from huggingface_hub import constants, errors

    if isinstance(error.__cause__, errors.FileMetadataError):
        return _no_hub(wanted, error.__cause__)
    page = f"{constants.ENDPOINT}/{wanted.repo}"
    table: Mapping[type[Exception], CascadeError] = {  # special ones before their bases
        errors.GatedRepoError: CheckpointError(
            f"{wanted}: its owner asks you to accept a licence first: do so at {page}, then `hf auth login`"
        ),
        errors.RepositoryNotFoundError: UsageError(
            f"{wanted}: no such repository, or a private one; check the name at {page}, or `hf auth login`"
        ),
        errors.RevisionNotFoundError: UsageError(f"{wanted}: no revision {wanted.revision}; see {page}/commits/main"),
        errors.LocalEntryNotFoundError: CheckpointError(
            f"{wanted}: the connection to {constants.ENDPOINT} was lost; run the same again, what came is kept"
        ),
        errors.EntryNotFoundError: UsageError(f"{wanted}: no such file; see {page}/tree/{wanted.revision}"),
        errors.HFValidationError: UsageError(f"{wanted}: not a repository's name; expected {FORM}"),
        errors.OfflineModeIsEnabled: CheckpointError(
            f"{wanted}: the cache does not hold it all, and HF_HUB_OFFLINE forbids to fetch it; unset that"
        ),
        errors.HfHubHTTPError: CheckpointError(f"{wanted}: {reason(error)}"),
        http_error(): CheckpointError(
            f"{wanted}: {reason(error)}, and the cache does not hold it all; check the network and try again"
        ),
    }
    for kind, explained in table.items():
        if isinstance(error, kind):
            return explained
    if isinstance(error, OSError):
        hint = "; make room, then run the same again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return CheckpointError(f"{wanted}: cannot be stored in the cache: {error.strerror or _line(error)}{hint}")
    return _no_hub(wanted, error)


def _no_hub(wanted: HubSource, error: object) -> CheckpointError:
    """What answered was a proxy's page, a firewall or a server that HF_ENDPOINT names wrongly."""
    from huggingface_hub import constants

    return CheckpointError(f"{wanted}: {constants.ENDPOINT} answers as no Hub would: {_line(error)}")


def reason(error: Exception) -> str:
    """A few words for why the Hub gave nothing."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if not isinstance(error, HfHubHTTPError):
        return f"the connection to {constants.ENDPOINT} failed ({_line(error) or type(error).__name__})"
    status = error.response.status_code
    advice = {401: "`hf auth login` again", 403: "`hf auth login` again", 429: "try again later, or `hf auth login`"}
    said = f" ({_line(error.server_message)})" if error.server_message else ""
    return f"the Hub answers with status {status}{said}; {advice.get(status, 'try again later')}"


def _line(said: object) -> str:
    """What a library or server said, short and on one line."""
    return " ".join(str(said).split())[:200]


def http_error() -> type[Exception]:
    """The base of the HTTP client's errors: httpx's in huggingface_hub 1.x, httpx2's in 2.x."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return HTTPError


def unreachable() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return (http_error(), OfflineModeIsEnabled)

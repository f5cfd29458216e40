"""Turns errors of huggingface_hub into errors of this package, each in one line with advice on what to do next."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ...schemas.errors import CascadeError, CheckpointError, UsageError, reraise_interrupt
from ...schemas.messages import one_line
from .source import FORM, HubSource

LONGEST = 200  # characters of what a library or a server says


@contextmanager
def explaining(wanted: HubSource) -> Iterator[None]:
    """Turn every error of huggingface_hub into a CascadeError whose message says what to do next."""
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
        return _not_a_hub(wanted, error.__cause__)
    page = f"{constants.ENDPOINT}/{wanted.repo}"
    table: Mapping[type[Exception], CascadeError] = {  # subclasses before their bases
        errors.GatedRepoError: CheckpointError(
            f"{wanted}: its owner asks you to accept a licence first: do so at {page}, then `hf auth login`"
        ),
        errors.RepositoryNotFoundError: UsageError(
            f"{wanted}: no such repository, or a private one; check the name at {page}, or `hf auth login`"
        ),
        errors.RevisionNotFoundError: UsageError(f"{wanted}: no revision {wanted.revision}; see {page}/commits/main"),
        errors.LocalEntryNotFoundError: CheckpointError(
            f"{wanted}: the connection to {constants.ENDPOINT} was lost; try again, and the download continues"
        ),
        errors.EntryNotFoundError: UsageError(f"{wanted}: no such file; see {page}/tree/{wanted.revision}"),
        errors.HFValidationError: UsageError(f"{wanted}: not a repository's name; expected {FORM}"),
        errors.OfflineModeIsEnabled: CheckpointError(
            f"{wanted}: the cache does not hold every file, and HF_HUB_OFFLINE forbids downloads; unset it"
        ),
        errors.HfHubHTTPError: CheckpointError(f"{wanted}: {reason(error)}"),
        http_error(): CheckpointError(
            f"{wanted}: {reason(error)}, and the cache does not hold every file; check the network and try again"
        ),
    }
    for kind, explained in table.items():
        if isinstance(error, kind):
            return explained
    if isinstance(error, OSError):
        hint = "; make room, then try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        problem = error.strerror or one_line(error, LONGEST)
        return CheckpointError(f"{wanted}: cannot be stored in the cache: {problem}{hint}")
    return _not_a_hub(wanted, error)


def _not_a_hub(wanted: HubSource, error: object) -> CheckpointError:
    """Return the error for an answer that comes from a proxy, a firewall, or a wrong HF_ENDPOINT."""
    from huggingface_hub import constants

    return CheckpointError(
        f"{wanted}: {constants.ENDPOINT} does not answer as a Hub does: {one_line(error, LONGEST)}; check HF_ENDPOINT "
        "and the proxy"
    )


def reason(error: Exception) -> str:
    """Return in a few words why the Hub gave no answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if not isinstance(error, HfHubHTTPError):
        return f"the connection to {constants.ENDPOINT} failed ({one_line(error, LONGEST)})"
    status = error.response.status_code
    advice = {401: "`hf auth login` again", 403: "`hf auth login` again", 429: "try again later, or `hf auth login`"}
    said = f" ({one_line(error.server_message, LONGEST)})" if error.server_message else ""
    return f"the Hub answers with status {status}{said}; {advice.get(status, 'try again later')}"


def http_error() -> type[Exception]:
    """Return the base of the HTTP client's errors: httpx's in huggingface_hub 1.x, httpx2's in 2.x."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return HTTPError


def unreachable() -> tuple[type[Exception], ...]:
    """Return the errors that mean that the Hub cannot be reached."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return (http_error(), OfflineModeIsEnabled)

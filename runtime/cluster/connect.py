"""A connection to a Ray cluster, or a small one of its own on this machine.

Nothing is reported to others: Ray's usage statistics and its dashboard are off in what is started here.
"""

import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...schemas.callbacks import Say, ignored
from ...schemas.errors import CascadeError, EngineError, MissingPackageError, UsageError, reraise_interrupt
from ...schemas.messages import reason
from ...storage.install_hint import install_hint
from ..memory.free_memory import free_memory

LOCAL = "local"
PATIENCE = 5.0  # seconds for a first connection to the address
TOKEN_PLACES = "into $RAY_AUTH_TOKEN, or into ~/.ray/auth_token"
STDERR = 2  # its file descriptor
LEAST_CPUS = 2  # that a cluster started here says it has: an actor of each stage must find room
STORE_BYTES, LEAST_STORE_BYTES = 1 << 30, 80 << 20  # of the object store of a cluster started here
LONGEST = 300  # characters of a message
STORE_SHARE = 4  # the object store takes one part in so many of the free memory
# Ray's C++ parts write lines about themselves to standard error, unless only fatal ones are asked for.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def import_ray() -> Any:
    """Import ray and ray.data. Raises MissingPackageError."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        reraise_interrupt(error)
        raise MissingPackageError(f"ray: {error.name} is not installed: {install_hint('ray')}") from error
    return ray


@contextmanager
def connected(address: str, say: Say = ignored) -> Iterator[Any]:
    """The module ray, connected to the cluster at `address` (host:port), or to one that is started here ("local").

    The connection ends with the context, and so does a cluster that was started for it. A connection that the process
    has already is used and left open. `say` is called with what Ray tells of its nodes, such as a worker that died.

    Raises UsageError for an address that does not answer or a token that the cluster does not take."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    own = {"include_dashboard": False, "num_cpus": max(LEAST_CPUS, _cpus()), "object_store_memory": store_bytes()}
    if address != LOCAL:
        _require_answer(address)
    _pass_on_messages(ray, say)
    try:
        with _silent_stderr():
            if address != LOCAL:
                _prepare_to_join(ray, address)
            ray.init(address=address, **(own if address == LOCAL else {}), **quiet)
    except Exception as error:
        ray.shutdown()
        raise _refusal(ray, address, error) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # ray.data logs what it raises, with tracebacks
    # Ray warns of batches with fewer images than actors or tasks, and advises an option of its own.
    warnings.filterwarnings("ignore", "The (min|max)imum number of concurrent", UserWarning, r"ray\.data\.")
    try:
        yield ray
    finally:
        ray.shutdown()


def _prepare_to_join(ray: Any, address: str) -> None:
    """Let Ray send the token that it finds to a cluster that asks for one.

    Ray sends none to an address by itself. A cluster that asks for none never starts the actors of a client with one.
    Raises what Ray raises for an address without a cluster, and for a token that the cluster does not take."""
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient

    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        tokens.logger.setLevel(logging.ERROR)
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        GcsClient(address=address)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide the lines that Ray's C++ parts write about their log and each try to connect. Failures are raised anyway."""
    kept, nothing = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nothing)


def _pass_on_messages(ray: Any, say: Say) -> None:
    """Give the first sentence of each of Ray's messages to `say`, once. Ray would print all to standard output."""
    said: set[str] = set()

    def pass_on(data: Mapping[str, Any], *arguments: Any, **more: Any) -> None:
        for line in data.get("lines", ()):
            text = str(line).strip().partition(". ")[0].partition("\n")[0][:LONGEST]
            if text and text not in said:
                said.add(text)
                say(f"Ray: {text}")

    ray._private.worker.print_to_stdstream = pass_on


def store_bytes() -> int:
    """The size of the object store of a cluster started here. It holds what is on its way between the stages."""
    free = free_memory()
    return STORE_BYTES if free is None else max(LEAST_STORE_BYTES, min(STORE_BYTES, free // STORE_SHARE))


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require_answer(address: str) -> None:
    """Raise UsageError unless something listens at `address`: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or "/" in host:
        raise UsageError(f"ray {address!r}: expected local, or HOST:PORT of a cluster's head node, mostly port 6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        raise UsageError(
            f"ray {address}: no cluster answers there: {reason(error)}; start one with "
            "`ray start --head`, or take ray=local"
        ) from error


def _refusal(ray: Any, address: str, error: Exception) -> CascadeError:
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, ray.exceptions.AuthenticationError):
        said = said.partition(". ")[0]
        return UsageError(
            f"ray {address}: the cluster does not take this token, or there is none: {said}; put its token "
            f"{TOKEN_PLACES}"
        )
    if address == LOCAL:
        logs = Path(tempfile.gettempdir(), "ray", "session_latest", "logs")
        return EngineError(f"ray {address}: no cluster could be started: {said}; look into Ray's logs, {logs}")
    return UsageError(
        f"ray {address}: something answers there, but no cluster that takes this machine: {said}; check that this is "
        f"the address that `ray start --head` printed, and put the token of that cluster {TOKEN_PLACES}"
    )

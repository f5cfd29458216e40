"""Where a server listens, and which requests may be for it.

A browser can be led to a server of its own machine by another web site, or by a name that somebody has made point
there. Without a login, a request must therefore name the server by an address or by one of its own names, and must not
come from another site.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from ..schemas.errors import UsageError


def is_loopback(host: str) -> bool:
    """True if only programs of this machine reach `host`."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def address_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def server_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def cannot_listen(host: str, port: int, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or str(error)
    return UsageError(f"{host}, port {port}: cannot listen there: {reason}; give another port=...")


def own_names(host: str) -> frozenset[str]:
    """The names of a server that listens at `host`, in lower case."""
    return frozenset({"localhost", host.lower(), socket.gethostname().lower()})


def is_for_server(host: str, names: frozenset[str]) -> bool:
    """True if a Host header names the server by an address or by one of its own `names`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name in names or _is_address(name)


def is_other_site(origin: str | None, host: str) -> bool:
    """True if the Origin header of a request names another site than its Host header."""
    return origin is not None and origin.partition("://")[2].lower() != host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

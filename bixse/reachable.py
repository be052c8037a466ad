"""Whether anybody listens at an address. Ray asks for minutes before it says that nobody does."""

import socket
from urllib.parse import urlsplit

_WITHIN_S = 10.0


def refuse_unreachable(address: str) -> None:
    """Raises ConnectionError when nobody listens at a cluster's `host:port` or `ray://host:port`
    within ten seconds; what names no port (`local`, `auto`) is not asked.
    """
    bare = address.removeprefix("ray://")
    if "://" in bare:
        return
    try:
        parts = urlsplit(f"//{bare}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return  # Ray says what is wrong with it.
    if host is None or port is None:
        return
    try:
        socket.create_connection((host, port), _WITHIN_S).close()
    except UnicodeError:
        # No name of a host: a label of it is empty or too long.
        raise ConnectionError(f"no Ray at {address}: {host} is no name of a host") from None
    except OSError as error:
        raise ConnectionError(f"no Ray at {address}: {error.strerror or error}") from None

"""Who may ask, how much, and how many at a time.

Everything here happens before a body is parsed. Keys are compared in constant time, live in memory
only, and stand in no message.
"""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

Role = Literal["search", "monitor"]
"""search: ask questions and read metrics. monitor: read metrics only."""

_ROLES: dict[str, Role] = {"search": "search", "monitor": "monitor"}

KEYS_VARIABLE = "BIXSE_KEYS"
MIN_KEY_LENGTH = 16
BODY_WITHIN_S = 10.0

_HOST = re.compile(r"\[([^\]]+)\](?::\d+)?|([^:]+)(?::\d+)?")
_OPEN = frozenset({"/", "/livez", "/readyz"})
_MONITORED = frozenset({"/metrics"})
_WORK = frozenset({"/search", "/v1/embeddings", "/retrieve"})


@dataclass(frozen=True)
class Keys:
    """The keys and what each may do."""

    _roles: dict[bytes, Role] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return bool(self._roles)

    def role_of(self, offered: str) -> Role | None:
        """The role of a key, in time that does not depend on which key, or how much of it, fits."""
        found: Role | None = None
        for key, role in self._roles.items():
            if hmac.compare_digest(key, offered.encode("utf-8", "surrogatepass")):
                found = role
        return found


def load_keys(keys_file: str | None, environment: Mapping[str, str]) -> Keys:
    """Keys from the file, else from BIXSE_KEYS, else none: `role:key`, one a line (or by comma).

    Empty lines and lines that begin with # are skipped. Raises ValueError for a file that cannot be
    read or holds no key, for an unknown role, and for a short or repeated key.
    """
    if keys_file is None:
        text, source = environment.get(KEYS_VARIABLE), KEYS_VARIABLE
        if text is None:
            return Keys()
    else:
        try:
            text, source = Path(keys_file).read_text(encoding="utf-8"), keys_file
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the keys file {keys_file}: {error}") from None
    roles: dict[bytes, Role] = {}
    for number, line in enumerate(text.replace(",", "\n").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        role, colon, key = line.strip().partition(":")
        if not colon or role not in _ROLES:
            raise ValueError(f"{source}, key {number}: expected search:KEY or monitor:KEY")
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(f"{source}, key {number}: shorter than {MIN_KEY_LENGTH} characters")
        if key.encode() in roles:
            raise ValueError(f"{source}, key {number}: stands there twice")
        roles[key.encode()] = _ROLES[role]
    if not roles:
        raise ValueError(f"{source} is set but holds no key")
    return Keys(roles)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_binding(host: str, keys: Keys) -> None:
    """Raises ValueError when other machines could reach an application without keys."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"no keys are configured, so the application listens on loopback only, not on {host}: "
            f"give --keys-file or set {KEYS_VARIABLE}"
        )


def authorize(path: str, headers: Mapping[str, str], client: str | None, keys: Keys) -> None:
    """Let a request pass, or raise ApiError 401 or 403.

    Without keys only this machine may ask. Whatever is not known to be open needs a key that may
    search, unknown paths included.
    """
    if not keys:
        # The name too: a web page elsewhere may point a name of its own at this machine.
        named = _HOST.fullmatch(headers.get("host", ""))
        local = client is not None and is_loopback(client)
        if not local or named is None or not is_loopback(named[1] or named[2]):
            raise ApiError(403, "forbidden", "no keys are configured: only this machine may ask")
        return
    if path in _OPEN:
        return
    scheme, _, offered = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not offered:
        raise ApiError(401, "unauthorized", "expected the header Authorization: Bearer KEY")
    role = keys.role_of(offered.strip())
    if role is None:
        raise ApiError(401, "unauthorized", "the key is not known")
    if role == "monitor" and path not in _MONITORED:
        raise ApiError(403, "forbidden", "this key may read metrics, not search")


class Door:
    """ASGI middleware: key, then a place among those in flight, then a body of bounded size."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, max_in_flight: int, max_body_bytes: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._free = max_in_flight
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            client = scope.get("client")
            authorize(scope["path"], headers, client[0] if client else None, self._keys)
            if scope["path"] not in _WORK:
                await self._app(scope, receive, send)
                return
            if self._free < 1:
                raise ApiError(429, "overloaded", "too many requests are in flight: try again")
            self._free -= 1
            try:
                body = await self._body(headers, receive)
                await self._app(scope, _replay(body, receive), send)
            finally:
                self._free += 1
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        too_large = ApiError(
            413, "too_large", f"the body may have at most {self._max_body_bytes} bytes"
        )
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_WITHIN_S):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, "timeout", f"the body did not arrive within {BODY_WITHIN_S:g} s"
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, and then what comes after it (the disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

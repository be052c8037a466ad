"""Who may ask, how much, and how many at a time.

Everything here happens before a body is parsed. Keys are compared in constant time, live in memory
only, and stand in no message.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

Role = Literal["search", "monitor", "admin"]
"""search: ask questions and read metrics. monitor: read metrics only. admin: all, and change the
generation that is served."""

_ROLES: dict[str, Role] = {"search": "search", "monitor": "monitor", "admin": "admin"}

KEYS_VARIABLE = "BIXSE_KEYS"
MIN_KEY_LENGTH = 16
BODY_WITHIN_S = 10.0

_HOST = re.compile(r"\[([^\]]+)\](?::\d+)?|([^:]+)(?::\d+)?")
OPEN = frozenset({"/", "/livez", "/readyz"})
_MONITORED = frozenset({"/metrics"})
_WORK = frozenset({"/search", "/v1/embeddings", "/retrieve"})
_SHED = {"rate_limited": "rate", "overloaded": "in_flight", "draining": "draining"}
"""What a refusal that bounds the load is called in the metrics."""


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
    read or holds no key, for an unknown role, and for a key that is short, repeated or not ASCII.
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
        role, colon, key = map(str.strip, line.partition(":"))
        if not colon or role not in _ROLES:
            raise ValueError(
                f"{source}, key {number}: expected search:KEY, monitor:KEY or admin:KEY"
            )
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(f"{source}, key {number}: shorter than {MIN_KEY_LENGTH} characters")
        if not key.isascii():
            raise ValueError(f"{source}, key {number}: a header can hold ASCII characters only")
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
        if _is_admin(path):
            raise ApiError(403, "forbidden", "no keys are configured: this route needs one (admin)")
        return
    if path in OPEN:
        return
    offered = _offered(headers)
    if not offered:
        raise ApiError(401, "unauthorized", "expected the header Authorization: Bearer KEY")
    role = keys.role_of(offered)
    if role is None:
        raise ApiError(401, "unauthorized", "the key is not known")
    if role == "monitor" and path not in _MONITORED:
        raise ApiError(403, "forbidden", "this key may read metrics, not search")
    if role != "admin" and _is_admin(path):
        raise ApiError(403, "forbidden", "this route needs a key of role admin")


def _offered(headers: Mapping[str, str]) -> str:
    """The key that a request brings, or nothing."""
    scheme, _, offered = headers.get("authorization", "").partition(" ")
    return offered.strip() if scheme.lower() == "bearer" else ""


def _is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


class Rate:
    """A token bucket a key: `per_s` requests a second, `burst` at once. Holds keys only as hashes.

    Only known keys come here, or no key where there are none, so that it holds few buckets.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: dict[bytes, tuple[float, float]] = {}

    def take(self, key: str) -> float:
        """Take a request of a key; gives 0, or the seconds until there is one to take."""
        name, now = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), self._clock()
        left, then = self._buckets.get(name, (float(self._burst), now))
        left = min(float(self._burst), left + (now - then) * self._per_s)
        if left < 1:
            self._buckets[name] = (left, now)
            return (1 - left) / self._per_s
        self._buckets[name] = (left - 1, now)
        return 0.0


class Places:
    """How many requests are worked on at a time, until no more are taken."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.taken = 0
        self.closed = False

    def close(self) -> None:
        """Take no more; those that are in stay until they are answered."""
        self.closed = True

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place. Raises ApiError 503 when closed, 429 when there is none."""
        if self.closed:
            raise draining()
        if self.taken >= self._most:
            raise ApiError(429, "overloaded", "too many requests are in flight: try again")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def draining() -> ApiError:
    """What is said to whoever asks a server that is about to stop."""
    return ApiError(503, "draining", "the server is stopping: ask another, or try again")


class Door:
    """ASGI middleware: key, its rate, a place among those in flight, a body of bounded size."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        places: Places,
        max_body_bytes: int,
        rate: Rate | None = None,
        shed: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """`shed` is told why a request was refused: `in_flight`, `rate` or `draining`."""
        self._app = app
        self._keys = keys
        self._places = places
        self._max_body_bytes = max_body_bytes
        self._rate = rate
        self._shed = shed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            client = scope.get("client")
            authorize(scope["path"], headers, client[0] if client else None, self._keys)
            if scope["path"] not in _WORK:
                # Changing a generation is no work to be shed, but its body is bounded too.
                if _is_admin(scope["path"]):
                    receive = _replay(await self._body(headers, receive), receive)
                await self._app(scope, receive, send)
                return
            # Without keys whatever is offered was not looked at, and may be another every time.
            key = _offered(headers) if self._keys else ""
            wait_s = self._rate.take(key) if self._rate else 0.0
            if wait_s:
                sentence = "this key has used up its requests: wait as long as Retry-After says"
                raise ApiError(429, "rate_limited", sentence, retry_after_s=ceil(wait_s))
            with self._places.one():
                body = await self._body(headers, receive)
                await self._app(scope, _replay(body, receive), send)
        except ApiError as error:
            if error.kind in _SHED:
                self._shed(_SHED[error.kind])
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

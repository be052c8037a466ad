"""The client of a chat-completions endpoint: requests in, choices or a failure out.

Everything that a stranger's server can do ends here: it may be slow, overloaded, silent, broken or
talk nonsense. A request is repeated (tenacity: exponential waits with full jitter, or what
Retry-After says) as long as repeating can help: by the clock where the server or the line fails,
since a rate limit or a restart takes its minutes, and a few times where a reply came and is itself
broken. Then it is an `Unreadable` with its reason, unless the endpoint does not answer the least
that it can be asked either: a spent quota or an outage is no fault of a pair, which is left for the
next run. What no repetition and no other pair can mend (a wrong key, model or address) is a
ValueError at once. Reading what the choices say is `bixse.judging.endpoint`.
"""

import asyncio
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import tenacity

from bixse.judging.asked import Usage
from bixse.judging.endpoint import Unreadable, choices_of, usage_of
from bixse.judging.settings import ChatEndpoint

MAX_REPLY_BYTES = 1 << 20
"""More than any honest reply to these requests; a server may send without end."""

SHOWN_CHARACTERS = 2000
"""How much of a reply a rejection keeps."""

PING = {"role": "user", "content": "1"}
"""What is asked to see whether an endpoint answers at all."""

REPEATED = frozenset({408, 409, 425, 429})
"""Statuses, beside 5xx, that a later attempt may not get."""


Reply = Sequence[Any] | Unreadable
"""The choices that came for a request, or why there are none."""


@dataclass(frozen=True, slots=True)
class Replies:
    """What came of some requests, in their order; None where nothing was waited for any more."""

    found: Sequence[Reply | None]
    usage: Usage
    """Of every reply that counts its tokens, of whatever attempt, also where it cannot be read: the
    endpoint charges for them all."""


class Cut(ValueError):
    """No request can succeed any more; `replies` are those that came before."""

    def __init__(self, sentence: str, replies: Replies) -> None:
        super().__init__(sentence)
        self.replies = replies


class Endpoint:
    """Loaded once in an actor, called often; connections live as long as one call."""

    def __init__(self, settings: ChatEndpoint) -> None:
        """Raises ValueError when the key's environment variable is not set here."""
        self._settings = settings
        self._key = _key(settings)
        self._not_before = 0.0
        self._heard = 0.0
        """When it last answered anything but "try again"."""

    def ask(self, bodies: Sequence[dict[str, Any]], choices: int) -> Replies:
        """`choices` choices for each request, in order, or why there are none.

        Raises Cut when no request can succeed: a wrong key, model or address, no money left, or no
        answer to anything.
        """
        return asyncio.run(self._ask(bodies, choices))

    async def _ask(self, bodies: Sequence[dict[str, Any]], choices: int) -> Replies:
        self._heard = time.monotonic()
        gate = asyncio.Semaphore(self._settings.concurrency)
        headers = {"content-type": "application/json", "user-agent": "bixse"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=self._settings.concurrency)
        # A redirect could carry the pairs elsewhere.
        async with httpx.AsyncClient(
            headers=headers, limits=limits, timeout=None, follow_redirects=False
        ) as client:
            line = _Line(client)
            tasks: list[asyncio.Task[Reply]] = []
            try:
                async with asyncio.TaskGroup() as group:
                    for body in bodies:
                        tasks.append(group.create_task(self._collect(line, gate, body, choices)))
            except ExceptionGroup as errors:
                # No further request can succeed: the first such error is raised.
                if (refused := errors.subgroup(ValueError)) is None:
                    raise
                came = Replies(list(map(_result_of, tasks)), line.usage)
                raise Cut(str(refused.exceptions[0]), came) from None
            found = [task.result() for task in tasks]
            late = next((one for one in found if isinstance(one, _Late)), None)
            if late is not None and not await self._answers(line, bodies[0]):
                before = [None if isinstance(one, _Late) else one for one in found]
                raise Cut(
                    f"{self._settings.base_url} does not answer ({late.reason}): what it has "
                    "answered so far is kept, and the same command asks for the rest",
                    Replies(before, line.usage),
                )
        return Replies(found, line.usage)

    async def _answers(self, line: "_Line", body: dict[str, Any]) -> bool:
        """Whether it answers when it is asked next to nothing."""
        try:
            await self._persist(line, {**body, "messages": [PING]}, 1)
        except (_Transient, _Forbidden, ValueError):
            return False
        except _Failed:
            return True
        return True

    async def _collect(
        self, line: "_Line", gate: asyncio.Semaphore, body: dict[str, Any], choices: int
    ) -> Reply:
        """Ask again for what is missing: not every endpoint knows `n`."""
        found: list[Any] = []
        async with gate:
            while (missing := choices - len(found)) > 0:
                whole = {**body, "n": missing} if missing > 1 else body
                try:
                    found += await self._persist(line, whole, missing)
                except _Transient as error:
                    return _Late(str(error), error.response)
                except _Forbidden as error:
                    if not await self._answers(line, body):
                        raise self._refusal(403, error.response) from None
                    return Unreadable(str(error), error.response)
                except _Failed as error:
                    return Unreadable(str(error), error.response)
        return found

    async def _persist(self, line: "_Line", body: dict[str, Any], most: int) -> list[Any]:
        """The choices of one reply, after as many attempts as it takes or may. Raises _Failed."""
        broken = 0

        def over(state: tenacity.RetryCallState) -> bool:
            nonlocal broken
            error = _error_of(state)
            if isinstance(error, _Broken):
                broken += 1
                return broken > self._settings.max_retries
            told = error.retry_after or 0.0 if isinstance(error, _Transient) else 0.0
            # Otherwise an endpoint that is gone would take this long of every request in turn.
            silent = time.monotonic() - self._heard
            trying = max(state.seconds_since_start or 0.0, silent)
            return trying + told >= self._settings.give_up_after_s

        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_Transient, _Broken)),
            stop=over,
            wait=self._wait,
            reraise=True,
        ):
            with attempt:
                await asyncio.sleep(self._not_before - time.monotonic())
                return await self._once(line, body, most)
        raise AssertionError("tenacity ends with a result or an exception")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = _error_of(state)
        told = error.retry_after if isinstance(error, _Transient) else None
        jitter = tenacity.wait_random_exponential(multiplier=0.5, max=self._settings.max_wait_s)
        wait = float(jitter(state))
        if told is None:
            return wait
        # Requests that were told the same must not all come back at the same moment.
        return max(wait, told + min(wait, 1.0))

    async def _once(self, line: "_Line", body: dict[str, Any], most: int) -> list[Any]:
        """One attempt. Raises _Transient, _Broken, _Failed or ValueError."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                status, headers, data = await self._send(line.client, body)
        except TimeoutError:
            raise _Transient(f"no whole reply in {self._settings.timeout_s:g} s") from None
        except httpx.DecodingError as error:
            raise _Broken(f"the connection failed ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            raise _Transient(f"the connection failed ({type(error).__name__})") from None
        shown = self._shown(data)
        if status not in REPEATED and status < 500:
            self._heard = time.monotonic()
        try:
            reply, broken = json.loads(data), ""
        except RecursionError:
            reply, broken = None, "the reply is nested without end"
        except ValueError:
            reply, broken = None, "the reply is not JSON"
        line.usage += usage_of(reply)  # Before anything is made of it.
        if status != 200:
            raise self._status(status, headers, shown)
        if broken:
            raise _Broken(broken, response=shown)
        try:
            return choices_of(reply, most)
        except ValueError as error:
            raise _Broken(str(error), response=shown) from None

    async def _send(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> tuple[int, httpx.Headers, bytes]:
        # Escaped to ASCII: a lone surrogate in a corpus is no reason to fail.
        content = json.dumps(body).encode()
        url = f"{self._settings.base_url}/chat/completions"
        data = bytearray()
        async with client.stream("POST", url, content=content) as reply:
            async for chunk in reply.aiter_bytes():
                data += chunk
                if len(data) > MAX_REPLY_BYTES:
                    shown = self._shown(bytes(data))
                    raise _Broken(f"the reply exceeds {MAX_REPLY_BYTES} bytes", response=shown)
            return reply.status_code, reply.headers, bytes(data)

    def _status(self, status: int, headers: httpx.Headers, shown: str) -> Exception:
        if status in (401, 402, 404) or 300 <= status < 400 or "insufficient_quota" in shown:
            return self._refusal(status, shown)
        if status == 403:
            return _Forbidden(f"status {status}", response=shown)
        if status not in REPEATED and status < 500:
            return _Failed(f"status {status}", response=shown)
        told = retry_after(headers.get("retry-after"), datetime.now(UTC))
        if told is not None and told > self._settings.give_up_after_s:
            reason = f"status {status}, to be repeated after {told:.0f} s"
            return _Transient(reason, response=shown, retry_after=told)
        if status == 429 and told is not None:
            # What one request was told holds for all.
            self._not_before = max(self._not_before, time.monotonic() + told)
        return _Transient(f"status {status}", response=shown, retry_after=told)

    def _refusal(self, status: int, shown: str) -> ValueError:
        said = f"{self._settings.base_url} answered {status}"
        return ValueError(f"{said}, check the address, model and key: {shown[:200]}")

    def _shown(self, data: bytes) -> str:
        """What a rejection or a sentence quotes; some servers echo the key."""
        text = data[: 4 * SHOWN_CHARACTERS].decode(errors="replace")
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(text[:SHOWN_CHARACTERS].split())


class _Line:
    """The connections of one call, and the tokens of all that came over them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.usage = Usage()


class _Late(Unreadable):
    """No answer in the time that there was; perhaps there is none to any request."""


def _result_of(task: "asyncio.Task[Reply]") -> Reply | None:
    return None if task.cancelled() or task.exception() else task.result()


def retry_after(header: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for; None when there is none or it means nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        seconds = (until - now).total_seconds()
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def endpoint_name(settings: ChatEndpoint) -> str:
    """Who judged: model, address, and the settings that change an answer."""
    how = f"votes={settings.votes}" if settings.votes else f"top_logprobs={settings.top_logprobs}"
    extra = "" if settings.extra == "{}" else f":extra={settings.extra}"
    return f"{settings.model}@{settings.base_url}:{how}:orders={settings.orders}{extra}"


def check_endpoint(settings: ChatEndpoint) -> None:
    """Raises ValueError when the address or the model is missing."""
    for name in ("base_url", "model"):
        if not getattr(settings, name):
            raise ValueError(
                f"--judging.judge openai needs --judging.openai.{name.replace('_', '-')}"
            )


def check_key(settings: ChatEndpoint) -> None:
    """Raises ValueError when the key is missing; whoever asks nothing needs none."""
    _key(settings)


def _key(settings: ChatEndpoint) -> str:
    name = settings.api_key_env
    if name and not os.environ.get(name):
        raise ValueError(
            f"environment variable {name} holds no key for {settings.base_url}: set it for every "
            "worker, or --judging.openai.api-key-env '' where none is needed"
        )
    key = os.environ[name].strip() if name else ""
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"environment variable {name} holds no key: it is not printable ASCII")
    return key


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


class _Failed(Exception):
    """This request has no answer; repeating it would not help."""

    def __init__(self, reason: str, response: str = "") -> None:
        super().__init__(reason)
        self.response = response


class _Forbidden(_Failed):
    """Of all requests, by a wrong key, or of this one, by who moderates or guards the endpoint."""


class _Broken(_Failed):
    """A reply came that cannot be read; another may be whole."""


class _Transient(_Failed):
    """The server or the line has failed this attempt; in time that may mend."""

    def __init__(self, reason: str, response: str = "", retry_after: float | None = None) -> None:
        super().__init__(reason, response)
        self.retry_after = retry_after

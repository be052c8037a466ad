"""A client of the HTTP interface, sync and async.

    with Client("http://127.0.0.1:8000", key="…") as client:
        for hit in client.search("merge two sorted iterables", k=5).hits:
            print(hit.rank, hit.doc_id, hit.score)

    client.search("merge", filter={"brand": "acme", "price": {"lt": 10}})
    client.search("E1234", mode="hybrid")  # or lexical, of an index that was built with BM25
    client.search("merge", feedback={"documents": 3, "weight": 0.5})
    client.search("merge", k=5, rerank=50)  # of an application that was started with --reranker

    async with AsyncClient("https://search.example", key="…") as client:
        results = await client.search_many(["a", "b"])

429 and 503 are tried again as `Retry-After` says, within `retry_for_s`; all else is raised at once.
What is told is told: an answer that does not cover the whole index says so in `coverage`, and
`allow_partial=False` refuses it.
"""

import base64
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import numpy as np
import numpy.typing as npt
import tenacity

_RETRIED = (429, 503)
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_ON_THE_WAY_S = 5.0
"""What an answer may come later than the `timeout_ms` that the server was given for it."""


class ServerError(Exception):
    """What the server refused, in its words."""

    def __init__(
        self, status: int, kind: str, message: str, param: str | None, retry_after_s: float | None
    ) -> None:
        super().__init__(f"{status} {kind}: {message}" + (f" ({param})" if param else ""))
        self.status, self.kind, self.message, self.param = status, kind, message, param
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Side:
    """Where a hit stands in a ranking that this one was made of: of mode hybrid by vectors (`score`
    is cosine) and by words (BM25), of a reranked one as it was found.
    """

    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One document found; `rank` counts from 1, `score` is cosine unless another `mode` was asked
    for (BM25, or what the fusion gives), or the hit was reranked (log-odds). A server with
    `--swap-share` shows some lists with two neighbours changed: `rank` says where a hit stands.
    """

    doc_id: str
    score: float
    rank: int
    title: str | None = None
    text: str | None = None
    metadata: dict[str, Any] | None = None
    dense: Side | None = None
    lexical: Side | None = None
    first_stage: Side | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """The rankings of one request, and what they have seen."""

    rankings: list[list[SearchHit]]
    coverage: float
    """Part of the index's documents that answered, in [0, 1]."""
    generation: int
    index: str
    encoder: str
    reranker: str | None = None
    """Fingerprint of the reranker, where it has ordered the hits."""
    degraded: tuple[tuple[str, str], ...] = ()
    """Which shards gave no answer, or that the `reranker` gave none, and why."""
    request_id: str | None = None
    """By which the server's request log knows this answer, where it keeps one."""

    @property
    def hits(self) -> list[SearchHit]:
        """The ranking of the first (or only) query."""
        return self.rankings[0]


class Client:
    """Blocking. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retry_for_s = retry_for_s
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=url, headers=_headers(key), transport=transport)

    def search(self, query: str, k: int = 10, **more: Any) -> Results:
        """The best `k` documents; `more` as in `POST /search`. Raises ServerError, httpx errors."""
        return _results(self._post("/search", {"query": query, "k": k, **more}))

    def search_many(self, queries: Sequence[str], k: int = 10, **more: Any) -> Results:
        """As `search`, a ranking for each query. Raises TypeError for a single text."""
        return _results(self._post("/search", {"queries": _several(queries), "k": k, **more}))

    def embed(
        self,
        texts: Sequence[str],
        input_type: Literal["query", "document"] = "query",
        model: str = "bixse",
    ) -> npt.NDArray[np.float32]:
        """Unit vectors [len(texts), dim]. Raises as `search_many`."""
        return _vectors(self._post("/v1/embeddings", _embed(texts, input_type, model)))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        within_s = _within_s(self._timeout_s, body)
        for attempt in tenacity.Retrying(**_policy(self._retry_for_s)):
            with attempt:
                return _read(self._http.post(path, json=body, timeout=within_s))
        raise AssertionError("tenacity returns or raises")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for asyncio."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry_for_s = retry_for_s
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), transport=transport)

    async def search(self, query: str, k: int = 10, **more: Any) -> Results:
        """As `Client.search`."""
        return _results(await self._post("/search", {"query": query, "k": k, **more}))

    async def search_many(self, queries: Sequence[str], k: int = 10, **more: Any) -> Results:
        """As `Client.search_many`."""
        asked = {"queries": _several(queries), "k": k, **more}
        return _results(await self._post("/search", asked))

    async def embed(
        self,
        texts: Sequence[str],
        input_type: Literal["query", "document"] = "query",
        model: str = "bixse",
    ) -> npt.NDArray[np.float32]:
        """As `Client.embed`."""
        return _vectors(await self._post("/v1/embeddings", _embed(texts, input_type, model)))

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        within_s = _within_s(self._timeout_s, body)
        async for attempt in tenacity.AsyncRetrying(**_policy(self._retry_for_s)):
            with attempt:
                return _read(await self._http.post(path, json=body, timeout=within_s))
        raise AssertionError("tenacity returns or raises")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def _policy(retry_for_s: float) -> dict[str, Any]:
    """Again while the server says that later is right and there is time to wait so long."""
    start = time.monotonic()
    backoff = tenacity.wait_exponential_jitter(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)

    def wait_s(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        told = error.retry_after_s if isinstance(error, ServerError) else None
        return max(backoff(state), told or 0.0)

    def again(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return isinstance(error, ServerError) and error.status in _RETRIED

    def enough(state: tenacity.RetryCallState) -> bool:
        return time.monotonic() - start + wait_s(state) > retry_for_s

    return {"retry": again, "wait": wait_s, "stop": enough, "reraise": True}


def _within_s(timeout_s: float, body: dict[str, Any]) -> float:
    """How long to wait for an answer: no shorter than the server was told that it may take."""
    asked_ms = body.get("timeout_ms")
    if not isinstance(asked_ms, int | float):
        return timeout_s
    return max(timeout_s, asked_ms / 1000 + _ON_THE_WAY_S)


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _read(reply: httpx.Response) -> Any:
    """The body of an answer. Raises ServerError for a refusal, and for what is no JSON."""
    if reply.status_code == 200:
        with contextlib.suppress(ValueError):
            return reply.json()
    try:
        error = reply.json()["error"]
        kind, message, param = error["type"], error["message"], error.get("param")
    except (ValueError, KeyError, TypeError):
        kind, message, param = "unknown", reply.text[:200] or reply.reason_phrase, None
    wait_s = _wait_s(reply.headers.get("retry-after", ""))
    raise ServerError(reply.status_code, kind, message, param, wait_s)


def _wait_s(after: str) -> float | None:
    """What `Retry-After` says, seconds or a date (RFC 9110, 10.2.3); None where it is neither."""
    if after.isdecimal():
        return float(after)
    try:
        then = parsedate_to_datetime(after)
    except ValueError:
        return None
    return max(0.0, (then - datetime.now(UTC)).total_seconds()) if then.tzinfo else None


def _results(body: dict[str, Any]) -> Results:
    rankings = body["results"] if "results" in body else [body["hits"]]
    return Results(
        rankings=[[_hit(hit) for hit in ranking] for ranking in rankings],
        coverage=body["coverage"]["fraction"],
        generation=body["index"]["generation"],
        index=body["index"]["fingerprint"],
        encoder=body["encoder"],
        reranker=body.get("reranker"),
        degraded=tuple((part["shard"], part["reason"]) for part in body["coverage"]["degraded"]),
        request_id=body.get("request_id"),
    )


def _hit(hit: dict[str, Any]) -> SearchHit:
    sides: dict[str, Any] = {
        name: Side(hit[name]["score"], hit[name]["rank"])
        for name in ("dense", "lexical", "first_stage")
        if name in hit
    }
    # A server of a later version may say more.
    known = {one.name: hit[one.name] for one in fields(SearchHit) if one.name in hit}
    return SearchHit(**(known | sides))


def _embed(texts: Sequence[str], input_type: str, model: str) -> dict[str, Any]:
    request = {"input": _several(texts), "model": model, "input_type": input_type}
    return {**request, "encoding_format": "base64"}


def _several(texts: Sequence[str]) -> list[str]:
    """A text is a sequence of texts too: of its letters."""
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, found one text: [{texts[:50]!r}]?")
    return list(texts)


def _vectors(body: dict[str, Any]) -> npt.NDArray[np.float32]:
    rows = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in body["data"]]
    return np.stack(rows).astype(np.float32)

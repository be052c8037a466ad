"""Routes and status codes.

`application` is a plain ASGI application over an `Engine`; it knows nothing of Ray.
"""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.middleware import Middleware

from bixse.models.encoder import Role
from serve.access import Door, Keys, Places, Rate, draining
from serve.errors import FAILURES, HANDLERS, ApiError
from serve.fanout import Answer, Verdict, Way, verdict
from serve.generation import Generation
from serve.ledger import Outcome
from serve.messages import Encoded, RefusedText
from serve.metrics import Metered, Metrics
from serve.ranking import hits_of, way_of
from serve.request_log import RequestLog, line_of, request_id_of
from serve.schema import (
    ChangeRequest,
    CoverageReply,
    EmbeddingReply,
    EmbeddingsReply,
    EmbeddingsRequest,
    ErrorReply,
    GenerationReply,
    GenerationsReply,
    IndexReply,
    RetrieveRequest,
    SearchReply,
    SearchRequest,
    UsageReply,
)
from serve.settings import ServeArgs, ServedIndex

PAGE = Path(__file__).with_name("page.html")


class Session(Protocol):
    """One generation, for one request. Deadlines are times of the running loop.

    All methods raise TimeoutError, RefusedText for a text that cannot be encoded, and Unavailable.
    """

    generation: Generation

    async def search(
        self, queries: Sequence[str], k: int, with_fields: bool, deadline: float
    ) -> Answer:
        """Rankings of all queries, over the shards that answered."""

    async def search_words(
        self, queries: Sequence[str], k: int, with_fields: bool, way: Way, deadline: float
    ) -> Answer:
        """As `search`, by words or by words and vectors; the index must have `lexical`."""

    async def embed(self, texts: Sequence[str], role: Role, deadline: float) -> list[Encoded]:
        """Vectors of all texts."""


class Engine(Protocol):
    """What answers."""

    def pinned(self) -> AbstractContextManager[Session]:
        """The generation that is current now, kept while a request uses it."""

    async def change(self, index: str, encoder: str | None) -> Outcome:
        """Load, verify, gate and turn to another generation, or refuse and keep this one."""

    async def roll_back(self) -> Outcome:
        """Turn to the generation before the current one."""

    async def generations(self) -> Outcome:
        """What is served."""

    async def canary(self) -> str | None:
        """Why the canary query did not give its known answer, or None when it did."""


class Handlers:
    """The routes over one engine."""

    def __init__(
        self, engine: Engine, args: ServeArgs, places: Places, request_log: RequestLog | None
    ) -> None:
        self._engine = engine
        self._args = args
        self._places = places
        self._request_log = request_log

    async def search(self, request: SearchRequest, http: Request) -> SearchReply:
        start = time.perf_counter()
        many = request.queries is not None
        texts = request.queries or [request.query or ""]
        self._check_texts(texts, "queries" if many else "query")
        self._check_k(request.k, len(texts), "k")
        with self._engine.pinned() as session:
            served = session.generation
            answer = await self._engine_search(session, texts, request)
        request_id = None
        if self._request_log is not None:
            request_id = request_id_of(http.headers.get("x-request-id"))
            self._request_log.put(
                line_of(request_id, texts, request.k, answer, served, self._args.policy)
            )
        rankings = [hits_of(found) for found in answer.results]
        total_ms = round((time.perf_counter() - start) * 1e3, 3)
        return SearchReply(
            hits=None if many else rankings[0],
            results=rankings if many else None,
            coverage=CoverageReply.model_validate(answer.coverage, from_attributes=True),
            index=IndexReply(
                generation=served.number,
                fingerprint=served.index.fingerprint,
                modes=served.index.modes,
            ),
            encoder=served.index.encoder,
            timing_ms={**answer.timing_ms, "total": total_ms},
            request_id=request_id,
        )

    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsReply:
        self._check_texts(request.input, "input")
        with self._engine.pinned() as session:
            self._check_model(request, session.generation.index)
            try:
                encoded = await session.embed(
                    request.input, request.input_type, self._deadline(None)
                )
            except RefusedText as error:
                raise _refused(error, "input", many=True) from None
        tokens = sum(e.tokens for e in encoded)
        return EmbeddingsReply(
            data=[
                EmbeddingReply(index=i, embedding=_vector(e, request.encoding_format))
                for i, e in enumerate(encoded)
            ],
            model=request.model,
            usage=UsageReply(prompt_tokens=tokens, total_tokens=tokens),
        )

    async def retrieve(self, request: RetrieveRequest) -> dict[str, Any]:
        self._check_texts(request.queries, "queries")
        k = 10 if request.topk is None else request.topk
        self._check_k(k, len(request.queries), "topk")
        # The shape has no room to say that an answer is partial, so it never is.
        whole = SearchRequest(queries=request.queries, k=k, allow_partial=False)
        with self._engine.pinned() as session:
            answer = await self._engine_search(session, request.queries, whole)
        results: list[list[dict[str, Any]]] = []
        for found in answer.results:
            fields = zip(found.hits, found.documents or (), strict=True)
            documents = [
                ({"id": d.doc_id, "contents": f"{d.title}\n{d.text}"}, hit.score)
                for hit, d in fields
            ]
            results.append(
                [{"document": d, "score": s} for d, s in documents]
                if request.return_scores
                else [d for d, _ in documents]
            )
        return {"result": results}

    async def livez(self) -> dict[str, str]:
        return {"status": "live"}

    async def readyz(self) -> dict[str, Any]:
        if self._places.closed:
            raise draining()
        problem = await self._engine.canary()
        if problem is not None:
            raise ApiError(503, "not_ready", problem)
        with self._engine.pinned() as session:
            served = session.generation
        return {
            "status": "ready",
            "index": served.index.fingerprint,
            "generation": served.number,
        }

    async def change(self, request: ChangeRequest) -> GenerationsReply:
        if request.index is None:
            return _generations(await self._engine.roll_back())
        return _generations(await self._engine.change(request.index, request.encoder))

    async def generations(self) -> GenerationsReply:
        return _generations(await self._engine.generations())

    async def _engine_search(
        self, session: Session, texts: Sequence[str], request: SearchRequest
    ) -> Answer:
        deadline = self._deadline(request.timeout_ms)
        asked = (texts, request.k, request.include_text)
        way = way_of(request, session.generation.index)
        try:
            if way is None:
                answer = await session.search(*asked, deadline)
            else:
                answer = await session.search_words(*asked, way, deadline)
        except RefusedText as error:
            field = "query" if request.queries is None else "queries"
            raise _refused(error, field, request.queries is not None) from None
        decided = verdict(
            answer.coverage, allow_partial=request.allow_partial, min_coverage=request.min_coverage
        )
        if decided is Verdict.TIMEOUT:
            raise TimeoutError
        if decided is Verdict.UNAVAILABLE:
            seen = answer.coverage
            reasons = ", ".join(f"{m.shard} {m.reason}" for m in seen.degraded)
            raise ApiError(
                503,
                "partial_coverage",
                f"{seen.shards_ok} of {seen.shards} shards answered, with {seen.fraction:.4f} of "
                f"the documents ({reasons})",
            )
        return answer

    def _check_model(self, request: EmbeddingsRequest, index: ServedIndex) -> None:
        if request.model not in (self._args.model, index.encoder):
            raise ApiError(
                404,
                "model_not_found",
                f"no model {request.model!r} here: this is {self._args.model!r}, "
                f"encoder {index.encoder}",
                "model",
            )
        if request.dimensions not in (None, index.dim):
            raise ApiError(
                422, "invalid_request", f"vectors have {index.dim} dimensions", "dimensions"
            )

    def _deadline(self, timeout_ms: int | None) -> float:
        if timeout_ms is not None and timeout_ms > self._args.max_timeout_ms:
            most = self._args.max_timeout_ms
            raise ApiError(422, "invalid_request", f"must be at most {most}", "timeout_ms")
        budget_ms = self._args.default_timeout_ms if timeout_ms is None else timeout_ms
        return asyncio.get_running_loop().time() + budget_ms / 1e3

    def _check_texts(self, texts: Sequence[str], field: str) -> None:
        if len(texts) > self._args.max_queries:
            raise ApiError(
                422, "invalid_request", f"must hold at most {self._args.max_queries} texts", field
            )
        if any(len(text) > self._args.max_text_length for text in texts):
            raise ApiError(
                422,
                "invalid_request",
                f"a text may have at most {self._args.max_text_length} characters",
                field,
            )

    def _check_k(self, k: int, queries: int, field: str) -> None:
        most = min(self._args.max_k, self._args.max_hits // queries)
        if k > most:
            message = f"must be at most {most} for {queries} queries"
            raise ApiError(422, "invalid_request", message, field)


def application(
    engine: Engine,
    args: ServeArgs,
    keys: Keys,
    metrics: Metrics,
    places: Places,
    request_log: RequestLog | None,
) -> FastAPI:
    """The ASGI application: routes behind keys and limits, every failure in one envelope."""
    handlers = Handlers(engine, args, places, request_log)
    metrics.in_flight.set_function(lambda: places.taken)
    page = PAGE.read_bytes()
    policy = _content_policy(page.decode())
    door = Middleware(
        Door,
        keys=keys,
        places=places,
        max_body_bytes=args.max_body_bytes,
        rate=None
        if args.requests_per_s is None
        else Rate(args.requests_per_s, args.requests_burst),
        shed=lambda reason: metrics.shed_total.labels(reason).inc(),
    )
    app = FastAPI(
        title="bixse",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Metered, metrics=metrics), door],
        exception_handlers=HANDLERS,
        responses={status: {"model": ErrorReply} for status in FAILURES},
    )
    app.post("/search", response_model_exclude_none=True)(handlers.search)
    app.post("/v1/embeddings")(handlers.embeddings)
    app.post("/retrieve")(handlers.retrieve)
    app.post("/admin/generation", response_model_exclude_none=True)(handlers.change)
    app.get("/admin/generation", response_model_exclude_none=True)(handlers.generations)
    app.get("/livez")(handlers.livez)
    app.get("/readyz")(handlers.readyz)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def search_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app


def _generations(outcome: Outcome) -> GenerationsReply:
    """Raises ApiError when the change was refused."""
    if outcome.problem is not None:
        if outcome.busy:
            raise ApiError(503, "unavailable", outcome.problem)
        kept = outcome.generations.current.number
        sentence = f"refused, generation {kept} is still served: {outcome.problem}"
        raise ApiError(422, "refused", sentence)
    held = outcome.generations
    return GenerationsReply(
        current=_generation(held.current),
        previous=None if held.previous is None else _generation(held.previous),
    )


def _generation(served: Generation) -> GenerationReply:
    return GenerationReply(
        generation=served.number,
        index=served.index.url,
        fingerprint=served.index.fingerprint,
        encoder=served.index.encoder,
    )


def _vector(encoded: Encoded, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return [float(x) for x in encoded.vector]
    return base64.b64encode(encoded.vector.astype("<f4").tobytes()).decode()


def _refused(error: RefusedText, field: str, many: bool) -> ApiError:
    param = f"{field}.{error.position}" if many else field
    return ApiError(422, "invalid_request", f"cannot be encoded: {error.reason}", param)


def _content_policy(page: str) -> str:
    """A policy that lets the page run its own script and style, and ask this server, only."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(block.encode()).digest() for block in blocks)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

"""Routes and status codes.

`application` is a plain ASGI application over an `Engine`; it knows nothing of Ray.
"""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.middleware import Middleware

from serve.access import OPEN, Door, Keys, Places, Rate, draining
from serve.engine import Engine
from serve.errors import FAILURES, HANDLERS, ApiError, invalid
from serve.generation import Generation
from serve.ledger import Outcome
from serve.limits import Limits, refused
from serve.messages import Encoded, RefusedText
from serve.metrics import Metered, Metrics
from serve.request_log import RequestLog
from serve.schema import (
    ChangeRequest,
    EmbeddingReply,
    EmbeddingsReply,
    EmbeddingsRequest,
    ErrorReply,
    GenerationReply,
    GenerationsReply,
    UsageReply,
)
from serve.search import Searches
from serve.settings import ServeArgs, ServedIndex

PAGE = Path(__file__).with_name("page.html")


class Handlers:
    """The routes over one engine, but those that search."""

    def __init__(self, engine: Engine, args: ServeArgs, limits: Limits, places: Places) -> None:
        self._engine = engine
        self._args = args
        self._limits = limits
        self._places = places

    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsReply:
        self._limits.check_texts(request.input, "input")
        with self._engine.pinned() as session:
            self._check_model(request, session.generation.index)
            try:
                encoded = await session.embed(
                    request.input, request.input_type, self._limits.deadline(None)
                )
            except RefusedText as error:
                raise refused(error, "input", many=True) from None
        tokens = sum(e.tokens for e in encoded)
        return EmbeddingsReply(
            data=[
                EmbeddingReply(index=i, embedding=_vector(e, request.encoding_format))
                for i, e in enumerate(encoded)
            ],
            model=request.model,
            usage=UsageReply(prompt_tokens=tokens, total_tokens=tokens),
        )

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
        if request.rollback:
            return _generations(await self._engine.roll_back())
        wanted = (request.index, request.encoder, request.reranker)
        return _generations(await self._engine.change(*wanted))

    async def generations(self) -> GenerationsReply:
        return _generations(await self._engine.generations())

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
            raise invalid(f"vectors have {index.dim} dimensions", "dimensions")


def application(
    engine: Engine,
    args: ServeArgs,
    keys: Keys,
    metrics: Metrics,
    places: Places,
    request_log: RequestLog | None,
) -> FastAPI:
    """The ASGI application: routes behind keys and limits, every failure in one envelope."""
    limits = Limits(args)
    handlers = Handlers(engine, args, limits, places)
    searches = Searches(engine, limits, args.policy, metrics, request_log, args.swap_share)
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
    app.post("/search", response_model_exclude_none=True)(searches.search)
    app.post("/v1/embeddings")(handlers.embeddings)
    app.post("/retrieve")(searches.retrieve)
    app.post("/admin/generation", response_model_exclude_none=True)(handlers.change)
    app.get("/admin/generation", response_model_exclude_none=True)(handlers.generations)
    app.get("/livez")(handlers.livez)
    app.get("/readyz")(handlers.readyz)
    for path, probe in (("/livez", handlers.livez), ("/readyz", handlers.readyz)):
        # Some load balancers ask for no body.
        app.head(path, include_in_schema=False)(probe)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def search_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    if keys:
        _ask_for_keys(app.openapi())
    return app


def _ask_for_keys(document: dict[str, Any]) -> None:
    """Say in the OpenAPI document, which FastAPI makes once, what `Door` asks for."""
    document["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "A key of role search, or admin, which `/admin` needs; one of role "
            "monitor reads `/metrics` only",
        }
    }
    for path, methods in document["paths"].items():
        for operation in methods.values() if path not in OPEN else ():
            operation["security"] = [{"key": []}]


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
        reranker=None if served.reranker is None else served.reranker.fingerprint,
    )


def _vector(encoded: Encoded, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return [float(x) for x in encoded.vector]
    return base64.b64encode(encoded.vector.astype("<f4").tobytes()).decode()


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

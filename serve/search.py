"""Searches as HTTP asks for them: `/search` and `/retrieve`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request

from serve.engine import Engine, Session
from serve.errors import ApiError
from serve.fanout import Answer, Missing, Verdict, verdict
from serve.limits import Limits, refused
from serve.messages import RefusedText
from serve.metrics import Metrics
from serve.ranking import feedback_of, hits_of, wanted_of, way_of
from serve.request_log import RequestLog, line_of, request_id_of
from serve.schema import CoverageReply, IndexReply, RetrieveRequest, SearchReply, SearchRequest
from serve.swaps import Swaps


class Searches:
    """The routes that search one engine."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        policy: str,
        metrics: Metrics,
        request_log: RequestLog | None,
        swap_share: float = 0.0,
    ) -> None:
        """`policy` is what the request log calls this application's way to rank; in a share of the
        lists of `/search` two neighbours change places."""
        self._engine = engine
        self._limits = limits
        self._policy = policy
        self._metrics = metrics
        self._request_log = request_log
        self._swaps = Swaps(swap_share)

    async def search(self, request: SearchRequest, http: Request) -> SearchReply:
        start = time.perf_counter()
        many = request.queries is not None
        texts = request.queries or [request.query or ""]
        self._limits.check_texts(texts, "queries" if many else "query")
        self._limits.check_k(request.k, len(texts), "k")
        with self._engine.pinned() as session:
            served = session.generation
            if request.rerank is not None:
                asked = (request.rerank, request.k, len(texts))
                self._limits.check_rerank(*asked, served.reranker)
            answer = await self._answer(session, texts, request)
        answer, ranks = self._swaps.of(answer)
        request_id = None
        if self._request_log is not None:
            request_id = request_id_of(http.headers.get("x-request-id"))
            line = line_of(request_id, texts, request, answer, served, self._policy, ranks)
            self._request_log.put(line)
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
                metadata=served.index.metadata or None,
            ),
            encoder=served.index.encoder,
            reranker=answer.reranker,
            timing_ms={**answer.timing_ms, "total": total_ms},
            request_id=request_id,
        )

    async def retrieve(self, request: RetrieveRequest) -> dict[str, Any]:
        self._limits.check_texts(request.queries, "queries")
        k = 10 if request.topk is None else request.topk
        self._limits.check_k(k, len(request.queries), "topk")
        # The shape has no room to say that an answer is partial, so it never is.
        whole = SearchRequest(queries=request.queries, k=k, allow_partial=False)
        with self._engine.pinned() as session:
            answer = await self._answer(session, request.queries, whole)
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

    async def _answer(
        self, session: Session, texts: Sequence[str], request: SearchRequest
    ) -> Answer:
        deadline = self._limits.deadline(request.timeout_ms)
        reranks = request.rerank is not None
        asked = (texts, wanted_of(request, session.generation.index))
        way = way_of(request, session.generation.index)
        try:
            if way is None:
                answer = await session.search(*asked, deadline, feedback_of(request), reranks)
            else:
                answer = await session.search_words(*asked, way, deadline, reranks)
            self._metrics.coverage_ratio.observe(answer.coverage.fraction)
            self._count(answer.coverage.degraded)
            _refuse_parts(answer, request)
            if reranks:
                answer = await session.rerank(texts, answer, request.k, deadline)
        except RefusedText as error:
            field = "query" if request.queries is None else "queries"
            raise refused(error, field, request.queries is not None) from None
        if reranks and answer.reranker is None:
            missing = answer.coverage.degraded[-1]
            self._count([missing])
            if not request.allow_partial:
                raise _not_reranked(missing)
        if not request.include_text:
            bare = [replace(found, documents=None) for found in answer.results]
            answer = replace(answer, results=bare)
        return answer

    def _count(self, degraded: Sequence[Missing]) -> None:
        for missing in degraded:
            self._metrics.shard_missing_total.labels(missing.shard, missing.reason).inc()


def _refuse_parts(answer: Answer, request: SearchRequest) -> None:
    """Raises TimeoutError or ApiError where what the shards gave is no answer."""
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


def _not_reranked(missing: Missing) -> ApiError:
    if missing.reason == "late":
        message = (
            "the reranker did not answer before the deadline: allow more time with timeout_ms, or "
            "a smaller rerank"
        )
        return ApiError(504, "timeout", message)
    return ApiError(503, "partial_coverage", f"the reranker gave no scores ({missing.reason})")

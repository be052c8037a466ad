"""One generation's way from texts to rankings: batches, calls, coverage.

A backend does the work, over handles or in this process. The deadline of a request goes along on
each call; `serve.fanout` decides what a missing shard means.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from bixse.models.encoder import Role
from serve.backend import ask
from serve.batcher import Batcher
from serve.fanout import (
    Answer,
    Coverage,
    Feedback,
    Missing,
    Way,
    canary_problem,
    coverage,
    fused,
    moved,
    one_ranking,
)
from serve.generation import Generation
from serve.messages import (
    Encoded,
    EncodedBatch,
    FoundInSlot,
    Refused,
    RefusedText,
    Unavailable,
    Vectors,
    Wanted,
)
from serve.metrics import Metrics
from serve.settings import ServeArgs

if TYPE_CHECKING:
    from serve.reranking import Reranking

MERGE_RESERVE_S = 0.01
"""What is kept of a request's time for merging and answering."""

CANARY_WITHIN_S = 5.0
_CANARY_K = 10


class Backend(Protocol):
    """What encodes and searches. Deadlines are times of the running loop."""

    encoder_calls: int
    """Batches that the encoder takes at a time."""
    shard_calls: int
    """Batches that a slot of shards takes at a time."""

    def slots(self, generation: Generation) -> dict[str, list[str]]:
        """The shards of the index, by the slot that answers for them in one call."""

    async def encode(
        self, generation: Generation, role: Role, texts: list[str], deadline: float
    ) -> EncodedBatch:
        """Raises TimeoutError, and Unavailable when there is no encoder."""

    async def search(
        self,
        generation: Generation,
        slot: str,
        vectors_QD: Vectors,
        wanted: list[Wanted],
        deadline: float,
    ) -> list[FoundInSlot]:
        """Raises TimeoutError, NotHeld, Failed, or what Ray raises for a call that failed."""

    async def search_words(
        self,
        generation: Generation,
        slot: str,
        queries: list[str],
        wanted: list[Wanted],
        deadline: float,
    ) -> list[FoundInSlot]:
        """Raises as `search`."""


def _halfway(deadline: float) -> float:
    """When half of the time from now on is over."""
    return (asyncio.get_running_loop().time() + deadline) / 2


class _AskWords(NamedTuple):
    query: str
    wanted: Wanted


class _Ask(NamedTuple):
    vector: Vectors
    wanted: Wanted


class Lane:
    """Searches, reranks and embeds with one generation. Belongs to one event loop."""

    def __init__(
        self,
        generation: Generation,
        backend: Backend,
        args: ServeArgs,
        metrics: Metrics,
        reranking: "Reranking | None" = None,
    ) -> None:
        self.generation = generation
        self.index = generation.index
        self._reranking = reranking
        self._backend = backend
        self._args = args
        self._metrics = metrics
        self.queues: dict[str, Batcher[Any, Any]] = {}
        """By stage, the reranker's among them: whoever puts the lane in front measures them."""
        if reranking is not None:
            self.queues["rerank"] = reranking.queue
        self._encode: dict[Role, Batcher[str, Encoded | Refused]] = {
            "query": self._batcher(
                "encode_query", partial(self._call_encoder, "query"), backend.encoder_calls
            ),
            "document": self._batcher(
                "encode_document", partial(self._call_encoder, "document"), backend.encoder_calls
            ),
        }
        self._slots = backend.slots(generation)
        self._search: dict[str, Batcher[_Ask, FoundInSlot]] = {
            slot: self._batcher(slot, partial(self._call_slot, slot), backend.shard_calls)
            for slot in self._slots
        }
        self._words: dict[str, Batcher[_AskWords, FoundInSlot]] = {
            slot: self._batcher(
                f"{slot}_words", partial(self._call_words, slot), backend.shard_calls
            )
            for slot in (self._slots if self.index.lexical else ())
        }

    async def search(
        self,
        queries: Sequence[str],
        wanted: Wanted,
        deadline: float,
        feedback: Feedback | None = None,
        reranked: bool = False,
    ) -> Answer:
        """Rankings of all queries over the shards that answer before the deadline; after `feedback`
        over those that answer twice. To be `reranked`, in half of the time left once encoded.

        Raises TimeoutError when the queries are not even encoded by then, RefusedText for a query
        that cannot be encoded, Unavailable when the encoder is gone.
        """
        start = time.perf_counter()
        vectors = [one.vector for one in await self.embed(queries, "query", deadline)]
        encoded_at = time.perf_counter()
        # A shard that hangs must leave time for what comes after the others' answers.
        deadline = _halfway(deadline) if reranked else deadline
        missing: dict[str, Missing] = {}
        if feedback is not None:
            near = replace(wanted, k=feedback.documents, with_fields=False, with_vectors=True)
            asks = [_Ask(vector, near) for vector in vectors]
            first = await self._by_vectors(asks, _halfway(deadline), missing)
            if first:
                heads = zip(*first, strict=True)
                vectors = [moved(v, head, feedback) for v, head in zip(vectors, heads, strict=True)]
        asks = [_Ask(vector, wanted) for vector in vectors]
        rankings = await self._by_vectors(asks, deadline, missing)
        searched_at = time.perf_counter()
        results = [one_ranking(found, wanted.k) for found in zip(*rankings, strict=True)]
        timing_ms = _timing_ms(start, encoded_at, searched_at)
        return Answer(results, self._coverage(missing), timing_ms, feedback=feedback)

    async def _by_vectors(
        self, asks: list[_Ask], deadline: float, missing: dict[str, Missing]
    ) -> list[list[FoundInSlot]]:
        """What each slot finds that is not `missing` yet; those that become so are added."""
        slots = [slot for slot in self._slots if slot not in missing]
        until = deadline - MERGE_RESERVE_S
        replies = await asyncio.gather(*(ask(s, self._search[s], asks, until) for s in slots))
        missing |= {reply.shard: reply for reply in replies if isinstance(reply, Missing)}
        return [reply for reply in replies if not isinstance(reply, Missing)]

    async def search_words(
        self,
        queries: Sequence[str],
        wanted: Wanted,
        way: Way,
        deadline: float,
        reranked: bool = False,
    ) -> Answer:
        """As `search`, by words or by words and vectors; a slot counts when it gave all asked."""
        start = time.perf_counter()
        depth = way.depth(wanted.k)
        deep = replace(wanted, k=depth)
        by_words = [_AskWords(query, deep) for query in queries]
        asked: list[tuple[dict[str, Batcher[Any, FoundInSlot]], list[Any]]]
        asked = [(self._words, by_words)]
        if way.mode == "hybrid":
            encoded = await self.embed(queries, "query", deadline)
            by_vectors = [_Ask(one.vector, deep) for one in encoded]
            asked.insert(0, (self._search, by_vectors))
        encoded_at = time.perf_counter()
        until = (_halfway(deadline) if reranked else deadline) - MERGE_RESERVE_S
        slots = list(self._slots)
        replies = await asyncio.gather(
            *(ask(s, batchers[s], asks, until) for batchers, asks in asked for s in slots)
        )
        searched_at = time.perf_counter()
        missing = {reply.shard: reply for reply in replies if isinstance(reply, Missing)}
        sides = []
        for first in range(0, len(replies), len(slots)):
            of_side = zip(slots, replies[first : first + len(slots)], strict=True)
            kept = [
                reply
                for slot, reply in of_side
                if slot not in missing and not isinstance(reply, Missing)
            ]
            sides.append([one_ranking(each, depth) for each in zip(*kept, strict=True)])
        results = sides[0]
        if way.mode == "hybrid":
            pairs = zip(sides[0], sides[1], strict=True)
            results = [fused(dense, lexical, way, wanted.k) for dense, lexical in pairs]
        timing_ms = _timing_ms(start, encoded_at, searched_at)
        return Answer(results, self._coverage(missing), timing_ms, way.mode)

    async def rerank(
        self, queries: Sequence[str], answer: Answer, k: int, deadline: float
    ) -> Answer:
        """As `Reranking.rerank`; only of a generation that has a reranker."""
        assert self._reranking is not None
        return await self._reranking.rerank(queries, answer, k, deadline)

    async def embed(self, texts: Sequence[str], role: Role, deadline: float) -> list[Encoded]:
        """Vectors of all texts. Raises TimeoutError, RefusedText, Unavailable."""
        results = await self._encode[role].submit(texts, deadline)
        encoded: list[Encoded] = []
        for position, result in enumerate(results):
            if isinstance(result, Refused):
                raise RefusedText(position, result.reason)
            encoded.append(result)
        return encoded

    async def canary(self) -> str | None:
        """Why the canary query did not give its known answer, or a score by the reranker; or None
        when it did.
        """
        known = self.index.canary
        deadline = asyncio.get_running_loop().time() + CANARY_WITHIN_S
        try:
            answer = await self.search([known.query], Wanted(_CANARY_K, False), deadline)
        except TimeoutError:
            return f"the canary query was not encoded within {CANARY_WITHIN_S:g} s"
        except (RefusedText, Unavailable) as error:
            return f"the canary query failed: {error}"
        problem = canary_problem(known, answer)
        if problem is None and self._reranking is not None:
            return await self._reranking.problem(known.query)
        return problem

    async def _call_slot(self, slot: str, asks: list[_Ask], deadline: float) -> list[FoundInSlot]:
        vectors_QD = np.stack([ask.vector for ask in asks])
        wanted = [ask.wanted for ask in asks]
        with self._metrics.shard_seconds.labels(slot).time():
            return await self._backend.search(self.generation, slot, vectors_QD, wanted, deadline)

    async def _call_words(
        self, slot: str, asks: list[_AskWords], deadline: float
    ) -> list[FoundInSlot]:
        queries, wanted = [ask.query for ask in asks], [ask.wanted for ask in asks]
        with self._metrics.shard_seconds.labels(slot).time():
            return await self._backend.search_words(
                self.generation, slot, queries, wanted, deadline
            )

    async def _call_encoder(
        self, role: Role, texts: list[str], deadline: float
    ) -> list[Encoded | Refused]:
        with self._metrics.encode_seconds.time():
            return list(await self._backend.encode(self.generation, role, texts, deadline))

    def _coverage(self, missing: Mapping[str, Missing]) -> Coverage:
        """What is left of the index without the shards of the slots that are missing."""
        return coverage(
            self.index.shard_rows,
            [
                Missing(shard, of_slot.reason)
                for slot, of_slot in missing.items()
                for shard in self._slots[slot]
            ],
        )

    def _batcher(
        self,
        stage: str,
        call: Callable[[list[Any], float], Awaitable[Sequence[Any]]],
        concurrency: int,
    ) -> Batcher[Any, Any]:
        batcher: Batcher[Any, Any] = Batcher(
            call,
            size=self._args.batch_size,
            wait_s=self._args.batch_wait_ms / 1e3,
            concurrency=concurrency,
            observe_size=self._metrics.batch_size.labels(stage).observe,
        )
        self.queues[stage] = batcher
        return batcher


def _timing_ms(start: float, encoded_at: float, searched_at: float) -> dict[str, float]:
    """What the stages of a search took; merging ends now."""
    seconds = {
        "encode": encoded_at - start,
        "search": searched_at - encoded_at,
        "merge": time.perf_counter() - searched_at,
    }
    return {name: round(took * 1e3, 3) for name, took in seconds.items()}

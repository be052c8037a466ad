"""The deployment that HTTP reaches: it batches, asks encoder and shards, and merges.

One handle call to the encoder and one to each shard serve all requests of a batch. The deadline of
a request goes along on each hop; `serve.fanout` decides what a missing shard means.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray.serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from bixse.models.encoder import Role
from serve.access import load_keys
from serve.api import GENERATION, application
from serve.batcher import Batcher
from serve.fanout import Answer, Coverage, Missing, canary_problem, coverage, one_ranking
from serve.messages import Encoded, EncodedBatch, Found, Refused, RefusedText, Unavailable, Vectors
from serve.metrics import Metrics
from serve.settings import ServeArgs, ServedIndex

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp

CALLS_A_REPLICA = 2
"""Batches handed to a replica at a time: it works on one while the next is on its way."""

_MERGE_RESERVE_S = 0.01
"""What is kept of a request's time for merging and answering."""

_CANARY_WITHIN_S = 5.0
_CANARY_HOLDS_S = 1.0
_CANARY_K = 10


class _Ask(NamedTuple):
    vector: Vectors
    k: int
    with_fields: bool


@ray.serve.ingress()
class Gateway:
    """An `Engine` for `serve.api`, over deployment handles."""

    def __init__(
        self,
        args: ServeArgs,
        index: ServedIndex,
        encoder: "DeploymentHandle[Any]",
        shards: "dict[str, DeploymentHandle[Any]]",
    ) -> None:
        """Raises ValueError when the keys cannot be read."""
        self._args = args
        self._index = index
        self._keys = load_keys(args.keys_file, os.environ)
        self._metrics = Metrics()
        self._metrics.index_generation.set(GENERATION)
        self._encoder = encoder
        self._shards = shards
        self._encode: dict[Role, Batcher[str, Encoded | Refused]] = {
            "query": self._batcher(
                "encode_query", partial(self._call_encoder, "query"), args.encoder_replicas
            ),
            "document": self._batcher(
                "encode_document", partial(self._call_encoder, "document"), args.encoder_replicas
            ),
        }
        self._search: dict[str, Batcher[_Ask, Found]] = {
            name: self._batcher(name, partial(self._call_shard, name), args.replicas_per_shard)
            for name in shards
        }
        self._canary_lock = asyncio.Lock()
        self._canary_until = 0.0
        self._canary_said: str | None = None

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        return application(self, self._index, self._args, self._keys, self._metrics)

    async def search(
        self, queries: Sequence[str], k: int, with_fields: bool, deadline: float
    ) -> Answer:
        """Rankings of all queries over the shards that answer before the deadline.

        Raises TimeoutError when the queries are not even encoded by then, RefusedText for a query
        that cannot be encoded, Unavailable when the encoder is gone.
        """
        start = time.perf_counter()
        encoded = await self.embed(queries, "query", deadline)
        asks = [_Ask(one.vector, k, with_fields) for one in encoded]
        encoded_at = time.perf_counter()
        replies = await asyncio.gather(
            *(self._ask(name, asks, deadline - _MERGE_RESERVE_S) for name in self._shards)
        )
        searched_at = time.perf_counter()
        missing = [reply for reply in replies if isinstance(reply, Missing)]
        rankings = [reply for reply in replies if not isinstance(reply, Missing)]
        results = [one_ranking(found, k) for found in zip(*rankings, strict=True)]
        seen = coverage(self._index.shard_rows, missing)
        self._observe(seen)
        timing_ms = {
            "encode": (encoded_at - start) * 1e3,
            "search": (searched_at - encoded_at) * 1e3,
            "merge": (time.perf_counter() - searched_at) * 1e3,
        }
        return Answer(results, seen, {name: round(ms, 3) for name, ms in timing_ms.items()})

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
        """Why the canary query did not give its known answer, or None when it did.

        An answer holds for a second, so that probes cost no more than one query a second.
        """
        async with self._canary_lock:
            now = asyncio.get_running_loop().time()
            if now >= self._canary_until:
                self._canary_said = await self._ask_canary(now + _CANARY_WITHIN_S)
                self._canary_until = asyncio.get_running_loop().time() + _CANARY_HOLDS_S
            return self._canary_said

    async def _ask_canary(self, deadline: float) -> str | None:
        known = self._index.canary
        try:
            answer = await self.search([known.query], _CANARY_K, False, deadline)
        except TimeoutError:
            return f"the canary query was not encoded within {_CANARY_WITHIN_S:g} s"
        except (RefusedText, Unavailable) as error:
            return f"the canary query failed: {error}"
        return canary_problem(known, answer)

    async def _ask(self, name: str, asks: list[_Ask], deadline: float) -> list[Found] | Missing:
        """What one shard found for each query, or why it is missing."""
        try:
            return await self._search[name].submit(asks, deadline)
        except TimeoutError:
            return Missing(name, "late")
        except BackPressureError:
            return Missing(name, "shed")
        except (RayActorError, RayServeException):
            return Missing(name, "lost")
        except RayError:
            return Missing(name, "failed")

    async def _call_shard(self, name: str, asks: list[_Ask], deadline: float) -> list[Found]:
        vectors_QD = np.stack([ask.vector for ask in asks])
        ks, with_fields = [ask.k for ask in asks], [ask.with_fields for ask in asks]

        def call(budget_s: float) -> Any:
            return self._shards[name].search.remote(vectors_QD, ks, with_fields, budget_s)

        with self._metrics.shard_seconds.labels(name).time():
            # Without a second replica, asking again would only wait for the replacement to load.
            tries = 2 if self._args.replicas_per_shard > 1 else 1
            found: list[Found] = await _within(call, deadline, tries)
            return found

    async def _call_encoder(
        self, role: Role, texts: list[str], deadline: float
    ) -> list[Encoded | Refused]:
        def call(budget_s: float) -> Any:
            return self._encoder.encode.remote(texts, role, budget_s)

        with self._metrics.encode_seconds.time():
            try:
                batch: EncodedBatch = await _within(call, deadline, tries=2)
            except (RayActorError, RayServeException) as error:
                raise Unavailable("the encoder is not running") from error
        return list(batch)

    def _observe(self, seen: Coverage) -> None:
        self._metrics.coverage_ratio.observe(seen.fraction)
        for missing in seen.degraded:
            self._metrics.shard_missing_total.labels(missing.shard, missing.reason).inc()

    def _batcher(
        self,
        stage: str,
        call: Callable[[list[Any], float], Awaitable[Sequence[Any]]],
        replicas: int,
    ) -> Batcher[Any, Any]:
        batcher: Batcher[Any, Any] = Batcher(
            call,
            size=self._args.batch_size,
            wait_s=self._args.batch_wait_ms / 1e3,
            concurrency=CALLS_A_REPLICA * replicas,
            observe_size=self._metrics.batch_size.labels(stage).observe,
        )
        self._metrics.queue_depth.labels(stage).set_function(lambda: batcher.depth)
        return batcher


async def _within(call: Callable[[float], Any], deadline: float, tries: int) -> Any:
    """Await a handle call until the deadline, and once more when its replica died under it.

    Raises TimeoutError; what has not begun by then is cancelled.
    """
    for left in reversed(range(tries)):
        response = call(deadline - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout_at(deadline):
                return await response
        except TimeoutError:
            response.cancel()
            raise
        except RayActorError:
            if not left:
                raise
    raise AssertionError("tries is at least 1")

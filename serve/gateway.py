"""The deployments that HTTP reaches, and what stands behind their routes.

Each request is pinned to the generation that is current when it begins.
"""

import asyncio
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import ray.serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve.access import Places, load_keys
from serve.api import application
from serve.backend import Handles, Local
from serve.generation import Generation, ndcg_problem, recall_problem
from serve.heldout import heldout_ndcg
from serve.lane import Backend, Lane
from serve.ledger import Follower, Outcome
from serve.messages import Unavailable
from serve.metrics import Metrics
from serve.request_log import RequestLog
from serve.reranking import Reranking
from serve.settings import ServeArgs

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp

FRONT = "front"
"""The ledger's name for replicas that take requests."""

_CANARY_HOLDS_S = 1.0


class Front:
    """An `Engine` for the routes: lanes by generation, one of them current."""

    def __init__(
        self,
        args: ServeArgs,
        ledger: "DeploymentHandle[Any]",
        backend: Backend,
        metrics: Metrics,
        reranker: "DeploymentHandle[Any] | None",
    ) -> None:
        self._args = args
        self._ledger = ledger
        self._backend = backend
        self._reranker = reranker
        self._metrics = metrics
        self._lanes: dict[int, Lane] = {}
        self._current: Lane | None = None
        self._pins: Counter[int] = Counter()
        self._changes = 0
        self._canary_lock = asyncio.Lock()
        self._canary_until = 0.0
        self._canary_said: str | None = None

    async def load(self, generation: Generation) -> None:
        """Make a lane for what the backend can serve. Raises ValueError as `Local.load`."""
        if isinstance(self._backend, Local):
            await self._backend.load(generation)
        lane = self._lanes[generation.number] = self._lane(generation)
        for stage in lane.queues:
            self._metrics.queue_depth.labels(stage).set_function(partial(self._waiting, stage))

    def _waiting(self, stage: str) -> int:
        """Items that wait for a batch: in the current lane, and in one that is still pinned."""
        queues = (lane.queues.get(stage) for lane in self._lanes.values())
        return sum(queue.depth for queue in queues if queue is not None)

    def _lane(self, generation: Generation) -> Lane:
        args, metrics, reranking = self._args, self._metrics, None
        if self._reranker is not None:
            reranking = Reranking(generation, self._reranker, args, metrics)
        return Lane(generation, self._backend, args, metrics, reranking)

    def drop(self, number: int) -> None:
        """Forget a generation."""
        self._lanes.pop(number, None)
        if isinstance(self._backend, Local):
            self._backend.drop(number)

    def turn(self, generation: Generation) -> None:
        """Pin new requests to this generation."""
        self._current = self._lanes[generation.number]
        self._metrics.index_generation.set(generation.number)
        self._canary_until = 0.0

    def in_use(self) -> frozenset[int]:
        """What unfinished requests are pinned to."""
        return frozenset(number for number, count in self._pins.items() if count)

    @contextmanager
    def pinned(self) -> Iterator[Lane]:
        """The current generation, kept until the request is answered."""
        if self._current is None:
            raise Unavailable("no generation is loaded yet")
        lane = self._current
        self._pins[lane.generation.number] += 1
        try:
            yield lane
        finally:
            self._pins[lane.generation.number] -= 1

    async def canary(self) -> str | None:
        """Why the canary query did not give its known answer, or None when it did.

        An answer holds for a second, so that probes cost no more than one query a second.
        """
        async with self._canary_lock:
            now = asyncio.get_running_loop().time()
            if now >= self._canary_until:
                with self.pinned() as lane:
                    self._canary_said = await lane.canary()
                self._canary_until = asyncio.get_running_loop().time() + _CANARY_HOLDS_S
            return self._canary_said

    async def change(self, index: str | None, encoder: str | None, reranker: str | None) -> Outcome:
        """Load, verify and gate a new generation, and turn to it; or say why not.

        Raises Unavailable when the ledger is gone.
        """
        self._changes += 1
        try:
            return await self._change(index, encoder, reranker)
        finally:
            self._changes -= 1

    def changing(self) -> bool:
        """Whether somebody waits here for a change."""
        return self._changes > 0

    async def _change(
        self, index: str | None, encoder: str | None, reranker: str | None
    ) -> Outcome:
        wanted = (index, encoder, reranker)
        outcome = await self._ask_ledger("prepare", *wanted, self._args.load_within_s)
        if outcome.problem is not None:
            return outcome
        candidate = outcome.generations.candidate
        assert candidate is not None
        try:
            problem = await self._gate(candidate)
        except BaseException:
            await self._ask_ledger("settle", candidate.number, False)
            raise
        settled = await self._ask_ledger("settle", candidate.number, problem is None)
        return settled if problem is None else Outcome(settled.generations, problem)

    async def roll_back(self) -> Outcome:
        """Turn to the generation before this one. Raises Unavailable."""
        return await self._ask_ledger("roll_back", self._args.load_within_s)

    async def generations(self) -> Outcome:
        """What is served. Raises Unavailable."""
        return await self._ask_ledger("state")

    async def _gate(self, candidate: Generation) -> str | None:
        """Why a loaded generation must not be turned to."""
        args = self._args
        with self.pinned() as current:
            served = current.index.fingerprint
        # An index that is served already is no reason to refuse the reranker that would come to it.
        if candidate.index.fingerprint != served:
            problem = recall_problem(candidate.index, args.least_recall)
            if problem is not None:
                return problem
        lane = self._lane(candidate)
        problem = await lane.canary()
        queries, judgments = args.gate_queries, args.gate_judgments
        if problem is not None or queries is None or judgments is None:
            return problem
        with self.pinned() as current:
            try:
                most = max(1, min(args.max_queries, args.max_hits // args.gate_rerank))
                asked = (queries, judgments, most, args.gate_rerank)
                now = await heldout_ndcg(current, *asked)
                then = await heldout_ndcg(lane, *asked)
            except TimeoutError:
                return "the held-out queries were not all answered in time"
            except ValueError as error:
                return str(error)
        return ndcg_problem(now, then, args.gate_ndcg_drop)

    async def _ask_ledger(self, method: str, *ask: Any) -> Outcome:
        try:
            outcome: Outcome = await getattr(self._ledger, method).remote(*ask)
        except (RayError, RayServeException) as error:
            raise Unavailable("the ledger of generations is not running") from error
        return outcome


class _Ingress:
    """What both topologies' deployments do with a front."""

    _front: Front
    _request_log: RequestLog | None = None

    def __del__(self) -> None:
        """Write what waits for the request log: Serve calls this when the last request of a replica
        is answered, and then ends the process without a word to its threads.
        """
        if self._request_log is not None:
            self._request_log.close()

    async def _start(
        self,
        args: ServeArgs,
        ledger: "DeploymentHandle[Any]",
        backend: Backend,
        reranker: "DeploymentHandle[Any] | None",
    ) -> None:
        self._args = args
        self._keys = load_keys(args.keys_file, os.environ)
        several = args.topology == "replicate" and args.replicas > 1
        self._metrics = Metrics(uuid.uuid4().hex[:12] if several else None)
        self._places = places = Places(args.max_in_flight)
        self._front = front = Front(args, ledger, backend, self._metrics, reranker)
        if args.request_log is not None:
            self._request_log = RequestLog(
                args.request_log,
                args.request_log_bytes,
                args.request_log_files,
                self._metrics.request_log_lost_total.inc,
            )
        self._follower = Follower(
            ledger,
            FRONT,
            front.load,
            front.drop,
            turn=front.turn,
            in_use=front.in_use,
            close=places.close,
            in_flight=lambda: places.taken,
            changing=front.changing,
        )
        await self._follower.start()

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        return application(
            self._front, self._args, self._keys, self._metrics, self._places, self._request_log
        )


@ray.serve.ingress()
class Gateway(_Ingress):
    """Topology `shard`: batches, asks encoder and shards over handles, and merges."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self,
        args: ServeArgs,
        ledger: "DeploymentHandle[Any]",
        encoder: "DeploymentHandle[Any]",
        slots: "list[DeploymentHandle[Any]]",
        reranker: "DeploymentHandle[Any] | None" = None,
    ) -> None:
        """Raises ValueError when the keys cannot be read."""
        await self._start(args, ledger, Handles(encoder, slots, args), reranker)


@ray.serve.ingress()
class Replica(_Ingress):
    """Topology `replicate`: encoder and all shards in this process."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self,
        args: ServeArgs,
        ledger: "DeploymentHandle[Any]",
        reranker: "DeploymentHandle[Any] | None" = None,
    ) -> None:
        """Raises ValueError when the keys, the index or the encoder cannot be read."""
        self._local = Local(args)
        await self._start(args, ledger, self._local, reranker)

    async def check_health(self) -> None:
        """Raises RuntimeError as the stores' `check_health`."""
        await self._local.check_health()

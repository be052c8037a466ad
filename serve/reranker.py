"""The reranker: pairs of query and document in, log-odds out."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.models.reranker import Reranker, trained_directory
from bixse.settings import Precision
from serve.fanout import RERANKER
from serve.generation import Generation
from serve.ledger import Follower
from serve.messages import NotHeld, ScoredPairs
from serve.reads import Reads

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_PROBE = ("the quick brown fox", "jumps over the lazy dog")
_CALL_TOKENS = 256
"""Tokens that a CPU multiplies in the time that a further call of the model costs it, at most: for
MiniLM about 40 in float32 and 100 in bfloat16, and half as much again for its smaller products."""
_SAME = 0.01
"""Log-odds by which two scores of one pair differ at most between batches, and far less mostly."""


class RerankerStore:
    """Loaded rerankers of some generations. They run on one thread, one batch at a time."""

    def __init__(self, threads: int, batch_tokens: int, precision: Precision = "float32") -> None:
        import torch

        torch.set_num_threads(threads)
        self._rerankers: dict[int, tuple[Reranker, float]] = {}
        self._reads = Reads()
        self._batch_tokens = batch_tokens
        self._precision = precision
        # OpenMP keeps its number of threads by thread: it must be set on the one that scores too.
        self._thread = ThreadPoolExecutor(
            1, "reranker", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def load(self, generation: Generation) -> None:
        """Load the reranker of a generation, unless it is the one of another already here.

        Raises ValueError as `Reranker.load`, and when it is not the one with the fingerprint.
        """
        wanted = generation.reranker
        assert wanted is not None
        directory = trained_directory(wanted.start)
        self._reads.begin(generation.number, directory.name)
        held = self._rerankers.values()
        same = [one for one in held if one[0].fingerprint == wanted.fingerprint]
        if not same:
            reranker = Reranker.load(str(directory), precision=self._precision)
            if reranker.fingerprint != wanted.fingerprint:
                raise ValueError(
                    f"expected reranker {wanted.fingerprint} at {wanted.start}, found "
                    f"{reranker.fingerprint}"
                )
            same = [(reranker, float(reranker.logits([_PROBE])[0]))]
        self._rerankers[generation.number] = same[0]

    def drop(self, number: int) -> None:
        """Forget a generation, and remove the copy of a remote reranker as `Reads.end`."""
        self._rerankers.pop(number, None)
        self._reads.end(number)

    async def score(
        self, number: int, pairs: Sequence[tuple[str, str]], budget_s: float
    ) -> ScoredPairs:
        """Score a batch; a pair that cannot be scored is refused alone.

        Raises TimeoutError when `budget_s` is over; what has not begun by then never begins. Raises
        NotHeld for a generation that is not loaded here.
        """
        held = self._rerankers.get(number)
        if held is None:
            raise NotHeld(f"the reranker of generation {number} is not loaded here")
        until = time.monotonic() + budget_s
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(
                self._thread, score_now, held[0], pairs, self._batch_tokens, until
            )

    async def check_health(self) -> None:
        """Raises RuntimeError when a probe's score is no longer what it was when loaded."""
        loop = asyncio.get_running_loop()
        for reranker, probe in {id(held[0]): held for held in self._rerankers.values()}.values():
            now = await loop.run_in_executor(self._thread, reranker.logits, [_PROBE])
            if not abs(float(now[0]) - probe) <= _SAME:
                raise RuntimeError("a reranker no longer gives the score that it gave when loaded")


class RerankServer:
    """The reranker, a deployment that follows the ledger."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self,
        ledger: "DeploymentHandle[Any]",
        threads: int,
        batch_tokens: int,
        precision: Precision,
    ) -> None:
        """Raises ValueError as `RerankerStore.load`."""
        self._store = store = RerankerStore(threads, batch_tokens, precision)

        async def load(generation: Generation) -> None:
            await asyncio.to_thread(store.load, generation)

        self._follower = Follower(ledger, RERANKER, load, store.drop)
        await self._follower.start()

    async def score(self, *ask: Any) -> ScoredPairs:
        """As `RerankerStore.score`."""
        return await self._store.score(*ask)

    async def check_health(self) -> None:
        await self._store.check_health()


def score_now(
    reranker: Reranker, pairs: Sequence[tuple[str, str]], batch_tokens: int, until: float
) -> ScoredPairs:
    """Score on this thread. A batch that fails is halved until the guilty are alone.

    Raises TimeoutError once the monotonic clock is past `until`, between calls of the model.
    """
    import torch

    from bixse.reading.chunks import cut

    try:
        lengths = reranker.lengths(pairs)
        order = np.argsort(-lengths, kind="stable")
        scores = np.empty(len(pairs), np.float32)
        for part in cut(lengths[order], _CALL_TOKENS, batch_tokens):
            if time.monotonic() > until:
                raise TimeoutError
            group = order[part]
            scores[group] = reranker.logits([pairs[position] for position in group], len(group))
        void = np.flatnonzero(~np.isfinite(scores)).tolist()
        return ScoredPairs(scores, dict.fromkeys(void, "its score is not finite"))
    except torch.OutOfMemoryError:
        if len(pairs) == 1:
            raise
        torch.cuda.empty_cache()
    except (ValueError, TypeError, IndexError) as error:
        if len(pairs) == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return ScoredPairs(np.zeros(1, np.float32), {0: reason})
    half = len(pairs) // 2
    left, right = (
        score_now(reranker, part, batch_tokens, until) for part in (pairs[:half], pairs[half:])
    )
    return ScoredPairs(
        np.concatenate([left.scores, right.scores]),
        {**left.refused, **{half + i: reason for i, reason in right.refused.items()}},
    )

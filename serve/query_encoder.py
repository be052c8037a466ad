"""The encoder: batches of texts in, unit vectors out."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.models.encoder import Encoder, Role, encoder_fingerprint, resolve
from bixse.settings import Precision
from serve.generation import Generation
from serve.ledger import Follower
from serve.messages import EncodedBatch, NotHeld, Vectors

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_PROBE = "the quick brown fox"
_SAME = 0.999
"""Cosine above which two encodings of one text are the same: bf16 batches differ by less."""


class EncoderStore:
    """Loaded encoders of some generations. They run on one thread, one batch at a time."""

    def __init__(self, threads: int, queries: Precision = "float32") -> None:
        """`queries`: as in `Encoder.load`."""
        import torch

        torch.set_num_threads(threads)
        self._queries = queries
        self._encoders: dict[int, tuple[Encoder, Vectors]] = {}
        # OpenMP keeps its number of threads by thread: it must be set on the one that encodes too.
        self._thread = ThreadPoolExecutor(
            1, "encoder", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def load(self, generation: Generation) -> None:
        """Load the encoder of a generation, unless it is the one of another already here.

        Raises ValueError when there is no encoder, or it is not the one that made the index.
        """
        start, index = generation.encoder, generation.index
        fingerprint = encoder_fingerprint(resolve(start))
        index.check_encoder(start, fingerprint)
        same = [held for held in self._encoders.values() if held[0].fingerprint == fingerprint]
        if not same:
            encoder = Encoder.load(start, queries=self._queries)
            # Of what was loaded, not of what stood there a moment before.
            index.check_encoder(start, encoder.fingerprint)
            same = [(encoder, encoder.encode([_PROBE], "query"))]
        self._encoders[generation.number] = same[0]

    def drop(self, number: int) -> None:
        """Forget a generation."""
        self._encoders.pop(number, None)

    async def encode(
        self, number: int, texts: Sequence[str], role: Role, budget_s: float
    ) -> EncodedBatch:
        """Encode a batch; a text that cannot be encoded is refused alone.

        Raises TimeoutError when `budget_s` is over; a batch not begun by then never begins. Raises
        NotHeld for a generation that is not loaded here.
        """
        held = self._encoders.get(number)
        if held is None:
            raise NotHeld(f"the encoder of generation {number} is not loaded here")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(self._thread, encode_now, held[0], texts, role)

    async def check_health(self) -> None:
        """Raises RuntimeError when a probe's vector is no longer what it was when loaded."""
        loop = asyncio.get_running_loop()
        for encoder, probe_1D in {id(held[0]): held for held in self._encoders.values()}.values():
            now_1D = await loop.run_in_executor(self._thread, encoder.encode, [_PROBE], "query")
            if not float((now_1D * probe_1D).sum()) > _SAME:
                raise RuntimeError("an encoder no longer gives the vector that it gave when loaded")


class QueryEncoder:
    """The encoder, a deployment that follows the ledger."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self, ledger: "DeploymentHandle[Any]", threads: int, queries: Precision
    ) -> None:
        """Raises ValueError as `EncoderStore.load`."""
        self._store = store = EncoderStore(threads, queries)

        async def load(generation: Generation) -> None:
            await asyncio.to_thread(store.load, generation)

        self._follower = Follower(ledger, "encoder", load, store.drop)
        await self._follower.start()

    async def encode(self, *ask: Any) -> EncodedBatch:
        """As `EncoderStore.encode`."""
        return await self._store.encode(*ask)

    async def check_health(self) -> None:
        await self._store.check_health()


def encode_now(encoder: Encoder, texts: Sequence[str], role: Role) -> EncodedBatch:
    """Encode on this thread. A batch that fails is halved until the guilty are alone."""
    try:
        return EncodedBatch(encoder.encode(texts, role), _count_tokens(encoder, texts))
    except (ValueError, TypeError, IndexError) as error:
        if len(texts) == 1:
            void_1D = np.zeros((1, encoder.dim), np.float32)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return EncodedBatch(void_1D, [0], {0: reason})
    half = len(texts) // 2
    left, right = encode_now(encoder, texts[:half], role), encode_now(encoder, texts[half:], role)
    return EncodedBatch(
        np.concatenate([left.vectors, right.vectors]),
        left.tokens + right.tokens,
        {**left.refused, **{half + i: reason for i, reason in right.refused.items()}},
    )


def _count_tokens(encoder: Encoder, texts: Sequence[str]) -> list[int]:
    """Tokens that the model reads of each text, after truncation, without its prompt."""
    model = encoder.model
    ids = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)
    return [len(row) for row in ids["input_ids"]]

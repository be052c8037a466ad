"""The encoder, a deployment: batches of texts in, unit vectors out."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bixse.models.encoder import Encoder, Role
from serve.messages import EncodedBatch
from serve.settings import ServedIndex

_PROBE = "the quick brown fox"
_SAME = 0.999
"""Cosine above which two encodings of one text are the same: bf16 batches differ by less."""


class QueryEncoder:
    """A loaded encoder. It runs on one thread of its own, one batch at a time."""

    def __init__(self, start: str, index: ServedIndex, threads: int) -> None:
        """Raises ValueError when `start` is no encoder, or not the one that made the index."""
        import torch

        torch.set_num_threads(threads)
        self._encoder = Encoder.load(start)
        index.check_encoder(start, self._encoder.fingerprint)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._probe_1D = self._encoder.encode([_PROBE], "query")

    async def encode(self, texts: Sequence[str], role: Role, budget_s: float) -> EncodedBatch:
        """Encode a batch; a text that cannot be encoded is refused alone.

        Raises TimeoutError when `budget_s` is over; a batch not begun by then never begins.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(self._thread, self.encode_now, texts, role)

    async def check_health(self) -> None:
        """Raises RuntimeError when the probe's vector is no longer what it was at the start."""
        loop = asyncio.get_running_loop()
        now_1D = await loop.run_in_executor(self._thread, self._encoder.encode, [_PROBE], "query")
        if not float((now_1D * self._probe_1D).sum()) > _SAME:
            raise RuntimeError("the encoder no longer gives the vector that it gave when loaded")

    def encode_now(self, texts: Sequence[str], role: Role) -> EncodedBatch:
        """As `encode`, on this thread. A batch that fails is halved until the guilty are alone."""
        import torch

        try:
            return EncodedBatch(self._encoder.encode(texts, role), self._count_tokens(texts))
        except torch.OutOfMemoryError:
            if len(texts) == 1:
                raise
            torch.cuda.empty_cache()
        except (ValueError, TypeError, IndexError) as error:
            if len(texts) == 1:
                void_1D = np.zeros((1, self._encoder.dim), np.float32)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return EncodedBatch(void_1D, [0], {0: reason})
        half = len(texts) // 2
        left, right = self.encode_now(texts[:half], role), self.encode_now(texts[half:], role)
        return EncodedBatch(
            np.concatenate([left.vectors, right.vectors]),
            left.tokens + right.tokens,
            {**left.refused, **{half + i: reason for i, reason in right.refused.items()}},
        )

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that the model reads of each text, after truncation, without its prompt."""
        model = self._encoder.model
        ids = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)
        return [len(row) for row in ids["input_ids"]]

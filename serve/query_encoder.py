"""The encoder: batches of texts in, unit vectors out."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from bixse.models.encoder import Role, encoder_fingerprint, resolve
from bixse.settings import Precision
from serve.encoder_process import EncoderProcess
from serve.generation import Generation
from serve.ledger import Follower
from serve.messages import EncodedBatch, NotHeld, Vectors
from serve.reads import Reads

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_PROBE = "the quick brown fox"
_SAME = 0.999
"""Cosine above which two encodings of one text are the same: bf16 batches differ by less."""


class EncoderStore:
    """Loaded encoders of some generations, each a process. They work in turn, a batch at a time."""

    def __init__(self, threads: int, queries: Precision = "float32") -> None:
        """`threads` of each; `queries`: as in `Encoder.load`."""
        self._threads, self._queries = threads, queries
        self._encoders: dict[int, tuple[EncoderProcess, Vectors]] = {}
        self._reads = Reads()
        self._thread = ThreadPoolExecutor(1, "encoder")

    def load(self, generation: Generation) -> None:
        """Load the encoder of a generation, unless it is the one of another already here.

        Raises ValueError when there is no encoder, or it is not the one that made the index;
        RuntimeError when its process dies.
        """
        start, index = generation.encoder, generation.index
        directory = resolve(start)
        self._reads.begin(generation.number, directory.name)
        fingerprint = encoder_fingerprint(directory)
        index.check_encoder(start, fingerprint)
        same = [held for held in self._encoders.values() if held[0].fingerprint == fingerprint]
        if not same:
            encoder = EncoderProcess(start, self._threads, self._queries)
            try:
                # Again: what was loaded may not be what stood there a moment before.
                index.check_encoder(start, encoder.fingerprint)
                same = [(encoder, encoder.encode([_PROBE], "query").vectors)]
            except BaseException:
                encoder.close()
                raise
        self._encoders[generation.number] = same[0]

    def drop(self, number: int) -> None:
        """Forget a generation, and remove the copy of a remote encoder as `Reads.end`."""
        held = self._encoders.pop(number, None)
        if held is not None and not any(one[0] is held[0] for one in self._encoders.values()):
            # After what it is doing.
            self._thread.submit(held[0].close)
        # After its process, which reads it too.
        self._thread.submit(self._reads.end, number)

    async def encode(
        self, number: int, texts: Sequence[str], role: Role, budget_s: float
    ) -> EncodedBatch:
        """Encode a batch; a text that cannot be encoded is refused alone.

        Raises TimeoutError when `budget_s` is over; a batch not begun by then never begins. Raises
        NotHeld for a generation that is not loaded here, or whose encoder dies.
        """
        held = self._encoders.get(number)
        if held is None:
            raise NotHeld(f"the encoder of generation {number} is not loaded here")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(self._thread, held[0].encode, texts, role)

    async def check_health(self) -> None:
        """Raises RuntimeError when a probe's vector is no longer what it was when loaded."""
        loop = asyncio.get_running_loop()
        for encoder, probe_1D in {id(held[0]): held for held in self._encoders.values()}.values():
            now = await loop.run_in_executor(self._thread, encoder.encode, [_PROBE], "query")
            if not float((now.vectors * probe_1D).sum()) > _SAME:
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

"""Where a lane's work is done: over deployment handles, or in this process."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from bixse.models.encoder import Role
from serve.batcher import Batcher, Result
from serve.fanout import Missing
from serve.generation import Generation
from serve.messages import (
    EncodedBatch,
    Failed,
    FoundInSlot,
    NotHeld,
    Unavailable,
    Vectors,
    Wanted,
)
from serve.query_encoder import EncoderStore
from serve.settings import ServeArgs
from serve.shard import ShardStore, shards_by_slot, slot_name

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

CALLS_A_REPLICA = 2
"""Batches handed to a replica at a time: it works on one while the next is on its way."""


class Handles:
    """Topology `shard`: the encoder and each slot of shards are deployments."""

    def __init__(
        self,
        encoder: "DeploymentHandle[Any]",
        slots: "list[DeploymentHandle[Any]]",
        args: ServeArgs,
    ) -> None:
        self._encoder = encoder
        self._slots = {slot_name(number): slot for number, slot in enumerate(slots)}
        self.encoder_calls = CALLS_A_REPLICA * args.encoder_replicas
        self.shard_calls = CALLS_A_REPLICA * args.replicas_per_shard
        # Without a second replica, asking again would only wait for the replacement to load.
        self._tries = 2 if args.replicas_per_shard > 1 else 1

    def slots(self, generation: Generation) -> dict[str, list[str]]:
        return shards_by_slot(list(generation.index.shard_rows), len(self._slots))

    async def encode(
        self, generation: Generation, role: Role, texts: list[str], deadline: float
    ) -> EncodedBatch:
        def call(budget_s: float) -> Any:
            return self._encoder.encode.remote(generation.number, texts, role, budget_s)

        try:
            batch: EncodedBatch = await within(call, deadline, tries=2)
        except (RayActorError, RayServeException, NotHeld) as error:
            raise Unavailable("the encoder is not running") from error
        return batch

    async def search(
        self,
        generation: Generation,
        slot: str,
        vectors_QD: Vectors,
        wanted: list[Wanted],
        deadline: float,
    ) -> list[FoundInSlot]:
        return await self._ask_slot("search", generation, slot, (vectors_QD, wanted), deadline)

    async def search_words(
        self,
        generation: Generation,
        slot: str,
        queries: list[str],
        wanted: list[Wanted],
        deadline: float,
    ) -> list[FoundInSlot]:
        ask = (queries, wanted)
        return await self._ask_slot("search_words", generation, slot, ask, deadline)

    async def _ask_slot(
        self,
        method: str,
        generation: Generation,
        slot: str,
        ask: tuple[Any, ...],
        deadline: float,
    ) -> list[FoundInSlot]:
        def call(budget_s: float) -> Any:
            held = getattr(self._slots[slot], method)
            return held.remote(generation.number, *ask, budget_s)

        found: list[FoundInSlot] = await within(call, deadline, self._tries)
        return found


SWITCH_S = 0.0005
"""Python's default is 5 ms: so long a thread that has an answer, or a question to pass on, waited
for the lock of an event loop that was busy with the answers before, and the encoder stood still."""


class Local:
    """Topology `replicate`: everything in this process."""

    encoder_calls = 1
    shard_calls = 1

    def __init__(self, args: ServeArgs) -> None:
        sys.setswitchinterval(SWITCH_S)
        self.encoder = EncoderStore(args.encoder_cpus, args.query_precision)
        self.shards = ShardStore(args.shard_cpus, on_gpu=args.shard_gpus > 0)

    async def load(self, generation: Generation) -> None:
        """Raises ValueError as `EncoderStore.load` and `load_shard`."""
        await asyncio.to_thread(self.encoder.load, generation)
        try:
            await asyncio.to_thread(self.shards.load, generation)
        except BaseException:
            self.encoder.drop(generation.number)
            raise

    def drop(self, number: int) -> None:
        self.encoder.drop(number)
        self.shards.drop(number)

    def slots(self, generation: Generation) -> dict[str, list[str]]:
        return shards_by_slot(list(generation.index.shard_rows), 1)

    async def encode(
        self, generation: Generation, role: Role, texts: list[str], deadline: float
    ) -> EncodedBatch:
        left = deadline - asyncio.get_running_loop().time()
        try:
            return await self.encoder.encode(generation.number, texts, role, left)
        except NotHeld as error:
            raise Unavailable("the encoder is not running") from error

    async def search(
        self,
        generation: Generation,
        slot: str,
        vectors_QD: Vectors,
        wanted: list[Wanted],
        deadline: float,
    ) -> list[FoundInSlot]:
        left = deadline - asyncio.get_running_loop().time()
        return await self.shards.search(generation.number, vectors_QD, wanted, left)

    async def search_words(
        self,
        generation: Generation,
        slot: str,
        queries: list[str],
        wanted: list[Wanted],
        deadline: float,
    ) -> list[FoundInSlot]:
        left = deadline - asyncio.get_running_loop().time()
        return await self.shards.search_words(generation.number, queries, wanted, left)

    async def check_health(self) -> None:
        await self.encoder.check_health()
        await self.shards.check_health()


async def ask(
    name: str, batcher: Batcher[Any, Result], asks: Sequence[Any], deadline: float
) -> list[Result] | Missing:
    """What one part of the application says to each ask, or why it is missing."""
    try:
        return await batcher.submit(asks, deadline)
    except TimeoutError:
        return Missing(name, "late")
    except BackPressureError:
        return Missing(name, "shed")
    except (RayActorError, RayServeException, NotHeld):
        return Missing(name, "lost")
    except (RayError, Failed):
        return Missing(name, "failed")


async def within(call: Callable[[float], Any], deadline: float, tries: int) -> Any:
    """Await a handle call until the deadline, and once more when its replica died under it.

    Raises TimeoutError, and what has not begun by then is cancelled; what Ray raises; Failed.
    """
    for left in reversed(range(tries)):
        response = call(deadline - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout_at(deadline):
                return await response
        except TimeoutError:
            response.cancel()
            raise
        except (RayActorError, NotHeld):
            # A replica that has just come up may not hold a generation that another does. Over
            # actor calls this NotHeld is a RayTaskError too, over gRPC it comes as it was raised.
            if not left:
                raise
        except (RayError, RayServeException):
            raise
        except Exception as error:
            # gRPC between replicas does not wrap what one raised.
            raise Failed(f"{type(error).__name__}: {error}") from error
    raise AssertionError("tries is at least 1")

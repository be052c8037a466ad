"""Items of concurrent requests become few calls.

`ray.serve.batch` would batch inside the replica, after one hop for every request, and keep work
whose caller has gone. This one stands in front of the hop: one handle call a batch, a deadline
for each item, and an item nobody waits for is never sent.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    deadline: float
    result: "asyncio.Future[Result]"


class Batcher(Generic[Item, Result]):
    """Calls `call(items, deadline)`, which returns one result an item, in order.

    At most `concurrency` calls run at a time; while they do, the queue gathers. An item that meets
    an idle batcher goes at once; one that meets a busy one waits `wait_s` for company. A call's
    deadline is the latest of its items'. Deadlines are times of the running loop, in seconds.
    Belongs to one event loop.
    """

    def __init__(
        self,
        call: Callable[[list[Item], float], Awaitable[Sequence[Result]]],
        *,
        size: int,
        wait_s: float,
        concurrency: int,
        observe_size: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._call = call
        self._size = size
        self._wait_s = wait_s
        self._free = concurrency
        self._observe_size = observe_size
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Future[Sequence[Result]]] = set()

    @property
    def depth(self) -> int:
        """Items that wait for a call."""
        return len(self._queue)

    async def submit(self, items: Sequence[Item], deadline: float) -> list[Result]:
        """The results of `items`, in order.

        Raises TimeoutError at the deadline, or whatever a call raised.
        """
        loop = asyncio.get_running_loop()
        waiting = [_Waiting[Item, Result](i, deadline, loop.create_future()) for i in items]
        self._queue.extend(waiting)
        self._fill_soon()
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.gather(*(w.result for w in waiting))
        finally:
            # Late, failed or abandoned: what has not been sent never is.
            for w in waiting:
                w.result.cancel()

    def _fill_soon(self) -> None:
        if len(self._queue) >= self._size:
            self._fill()
        elif self._free and self._timer is None:
            # While nothing runs there is nothing to gain by waiting, but what comes at once.
            wait_s = self._wait_s if self._running else 0.0
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._fill)

    def _fill(self) -> None:
        """Start calls while there are both items and free places."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._free and (batch := self._take()):
            self._free -= 1
            self._observe_size(len(batch))
            deadline = max(w.deadline for w in batch)
            task = asyncio.ensure_future(self._call([w.item for w in batch], deadline))
            self._running.add(task)
            task.add_done_callback(partial(self._deliver, batch))

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        while self._queue and len(batch) < self._size:
            waiting = self._queue.popleft()
            if not waiting.result.done():
                batch.append(waiting)
        return batch

    def _deliver(
        self,
        batch: list[_Waiting[Item, Result]],
        done: "asyncio.Future[Sequence[Result]]",
    ) -> None:
        self._running.discard(done)
        self._free += 1
        error = None if done.cancelled() else done.exception()
        results = [] if done.cancelled() or error else list(done.result())
        for position, waiting in enumerate(batch):
            if waiting.result.done():
                continue
            if done.cancelled():
                waiting.result.cancel()
            elif error is not None:
                waiting.result.set_exception(error)
            else:
                waiting.result.set_result(results[position])
        self._fill()

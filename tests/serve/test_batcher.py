"""Batching in front of the hop, without Ray."""

import asyncio
from collections.abc import Sequence

import pytest

from serve.batcher import Batcher


class Doubler:
    """Doubles numbers, remembering its batches; waits while its gate is shut."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.deadlines: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, items: list[int], deadline: float) -> Sequence[int]:
        self.batches.append(items)
        self.deadlines.append(deadline)
        await self.gate.wait()
        if 13 in items:
            raise ArithmeticError("13")
        return [2 * item for item in items]


def batcher(call: Doubler, size: int = 4, concurrency: int = 1) -> Batcher[int, int]:
    return Batcher(call, size=size, wait_s=0.005, concurrency=concurrency)


def soon(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def test_concurrent_requests_share_calls_and_each_gets_its_own_results():
    async def run() -> None:
        call = Doubler()
        b = batcher(call)
        requests = [[1], [2, 3], [4, 5, 6], [], [7]]
        results = await asyncio.gather(*(b.submit(r, soon()) for r in requests))
        assert results == [[2], [4, 6], [8, 10, 12], [], [14]]
        assert call.batches == [[1, 2, 3, 4], [5, 6, 7]]

    asyncio.run(run())


def test_a_full_batch_goes_at_once_and_the_rest_gathers_while_calls_run():
    async def run() -> None:
        call = Doubler()
        call.gate.clear()
        b = batcher(call, size=2)
        tasks = [asyncio.create_task(b.submit([n], soon())) for n in range(7)]
        await asyncio.sleep(0.05)
        assert call.batches == [[0, 1]]
        assert b.depth == 5
        call.gate.set()
        assert [t for task in tasks for t in await task] == [0, 2, 4, 6, 8, 10, 12]
        assert [len(batch) for batch in call.batches] == [2, 2, 2, 1]

    asyncio.run(run())


def test_at_most_as_many_calls_as_allowed_run_at_a_time():
    async def run() -> None:
        call = Doubler()
        call.gate.clear()
        b = batcher(call, size=1, concurrency=3)
        tasks = [asyncio.create_task(b.submit([n], soon())) for n in range(9)]
        await asyncio.sleep(0.05)
        assert len(call.batches) == 3
        call.gate.set()
        await asyncio.gather(*tasks)
        assert len(call.batches) == 9

    asyncio.run(run())


def test_a_deadline_ends_its_own_request_only():
    async def run() -> None:
        call = Doubler()
        call.gate.clear()
        b = batcher(call)
        short = asyncio.create_task(b.submit([1], soon(0.05)))
        long = asyncio.create_task(b.submit([2], soon()))
        with pytest.raises(TimeoutError):
            await short
        assert call.deadlines[0] == pytest.approx(soon(), abs=0.5), "the latest of the batch"
        call.gate.set()
        assert await long == [4]

    asyncio.run(run())


def test_what_nobody_waits_for_is_never_sent():
    async def run() -> None:
        call = Doubler()
        call.gate.clear()
        b = batcher(call, size=1)
        first = asyncio.create_task(b.submit([1], soon()))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(b.submit([2], soon(0.01)))
        gone = asyncio.create_task(b.submit([3], soon()))
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(TimeoutError):
            await late
        call.gate.set()
        assert await first == [2]
        assert await b.submit([4], soon()) == [8]
        assert call.batches == [[1], [4]]

    asyncio.run(run())


def test_a_call_that_raises_fails_its_batch_and_not_the_next():
    async def run() -> None:
        b = batcher(Doubler(), size=2)
        results = await asyncio.gather(
            *(b.submit([n], soon()) for n in (1, 13, 3, 4)), return_exceptions=True
        )
        assert [type(r) for r in results[:2]] == [ArithmeticError, ArithmeticError]
        assert results[2:] == [[6], [8]]
        assert await b.submit([5], soon()) == [10]

    asyncio.run(run())


def test_an_idle_batcher_does_not_wait_and_a_busy_one_does():
    async def run() -> None:
        call = Doubler()
        call.gate.clear()
        b: Batcher[int, int] = Batcher(call, size=4, wait_s=3600, concurrency=2)
        first = asyncio.create_task(b.submit([1], soon()))
        await asyncio.sleep(0.02)
        assert call.batches == [[1]]
        others = [asyncio.create_task(b.submit([n], soon())) for n in (2, 3)]
        await asyncio.sleep(0.02)
        assert call.batches == [[1]], "there is a free place, but more may come"
        others += [asyncio.create_task(b.submit([n], soon())) for n in (4, 5)]
        await asyncio.sleep(0.02)
        assert call.batches == [[1], [2, 3, 4, 5]]
        call.gate.set()
        assert await asyncio.gather(first, *others) == [[2], [4], [6], [8], [10]]

    asyncio.run(run())

"""The one place that says which generation is served, and the replicas that follow it.

The ledger keeps nothing on disk: each replica that follows it knows all that it knows, so a ledger
that dies is told by the first of them what held.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve.generation import (
    Generation,
    Generations,
    Report,
    failure,
    not_loaded,
    not_turned,
    to_keep,
    undrained,
)
from serve.settings import ServedIndex, ServedReranker

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

SYNC_S = 2.0
"""Without news a replica reports this often."""
LIVE_S = 10.0
"""A replica that has not reported for so long is taken for dead."""
_TURN_WITHIN_S = 10.0
_LOOK_S = 0.02

_EXPECTED = (ValueError, OSError, RuntimeError, MemoryError, TypeError, KeyError, ImportError)
"""What loading an index, an encoder or a reranker raises when its files do not do, or what reads
their URL is not installed. Anything else is a reason to refuse them too, but it may be a bug."""

_logger = logging.getLogger("bixse")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What holds after a change was asked for, and why it was refused if it was."""

    generations: Generations
    problem: str | None = None
    busy: bool = False


class Ledger:
    """A deployment of one replica."""

    def __init__(self, first: Generations, slots: tuple[str, ...]) -> None:
        self._generations = first
        self._slots = slots
        self._seen: dict[str, tuple[float, Report]] = {}
        self._changed = asyncio.Event()
        self._told = asyncio.Event()
        self._changing = False
        self._began = time.monotonic()

    async def sync(
        self, report: Report, known: Generations | None, wait_s: float
    ) -> tuple[Generations, frozenset[int]]:
        """Take a report; give what holds and what must be kept, after up to `wait_s` of no news."""
        self._seen[report.member] = (time.monotonic(), report)
        if known is not None:
            self._told.set()
            if known.version > self._generations.version:
                self._become(known)
        self._give_up_what_nobody_gates()
        if report.version >= self._generations.version and wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
        return self._generations, to_keep(self._generations, self._live())

    async def state(self) -> Outcome:
        """What holds."""
        return Outcome(self._generations)

    async def prepare(
        self, index_url: str | None, encoder: str | None, reranker: str | None, within_s: float
    ) -> Outcome:
        """Have every replica load a generation beside the one it serves; nothing turns to it yet.

        What is None is that of the current one.
        """
        await self._hear()
        if self._changing or self._generations.candidate is not None:
            return Outcome(self._generations, "another change is under way", busy=True)
        now = self._generations.current
        if reranker is not None and now.reranker is None:
            return Outcome(self._generations, "this application was started without --reranker")
        self._changing = True
        try:
            index, second = now.index, now.reranker
            try:
                if index_url is not None:
                    index = await asyncio.to_thread(ServedIndex.read, index_url)
                if reranker is not None:
                    second = await asyncio.to_thread(ServedReranker.read, reranker)
            except Exception as error:  # noqa: BLE001
                # Whoever asked is told why, whatever it is: otherwise it looks like a ledger gone.
                return Outcome(self._generations, _reason(error))
            self._become(self._generations.propose(index, encoder or now.encoder, second))
            number = self._generations.newest
            try:
                problem = await self._loaded(number, time.monotonic() + within_s)
            except BaseException:
                # Whoever asked has gone, and Ray cancels what he asked for.
                self._become(self._generations.abandon(number))
                raise
            if problem is not None:
                self._become(self._generations.abandon(number))
            return Outcome(self._generations, problem)
        finally:
            self._changing = False

    async def settle(self, number: int, accept: bool) -> Outcome:
        """Turn every replica to a prepared generation, or give it up."""
        await self._hear()
        try:
            self._become(
                self._generations.promote(number) if accept else self._generations.abandon(number)
            )
        except ValueError as error:
            return Outcome(self._generations, str(error))
        return await self._turned()

    async def roll_back(self, within_s: float) -> Outcome:
        """Turn every replica back to the generation before the current one, once those that have
        begun since hold it too."""
        await self._hear()
        if self._changing:
            return Outcome(self._generations, "another change is under way", busy=True)
        before = self._generations
        if before.previous is not None:
            self._changing = True
            try:
                until = time.monotonic() + within_s
                problem = await self._loaded(before.previous.number, until, before.current.number)
            finally:
                self._changing = False
            if problem is not None:
                return Outcome(self._generations, problem)
            if self._generations.previous != before.previous:
                return Outcome(self._generations, "another change was under way", busy=True)
        try:
            self._become(self._generations.roll_back())
        except ValueError as error:
            return Outcome(self._generations, str(error))
        return await self._turned()

    async def drain(self, within_s: float) -> bool:
        """Have no new request answered; whether those under way all were, within `within_s`."""
        await self._hear()
        self._become(self._generations.drain())
        version, until = self._generations.version, time.monotonic() + within_s
        while undrained(version, self._live()):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def _hear(self) -> None:
        """Wait until a follower has said what it knows: a ledger that begins in place of one that
        died holds what was served first, and is asked before it is told.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SYNC_S):
                await self._told.wait()

    def _give_up_what_nobody_gates(self) -> None:
        """Whoever had a candidate prepared may have died before it said what becomes of it."""
        candidate = self._generations.candidate
        # A ledger that began only now may not have heard yet from whoever gates it.
        if candidate is None or self._changing or time.monotonic() - self._began < LIVE_S:
            return
        if not any(report.changing for report in self._live()):
            self._become(self._generations.abandon(candidate.number))

    def _become(self, generations: Generations) -> None:
        self._generations = generations
        self._changed.set()
        self._changed = asyncio.Event()

    def _live(self) -> list[Report]:
        now = time.monotonic()
        self._seen = {m: seen for m, seen in self._seen.items() if now - seen[0] < LIVE_S}
        return [report for _, report in self._seen.values()]

    async def _loaded(self, number: int, until: float, beside: int | None = None) -> str | None:
        """Wait until every replica holds the generation; gives why that cannot be.

        With `beside`, every one that holds that generation: one that does not may never come up.
        """
        while True:
            live, slots = self._live(), self._slots
            # A replica that began since a change may have found the files before it gone.
            problem = failure(number, live)
            if problem is not None:
                return problem
            if beside is not None:
                live, slots = [report for report in live if beside in report.holds], ()
            lacking = not_loaded(number, live, slots)
            if not lacking:
                return None
            if time.monotonic() > until:
                return f"not loaded in time by {', '.join(lacking)}"
            await asyncio.sleep(_LOOK_S)

    async def _turned(self) -> Outcome:
        """Wait until requests are pinned to the current generation everywhere."""
        until = time.monotonic() + _TURN_WITHIN_S
        while time.monotonic() < until:
            if not not_turned(self._generations.current.number, self._live()):
                break
            await asyncio.sleep(_LOOK_S)
        return Outcome(self._generations)


class Follower:
    """Keeps what one replica holds in step with the ledger."""

    def __init__(
        self,
        ledger: "DeploymentHandle[Any]",
        slot: str,
        load: Callable[[Generation], Awaitable[None]],
        drop: Callable[[int], None],
        *,
        turn: Callable[[Generation], None] | None = None,
        in_use: Callable[[], frozenset[int]] = frozenset,
        close: Callable[[], None] = lambda: None,
        in_flight: Callable[[], int] = lambda: 0,
        changing: Callable[[], bool] = lambda: False,
    ) -> None:
        """`drop` is called for what could not be loaded too, of which there may be parts.

        `turn` is given by replicas that take requests; it is called with what is to answer.

        `close` is called when no more of them may be taken.
        """
        self._ledger = ledger
        self._slot = slot
        self._member = f"{slot}-{uuid.uuid4().hex[:12]}"
        self._load, self._drop, self._turn, self._in_use = load, drop, turn, in_use
        self._close, self._in_flight, self._changing = close, in_flight, changing
        self._known: Generations | None = None
        self._holds: set[int] = set()
        self._failed: dict[int, str] = {}
        self._current: int | None = None
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what is served now, and follow from then on.

        Raises what loading the current generation raises: such a replica cannot serve.
        """
        known, _ = await self._ledger.sync.remote(self._report(), None, 0.0)
        while known.current.number not in self._holds:
            self._known = known
            await self._load(known.current)
            self._holds.add(known.current.number)
            # While this loaded another may have become current: nobody waits for a replica that is
            # not there yet. Where the ledger is being replaced, what is known holds.
            with contextlib.suppress(RayError, RayServeException):
                known, _ = await self._ledger.sync.remote(self._report(), known, 0.0)
        self._known = known
        self._turn_to(known.current)
        self._loop = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        wait_s = 0.0
        while True:
            try:
                answer = await self._ledger.sync.remote(self._report(), self._known, wait_s)
            except (RayError, RayServeException):
                # The ledger is being replaced; what is known holds meanwhile.
                await asyncio.sleep(0.5)
                continue
            # The ledger waits to hear that the last request is answered.
            wait_s = _LOOK_S if answer[0].draining else SYNC_S
            if self._take(*answer):
                wait_s = 0.0

    def _take(self, generations: Generations, keep: frozenset[int]) -> bool:
        """Act on what the ledger says; whether there is something new to report at once."""
        if self._known is not None and generations.version < self._known.version:
            return False
        self._known = generations
        if generations.draining:
            self._close()
        held = generations.held()
        self._failed = {n: why for n, why in self._failed.items() if n in held}
        for number, generation in held.items():
            if not (number in self._holds or number in self._failed or number in self._loading):
                self._loading[number] = asyncio.create_task(self._bring(generation))
        turned = self._turn_to(generations.current)
        for number in [n for n in self._holds if n not in keep and n not in held]:
            if number != self._current and number not in self._in_use():
                self._holds.discard(number)
                self._drop(number)
        return turned

    def _turn_to(self, generation: Generation) -> bool:
        if self._turn is None or generation.number not in self._holds:
            return False
        if generation.number == self._current:
            return False
        self._turn(generation)
        self._current = generation.number
        return True

    async def _bring(self, generation: Generation) -> None:
        """Load a generation, and say at once how that went."""
        try:
            await self._load(generation)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, the ledger waits to hear of it.
            self._failed[generation.number] = _reason(error)
            self._drop(generation.number)
        else:
            self._holds.add(generation.number)
        finally:
            del self._loading[generation.number]
        try:
            answer = await self._ledger.sync.remote(self._report(), self._known, 0.0)
        except (RayError, RayServeException):
            return
        self._take(*answer)

    def _report(self) -> Report:
        return Report(
            member=self._member,
            slot=self._slot,
            version=0 if self._known is None else self._known.version,
            holds=frozenset(self._holds),
            failed=dict(self._failed),
            current=self._current,
            in_use=self._in_use(),
            in_flight=self._in_flight(),
            changing=self._changing(),
        )


def _reason(error: Exception) -> str:
    """What to say of a generation that cannot be loaded; the log has the rest where it is new."""
    if not isinstance(error, _EXPECTED):
        _logger.error("a generation could not be loaded", exc_info=error)
    return str(error).splitlines()[0] if str(error) else repr(error)

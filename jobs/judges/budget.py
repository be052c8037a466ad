"""How many more pairs may be asked, decided in one place for all workers of a job."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.cluster import beside_driver

FIRST = 32
"""Pairs granted at a time while nobody knows how long one takes (ours)."""


@dataclass
class Budget:
    """A job's allowance: pairs, seconds of all workers together, money for tokens, or none of them.

    Seconds are bought from the moment the budget is made: loading an engine is paid for too. Before
    they run out, pairs are granted by the rate at which pairs have been judged so far; before the
    money does, by what a pair has cost.
    """

    pairs: int | None = None
    seconds: float | None = None
    money: float | None = None
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _first: float | None = field(default=None, init=False)
    _granted: int = field(default=0, init=False)
    _judged: int = field(default=0, init=False)
    _cost: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def take(self, wanted: int) -> int:
        """How many of `wanted` pairs may be asked now; they count as asked."""
        allowed = wanted
        if self.pairs is not None:
            allowed = min(allowed, self.pairs - self._granted)
        if self.seconds is not None:
            allowed = min(allowed, self._in_time())
        if self.money is not None:
            allowed = min(allowed, self._affordable())
        allowed = max(allowed, 0)
        self._granted += allowed
        if self._first is None and allowed:
            self._first = self.clock()
        return allowed

    def settle(self, judged: int, cost: float = 0.0) -> None:
        """These pairs are done and their tokens cost so much: what the rates are taken from."""
        self._judged += judged
        self._cost += cost

    def _affordable(self) -> int:
        assert self.money is not None
        left = self.money - self._cost
        if left <= 0:
            return 0
        if not self._cost:
            return FIRST
        # What is just enough for a pair is enough, whatever was rounded.
        pairs = int(left * self._judged / self._cost + 1e-6)
        return pairs - (self._granted - self._judged)

    def _in_time(self) -> int:
        assert self.seconds is not None
        left = self.seconds - (self.clock() - self._started)
        if left <= 0:
            return 0
        if not self._judged or self._first is None:
            return FIRST
        rate = self._judged / max(self.clock() - self._first, 1e-9)
        return int(left * rate) - (self._granted - self._judged)


def shared(budget: Budget) -> Any:
    """The budget as an actor that all workers of a job ask."""
    return beside_driver(Budget, budget.pairs, budget.seconds, budget.money)

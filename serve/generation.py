"""Which index, encoder and reranker answer, and when that may change. Pure values and decisions.

A change is two steps: every replica loads the candidate beside what it serves, then all that take
requests turn to it at once. A request is pinned to the generation it began with, so an answer is of
exactly one. `serve.ledger` carries this out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from serve.settings import ServedIndex, ServedReranker


@dataclass(frozen=True, slots=True)
class Generation:
    """An index with the encoder that made it, and the reranker that reads what they find, numbered
    since the application was started.
    """

    number: int
    index: ServedIndex
    encoder: str
    reranker: ServedReranker | None = None
    """None in an application that was started without one."""


@dataclass(frozen=True, slots=True)
class Generations:
    """What all replicas agree on; of two, the one of the higher version holds."""

    version: int
    current: Generation
    previous: Generation | None = None
    candidate: Generation | None = None
    newest: int = 1
    """The highest number given so far: no number is given twice."""
    draining: bool = False
    """Nothing new is answered any more: the application is about to stop."""

    @classmethod
    def first(
        cls, index: ServedIndex, encoder: str, reranker: ServedReranker | None = None
    ) -> "Generations":
        return cls(1, Generation(1, index, encoder, reranker))

    def held(self) -> dict[int, Generation]:
        """All that a replica keeps in memory, by number."""
        all_of_them = (self.current, self.previous, self.candidate)
        return {one.number: one for one in all_of_them if one is not None}

    def propose(
        self, index: ServedIndex, encoder: str, reranker: ServedReranker | None = None
    ) -> "Generations":
        """With a candidate to load beside the others; one that was there is given up."""
        number = self.newest + 1
        candidate = Generation(number, index, encoder, reranker)
        return replace(self, version=self.version + 1, candidate=candidate, newest=number)

    def promote(self, number: int) -> "Generations":
        """The candidate answers from now on. Raises ValueError when it is not `number`."""
        if self.candidate is None or self.candidate.number != number:
            raise ValueError(f"generation {number} is no longer the candidate")
        return replace(
            self,
            version=self.version + 1,
            current=self.candidate,
            previous=self.current,
            candidate=None,
        )

    def abandon(self, number: int) -> "Generations":
        """Without the candidate `number`; the same when it is gone already."""
        if self.candidate is None or self.candidate.number != number:
            return self
        return replace(self, version=self.version + 1, candidate=None)

    def roll_back(self) -> "Generations":
        """The previous generation answers again. Raises ValueError when there is none."""
        if self.previous is None:
            raise ValueError("there is no previous generation to roll back to")
        return replace(self, version=self.version + 1, current=self.previous, previous=self.current)

    def drain(self) -> "Generations":
        """For the rest of the application's life."""
        return replace(self, version=self.version + 1, draining=True)


@dataclass(frozen=True, slots=True)
class Report:
    """What one replica says of itself."""

    member: str
    slot: str
    """Its part of the application: `encoder`, `shard-00000`, `front`, …"""
    version: int
    holds: frozenset[int]
    failed: dict[int, str] = field(default_factory=dict)
    """Why a generation could not be loaded."""
    current: int | None = None
    """What new requests are pinned to, for replicas that take requests."""
    in_use: frozenset[int] = frozenset()
    """What unfinished requests are pinned to."""
    in_flight: int = 0
    """Unfinished requests."""
    changing: bool = False
    """Whether it asks for a change, or gates one."""


def failure(number: int, reports: Iterable[Report]) -> str | None:
    """Why a generation cannot be served, in the first sentence that a replica gave."""
    return next((r.failed[number] for r in reports if number in r.failed), None)


def not_loaded(number: int, reports: Iterable[Report], slots: Iterable[str]) -> list[str]:
    """Slots without a replica, or with one that does not hold the generation yet."""
    by_slot: dict[str, list[Report]] = {slot: [] for slot in slots}
    for report in reports:
        by_slot.setdefault(report.slot, []).append(report)
    return [
        slot
        for slot, members in by_slot.items()
        if not members or any(number not in member.holds for member in members)
    ]


def not_turned(number: int, reports: Iterable[Report]) -> list[str]:
    """Replicas that take requests and still pin new ones to another generation."""
    return [r.member for r in reports if r.current is not None and r.current != number]


def undrained(version: int, reports: Iterable[Report]) -> list[str]:
    """Replicas that take requests and have not heard that they must not, or have unfinished ones.

    `version` is the one at which draining began.
    """
    fronts = [report for report in reports if report.current is not None]
    return [r.member for r in fronts if r.version < version or r.in_flight]


def to_keep(generations: Generations, reports: Iterable[Report]) -> frozenset[int]:
    """Numbers that no replica may drop: those held, and those that a request may still ask for."""
    used = [report.in_use | {report.current} for report in reports if report.current is not None]
    return frozenset(generations.held()).union(*used)


def recall_problem(index: ServedIndex, least: float) -> str | None:
    """Why the recall measured when the index was built does not do."""
    if index.recall is None:
        return f"the manifest of {index.url} does not say its recall@10"
    if index.recall < least:
        return f"the index {index.url} has recall@10 {index.recall:.4f}, below {least:.4f}"
    return None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """nDCG@10 of one generation on the held-out judgments."""

    found: float
    """nDCG@10 of what the search finds, which requests without `rerank` get."""
    reranked: float | None = None
    """nDCG@10 of the same in the reranker's order; None where there is no reranker."""


def ndcg_problem(now: HeldOut, then: HeldOut, most_lost: float) -> str | None:
    """Why what is measured, `now` served and `then` if changed, does not do.

    Each of the two orders must hold its own: a request chooses which it gets.
    """
    orders = [("", now.found, then.found)]
    if now.reranked is not None and then.reranked is not None:
        orders.append((" of reranked hits", now.reranked, then.reranked))
    for order, before, after in orders:
        if after < before - most_lost:
            return (
                f"nDCG@10{order} would fall from {before:.4f} to {after:.4f}, by more than "
                f"{most_lost:g}"
            )
    return None

"""Given pairs that a prompt shows: the best of the train split, never a held-out one."""

from collections.abc import Iterable
from dataclasses import dataclass

from bixse.synthesis.prompts import WRITTEN, Example
from bixse.synthesis.requests import GRADES, chance
from bixse.synthesis.settings import FewShot, GradedQueries

MAX_CHARACTERS = 2000
"""A longer document is cut: eight of them stand in every prompt."""


@dataclass(frozen=True, slots=True)
class GivenPair:
    """A judged pair; relevance in [0, 1]. `grade` is set where the prompt says it."""

    query_id: str
    doc_id: str
    relevance: float
    grade: int | None = None


def choose(pairs: Iterable[GivenPair], settings: FewShot | GradedQueries) -> list[GivenPair]:
    """The pairs of a prompt, in the order that it shows them.

    Few-shot: the `examples` pairs of highest relevance (above 0), one a query and a document.
    Graded: the first `examples` pairs of each grade, the worst grade first. Ties are drawn by a
    hash of the ids, so that the order of `pairs` changes nothing.
    """
    ranked = sorted(
        pairs,
        key=lambda p: (-p.relevance, chance(f"{settings.seed}:{p.query_id}|{p.doc_id}")),
    )
    if isinstance(settings, FewShot):
        return _apart([pair for pair in ranked if pair.relevance > 0], settings.examples)
    chosen: list[GivenPair] = []
    for grade in GRADES:
        of_grade = [pair for pair in ranked if grade_of(pair.relevance) == grade]
        shown = _apart(of_grade, settings.examples)
        chosen += [GivenPair(p.query_id, p.doc_id, p.relevance, grade) for p in shown]
    return chosen


def example_of(pair: GivenPair, query: str, document: str) -> Example:
    """A pair as a prompt shows it, its document cut."""
    return Example(query, document[:MAX_CHARACTERS], pair.grade)


def grade_of(relevance: float) -> int:
    """Relevance in [0, 1] as the nearest of the grades a text is written at; half-way goes up."""
    return GRADES[WRITTEN.nearest(relevance)]


def _apart(pairs: list[GivenPair], count: int) -> list[GivenPair]:
    """The first pairs that share no query and no document."""
    chosen: list[GivenPair] = []
    seen: set[str] = set()
    for pair in pairs:
        keys = {f"query {pair.query_id}", f"document {pair.doc_id}"}
        if len(chosen) < count and not keys & seen:
            chosen.append(pair)
            seen |= keys
    return chosen

"""A query log that a scorer has graded: which of its pairs a generator learns from.

SSRA, arXiv 2509.16717: a scorer tuned on labels grades unlabelled queries, grouped by document.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Graded:
    """A pair of the log, the likeliest of its grades (from 0), and how likely that is."""

    query_id: str
    doc_id: str
    grade: int
    prob: float

    @classmethod
    def surest(cls, query_id: str, doc_id: str, grade_probs: Sequence[float]) -> "Graded":
        grade = max(range(len(grade_probs)), key=grade_probs.__getitem__)
        return cls(query_id, doc_id, grade, grade_probs[grade])


def of_several_grades(pairs: Iterable[Graded]) -> list[Graded]:
    """Of each document the query that is surest of each grade, where it has queries of two or more.

    So a document shows what a grade changes, and candidates that are irrelevant by the hundred do
    not drown the others. In the order of `doc_id` and grade; ties go to the first `query_id`.
    """
    best: dict[str, dict[int, Graded]] = {}
    for pair in pairs:
        of_document = best.setdefault(pair.doc_id, {})
        held = of_document.get(pair.grade)
        if held is None or (-pair.prob, pair.query_id) < (-held.prob, held.query_id):
            of_document[pair.grade] = pair
    return [
        of_document[grade]
        for _, of_document in sorted(best.items())
        if len(of_document) > 1
        for grade in sorted(of_document)
    ]

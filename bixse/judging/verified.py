"""Which judgments of written queries can be relied on: the rest is dropped with its reason.

CustomIR, arXiv 2510.21729, has a language model verify that a mined negative does not answer; here
the judge that grades pairs does, with a margin between answer and none (thresholds ours).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bixse.judging.settings import Verification
from bixse.records import jaccard, words
from bixse.scale import reaches


@dataclass(frozen=True, slots=True)
class Judged:
    """A judged pair: relevance in [0, 1]."""

    query_id: str
    doc_id: str
    relevance: float


def unverified(
    judged: Sequence[Judged],
    seeds: Mapping[str, str],
    texts: Mapping[str, str],
    settings: Verification,
) -> dict[tuple[str, str], str]:
    """(query_id, doc_id) -> why the judgment is dropped.

    `seeds` names the document each written query was made from, `texts` has the text of every
    judged document. What stays of a query is positives and negatives and nothing between, no
    negative a near copy of a positive, and of a written query its own document is a positive.
    """
    of_query: dict[str, list[Judged]] = {}
    for row in judged:
        of_query.setdefault(row.query_id, []).append(row)
    dropped: dict[tuple[str, str], str] = {}
    for query_id, rows in of_query.items():
        positives = {row.doc_id for row in rows if reaches(row.relevance, settings.positive)}
        answers = [frozenset(words(texts[doc_id])) for doc_id in sorted(positives)]
        whole = "" if seeds.get(query_id) is None else _ungrounded(rows, seeds[query_id], positives)
        for row in rows:
            reason = whole or _doubt(row, texts[row.doc_id], answers, settings)
            if reason:
                dropped[query_id, row.doc_id] = reason
    return dropped


def _ungrounded(rows: Sequence[Judged], seed: str, positives: set[str]) -> str:
    if seed in positives:
        return ""
    if any(row.doc_id == seed for row in rows):
        return "the query's own document does not answer it"
    return "the query's own document has no grade"


def _doubt(
    row: Judged, text: str, answers: Sequence[frozenset[str]], settings: Verification
) -> str:
    if reaches(row.relevance, settings.positive):
        return ""
    if reaches(row.relevance, settings.negative):
        return f"neither answer nor none: relevance {row.relevance:.3f}"
    own = frozenset(words(text))
    if any(jaccard(own, answer) >= settings.near_duplicate for answer in answers):
        return "a negative that nearly equals a positive"
    return ""

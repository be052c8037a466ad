"""Hits of several sources become one ranking."""

from collections.abc import Iterable, Sequence

from bixse.records import Hit


def merge(rankings: Iterable[Sequence[Hit]], k: int) -> list[Hit]:
    """The best `k` over all rankings: higher score first, ties by `doc_id`, ranks renewed.

    Merging the shards of an index gives the ranking of the whole.
    """
    return ranked(((hit.score, hit.doc_id) for hits in rankings for hit in hits), k)


def ranked(scored: Iterable[tuple[float, str]], k: int) -> list[Hit]:
    """The best `k` of (score, doc_id) in any order: higher score first, ties by `doc_id`."""
    # Rankings of shards are sorted runs, and sorting merges those.
    best = sorted((-score, doc_id) for score, doc_id in scored)[:k]
    return [Hit(doc_id, -negative, rank) for rank, (negative, doc_id) in enumerate(best, start=1)]

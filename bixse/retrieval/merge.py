"""Hits of several sources become one ranking."""

import heapq
from collections.abc import Iterable, Sequence
from itertools import islice

from bixse.records import Hit


def merge(rankings: Iterable[Sequence[Hit]], k: int) -> list[Hit]:
    """The best `k` over all rankings: higher score first, ties by `doc_id`, ranks renewed.

    Each ranking must be in that order itself, as `Shard.search` gives it. Merging the shards of an
    index gives the ranking of the whole.
    """
    merged = heapq.merge(*rankings, key=lambda hit: (-hit.score, hit.doc_id))
    return [Hit(hit.doc_id, hit.score, rank) for rank, hit in enumerate(islice(merged, k), start=1)]

"""What a way to search finds, reads and takes, on queries whose true documents are known.

A shard counts how many of the true documents it finds; the sum over shards is the recall of the
merged ranking, since scores are exact: only true documents score above a true document.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bixse.records import Hit
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.settings import Retrieval, Search
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import Counter, work
from bixse.retrieval.tuning import Point


@dataclass(frozen=True)
class Seen:
    """Of one shard: true documents found, work and milliseconds of a query alone."""

    found: int
    work: float
    latency_ms: float
    best: Hit | None
    """The first hit of the first query."""


def watch(
    shard: Shard,
    settings: Retrieval,
    searches: Sequence[Search],
    vectors_QD: Vectors,
    true_doc_ids: Sequence[frozenset[str]],
    k: int,
) -> list[Seen]:
    """Every query, one at a time, with each of the searches."""
    return [_watch(shard, settings, search, vectors_QD, true_doc_ids, k) for search in searches]


def _watch(
    shard: Shard,
    settings: Retrieval,
    search: Search,
    vectors_QD: Vectors,
    true_doc_ids: Sequence[frozenset[str]],
    k: int,
) -> Seen:
    counter, found, milliseconds = Counter(), 0, []
    best: Hit | None = None
    for query, true in enumerate(true_doc_ids):
        started = time.perf_counter()
        hits = shard.search(vectors_QD[query : query + 1], k, search)[0]
        milliseconds.append((time.perf_counter() - started) * 1000)
        found += len(true.intersection(hit.doc_id for hit in hits))
        if query == 0 and hits:
            best = hits[0]
    distances = counter.distances() / len(true_doc_ids)
    read = work(settings, shard.dim, shard.size, distances, search, k)
    return Seen(found, read, float(np.median(milliseconds)), best)


def point(structure: str, search: Search, seen: Sequence[Seen], true: int) -> Point:
    """What all shards give together; `true` is the number of true documents of all queries.

    Raises ValueError when no query has a true document.
    """
    if not true:
        raise ValueError("recall of nothing: no query has a true document")
    return Point(
        structure,
        search,
        recall=sum(shard.found for shard in seen) / true,
        work=sum(shard.work for shard in seen),
        latency_ms=max(shard.latency_ms for shard in seen),
    )


def doc_ids_of(truth: Sequence[Sequence[Hit]]) -> list[frozenset[str]]:
    return [frozenset(hit.doc_id for hit in hits) for hits in truth]

"""Measures of a ranking: nDCG with gains that are not integers; the others through ir_measures.

    nDCG@k = DCG@k / DCG@k of the best order,   DCG@k = sum_r gain_r / log2(r + 1)

with the relevance of a document as its gain, as trec_eval does with grades (Järvelin & Kekäläinen
2002, linear gain). nDCG does not depend on the unit of the gain, so relevance gives what the grades
above their minimum give. trec_eval and what is built on it refuse gains that are not integers,
hence our own few lines; where all are integers, both agree.

Conventions, all of them those of trec_eval and ir_measures:
- every judged query counts; one without a document of any gain has nDCG 0, one without a document
  from `relevant_from` on has Recall 0 and MRR 0, for every system alike;
- a judged query for which a system found nothing has 0; a query that nobody judged does not count;
- an unjudged document has gain 0; `judged@10` says how many are not unjudged;
- a query that is itself a document, as those of ArguAna, does not find itself (`themselves`).

The order of the hits decides, never their scores: ours stand by falling score, ties by `doc_id`.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import islice
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

from bixse.records import Hit, is_document
from bixse.scale import reaches

Rankings = Mapping[str, Sequence[Hit]]
"""query_id -> its hits, best first."""
Qrels = Mapping[str, Mapping[str, float]]
"""query_id -> doc_id -> relevance."""
Values = npt.NDArray[np.float64]
"""A measure of each query, [Q]."""


def measures(depth: int) -> tuple[str, ...]:
    """What rankings of this depth can be measured by."""
    deep = ("recall@100",) if depth >= 100 else ()
    return ("ndcg@10", "mrr@10", "recall@10", *deep, "judged@10")


def measure(
    rankings: Rankings, qrels: Qrels, relevant_from: float, depth: int
) -> dict[str, Values]:
    """Each of `measures(depth)`, one value a query of `qrels`, in its order.

    Raises ValueError when a ranking names a document twice.
    """
    # nDCG by itself does without it, on a machine that lacks it.
    import ir_measures

    foreign = {
        "mrr@10": ir_measures.RR(rel=1) @ 10,
        "recall@10": ir_measures.R(rel=1) @ 10,
        "recall@100": ir_measures.R(rel=1) @ 100,
        "judged@10": ir_measures.Judged @ 10,
    }
    names = {measure: name for name, measure in foreign.items() if name in measures(depth)}
    binary = {
        query_id: {doc_id: int(reaches(value, relevant_from)) for doc_id, value in judged.items()}
        for query_id, judged in qrels.items()
    }
    run = {query_id: _by_rank(query_id, hits) for query_id, hits in rankings.items() if hits}
    rows = {query_id: row for row, query_id in enumerate(qrels)}
    values = {name: np.zeros(len(rows)) for name in measures(depth)}
    for found in ir_measures.iter_calc(list(names), binary, run):
        values[names[found.measure]][rows[found.query_id]] = found.value
    for query_id, row in rows.items():
        values["ndcg@10"][row] = ndcg(rankings.get(query_id, ()), qrels[query_id], 10)
    return values


def ndcg(hits: Sequence[Hit], gains: Mapping[str, float], k: int) -> float:
    """nDCG@k of one ranking; 0 when no judged document has a gain."""
    best = _dcg(sorted(gains.values(), reverse=True)[:k])
    if best == 0:
        return 0.0
    return _dcg([gains.get(hit.doc_id, 0.0) for hit in islice(hits, k)]) / best


def unjudged(rankings: Rankings, qrels: Qrels, k: int) -> int:
    """Documents among the first `k` of all judged queries that nobody judged."""
    return sum(
        hit.doc_id not in judged
        for query_id, judged in qrels.items()
        for hit in islice(rankings.get(query_id, ()), k)
    )


def without_relevant(qrels: Qrels, relevant_from: float) -> dict[str, int]:
    """Judged queries that no ranking can score on: without any gain, and without a relevant one."""
    best = [max(judged.values(), default=0.0) for judged in qrels.values()]
    return {
        "no_gain": sum(value <= 0 for value in best),
        "none_relevant": sum(not reaches(value, relevant_from) for value in best),
    }


def themselves(
    texts: Mapping[str, str], qrels: Qrels, documents: Iterable[tuple[str, str, str]]
) -> frozenset[str]:
    """Queries that are a document: of equal id and text, and not judged for themselves.

    `texts` are the queries' by id, `documents` (doc_id, title, text).
    """
    return frozenset(
        doc_id
        for doc_id, title, text in documents
        if doc_id in texts
        and doc_id not in qrels.get(doc_id, ())
        and is_document(texts[doc_id], title, text)
    )


def others(query_id: str, hits: Sequence[Hit], itself: Container[str]) -> list[Hit]:
    """The hits of a query less the query, if it is of `itself`; ranks renewed."""
    kept = (hit for hit in hits if hit.doc_id != query_id or query_id not in itself)
    return [hit._replace(rank=rank) for rank, hit in enumerate(kept, start=1)]


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def _by_rank(query_id: str, hits: Sequence[Hit]) -> dict[str, float]:
    """Scores that fall with the rank: trec_eval sorts by score and breaks ties its own way."""
    run: dict[str, Any] = {hit.doc_id: float(-rank) for rank, hit in enumerate(hits)}
    if len(run) != len(hits):
        raise ValueError(f"the ranking of query {query_id} names a document twice")
    return run

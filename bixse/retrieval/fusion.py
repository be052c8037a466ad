"""Two rankings of one query become one.

Each is a function of whole rankings, never of shards: merge first, then fuse, and sharded equals
whole. A document that only one ranking holds counts with nothing from the other.
"""

from collections.abc import Callable, Sequence

from bixse.records import Hit
from bixse.retrieval.merge import ranked

FUSION_DEPTH = 100
"""Hits of each ranking that are fused; more when more are asked for. A document below it counts
as not found by that ranking."""

RRF_K = 60
"""The constant of Cormack et al., which keeps a single first place from deciding alone."""


def fuse_ranks(rankings: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """The best `k` by reciprocal ranks: score = sum over rankings of 1 / (60 + rank).

    Cormack, Clarke and Büttcher, SIGIR 2009. Scores play no part, so scales need not agree.
    """
    return _summed(rankings, lambda _, hit: 1 / (RRF_K + hit.rank), k)


def fuse_scores(
    dense: Sequence[Hit], lexical: Sequence[Hit], dense_weight: float, k: int
) -> list[Hit]:
    """The best `k` by w * dense + (1 - w) * lexical, each from its least possible score (cosine -1,
    BM25 0) to the best of its ranking, as 0 to 1.

    Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval", TOIS 2023
    (arXiv 2210.11934), their TM2C2.
    """
    rankings, least = (dense, lexical), (-1.0, 0.0)
    weights = (dense_weight, 1 - dense_weight)
    spans = [
        hits[0].score - low if hits else 0.0 for hits, low in zip(rankings, least, strict=True)
    ]

    def share(ranking: int, hit: Hit) -> float:
        # Where the best is the least possible there is no span, and nothing to prefer.
        if spans[ranking] <= 0:
            return 0.0
        return weights[ranking] * (hit.score - least[ranking]) / spans[ranking]

    return _summed(rankings, share, k)


def _summed(
    rankings: Sequence[Sequence[Hit]], share: Callable[[int, Hit], float], k: int
) -> list[Hit]:
    totals: dict[str, float] = {}
    for number, hits in enumerate(rankings):
        for hit in hits:
            totals[hit.doc_id] = totals.get(hit.doc_id, 0.0) + share(number, hit)
    return ranked(((score, doc_id) for doc_id, score in totals.items()), k)

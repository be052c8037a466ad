"""Pseudo-relevance feedback on vectors: a query moves towards what it has found.

Rocchio, "Relevance Feedback in Information Retrieval", 1971, without documents to move away from;
on dense vectors Li et al., arXiv 2108.11044, who found it best where few documents take part and
the query keeps at least the same weight.

Shapes: Q queries, N documents, D dimensions.
"""

from collections.abc import Collection, Sequence

import numpy as np

from bixse.artifacts import Artifact
from bixse.records import Hit
from bixse.retrieval.exact import search_exact, vectors_of
from bixse.retrieval.shard import Vectors


def rocchio(query_D: Vectors, documents_ND: Vectors, weight: float) -> Vectors:
    """normalise((1 - w) q + w mean(documents)) of unit vectors, [D].

    The query itself where there is no document, or the sum is zero and has no direction.
    """
    if not len(documents_ND):
        return query_D
    mean_D = documents_ND.astype(np.float64).mean(axis=0)
    moved_D = (1 - weight) * query_D.astype(np.float64) + weight * mean_D
    length = np.linalg.norm(moved_D)
    return query_D if length == 0 else (moved_D / length).astype(np.float32)


def search_again(
    embeddings: Artifact,
    queries_QD: Vectors,
    found: Sequence[Sequence[Hit]],
    documents: int,
    weight: float,
    k: int,
) -> list[list[Hit]]:
    """The best `k` by exact search after feedback from the first `documents` hits of each query."""
    heads = [[hit.doc_id for hit in hits[:documents]] for hits in found]
    vectors = _vectors_at(embeddings, {doc_id for head in heads for doc_id in head})
    moved = [
        rocchio(query_D, np.array([vectors[doc_id] for doc_id in head], np.float32), weight)
        for query_D, head in zip(queries_QD, heads, strict=True)
    ]
    return search_exact(embeddings, np.array(moved, np.float32).reshape(queries_QD.shape), k)


def _vectors_at(embeddings: Artifact, doc_ids: Collection[str]) -> dict[str, Vectors]:
    """The vectors of some documents; one part in memory at a time."""
    found: dict[str, Vectors] = {}
    for name in embeddings.parts():
        part = embeddings.part(name)
        ids = part["doc_id"].to_pylist()
        rows = [row for row, doc_id in enumerate(ids) if doc_id in doc_ids]
        vectors_ND = vectors_of(part.take(rows)) if rows else ()
        found |= {ids[row]: vector for row, vector in zip(rows, vectors_ND, strict=True)}
    return found

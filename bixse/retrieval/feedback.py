"""Pseudo-relevance feedback on vectors: a query moves towards what it has found.

Rocchio, "Relevance Feedback in Information Retrieval", 1971, without documents to move away from;
on dense vectors Li et al., arXiv 2108.11044, who found it best where few documents take part and
the query keeps at least the same weight.

Shapes: N documents, D dimensions.
"""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


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

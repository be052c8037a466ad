"""How much wider to search where a filter keeps only some of the rows.

A graph and inverted lists look near the query only, and what a filter keeps may be elsewhere: where
it keeps whole topics, and not the query's, the part of all rows that it keeps says nothing of the
part that a search meets. So a query's own neighbours are asked first, without the filter. The part
of them that it keeps says how much wider to search; where that is next to nothing, every row kept
is compared.

Shapes: Q queries, D dimensions, F neighbours.
"""

import math

import faiss
import numpy as np

from bixse.retrieval.metadata import Kept
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.settings import Search
from bixse.retrieval.structures import parameters

ALL = math.inf
"""As a width: compare every row kept."""

_NEIGHBOURS = 128
"""How many are asked, or as many as are to be fetched. Their cost is that of a search."""
_LEAST_PART = 1 / 16
"""Where less of the neighbours is kept, so few are counted that the part is a guess, and to search
so much wider costs what comparing does."""


def widths(
    index: faiss.Index, vectors_QD: Vectors, search: Search, kept: Kept, fetch: int
) -> Vectors:
    """Of each query, [Q], how many times wider than without a filter to search for `fetch` rows
    that `kept` holds, or `ALL`.

    It depends on neither the batch nor the device.
    """
    if kept.few or isinstance(index, faiss.IndexFlat):
        return np.full(len(vectors_QD), ALL, np.float32)
    asked = min(index.ntotal, max(_NEIGHBOURS, fetch))
    params = parameters(index, search, asked, asked)
    _, rows_QF = index.search(vectors_QD, asked, params=params)
    held_Q = (rows_QF >= 0).sum(axis=1)
    kept_Q = ((rows_QF >= 0) & kept.holds(rows_QF)).sum(axis=1)
    # In powers of two, so that queries of a batch share few widths.
    wider_Q = np.exp2(np.ceil(np.log2(np.maximum(held_Q, 1) / np.maximum(kept_Q, 1))))
    return np.where(kept_Q < _LEAST_PART * held_Q, ALL, wider_Q).astype(np.float32)

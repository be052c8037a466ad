"""The best of the rows that a filter keeps, from a query's neighbours among all rows.

A graph and inverted lists look near the query only, and what a filter keeps may be elsewhere: where
it keeps whole topics, and not the query's, the part of all rows that it keeps says nothing of the
part that a search meets. So the neighbours are asked for as without a filter, some and then more.
Where enough of them are kept, those are the answer, as nearly as the structure finds neighbours at
all; where not, every row kept is compared.

Shapes: Q queries, F neighbours.
"""

import numpy as np
import numpy.typing as npt

from bixse.retrieval.metadata import Kept
from bixse.retrieval.scoring import ROUNDING, Rows, Vectors

_LEAST, _MOST = 128, 4096
"""Neighbours asked for. HNSW finds 128 in about .7 ms and 1,024 in 3.5, and comparing 25,000 rows
takes 5.8 (100,000 x 384, one core, `benchmarks.filtered`). Where to stop asking is not measured."""

_TRUSTED = 2
"""Enough are to stand in the first of so many equal pieces: towards the end a search misses more.
Where filters keep whole topics HNSW found .88 to .91 of the best 10 at 1, .99 to 1 at 2."""


def neighbour_counts(fetch: int, rows: int) -> list[int]:
    """How many neighbours to ask for, one number after the other, where `fetch` of those kept are
    wanted and there are so many rows; none where comparing is no slower.
    """
    first = max(_LEAST, 4 * fetch)
    return [number for number in (first, 8 * first) if number <= min(_MOST, rows)]


def kept_of(
    scores_QF: Vectors, rows_QF: Rows, kept: Kept, fetch: int, k: int, whole: bool
) -> tuple[npt.NDArray[np.bool_], Vectors, Rows]:
    """Which queries have `fetch` kept neighbours or more among those trusted, [Q]; and of those
    queries the scores and rows of all kept neighbours, falling, -inf and -1 behind them.

    With `whole`, only where what ties with the `k`-th of them is among the neighbours too. Scores
    must fall along F.
    """
    held_QF = (rows_QF >= 0) & kept.holds(rows_QF)
    enough_Q = held_QF[:, : held_QF.shape[1] // _TRUSTED].sum(axis=1) >= fetch
    # The kept first, in their order.
    order_QF = np.argsort(~held_QF, axis=1, kind="stable")
    rows_QF = np.take_along_axis(np.where(held_QF, rows_QF, -1), order_QF, axis=1)
    none_QF = np.where(held_QF, scores_QF, np.float32(-np.inf))
    kept_QF = np.take_along_axis(none_QF, order_QF, axis=1)
    if whole:
        enough_Q &= scores_QF[:, -1] < kept_QF[:, k - 1] - np.float32(ROUNDING)
    most = held_QF[enough_Q].sum(axis=1).max(initial=0)
    return enough_Q, kept_QF[enough_Q, :most], rows_QF[enough_Q, :most]

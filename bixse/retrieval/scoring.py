"""Which of the rows that a structure finds are the best `k`, by one score for every shard.

That score is the float64 inner product of query and stored vector, rounded to float32: it does not
depend on the shard, the batch or the BLAS kernel. It is also the slowest, so float32 scores first
leave out what is below the k-th by more than their rounding.

Shapes: Q queries, D dimensions, F rows that a structure gives a query, C candidates of a query,
B of them at a time, K hits. A row -1 is none, and scores -inf.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

ROUNDING = 1e-5
"""Two float32 inner products of the same unit vectors differ by less between kernels."""

_NUMBERS_AT_ONCE = 1 << 18
"""One megabyte of float32: more than a core's cache holds is slower, and memory follows k."""


def near(scores_QF: Vectors, rows_QF: Rows, k: int) -> Rows:
    """The rows [Q, C] that float32 scores leave among the best `k`; scores must fall along F."""
    if not scores_QF.shape[1]:
        return rows_QF
    least_Q1 = scores_QF[:, min(k, scores_QF.shape[1]) - 1, None] - np.float32(ROUNDING)
    may_QF = (rows_QF >= 0) & (scores_QF >= least_Q1)
    most = may_QF.sum(axis=1).max(initial=0)
    return np.where(may_QF, rows_QF, -1)[:, :most]


def best(
    vectors_QD: Vectors, rows_QC: Rows, read: Callable[[Rows], Vectors], k: int
) -> tuple[Rows, Vectors]:
    """The best `k` of these rows and their scores, [Q, K]: higher first, ties by the row number.

    `read` gives the stored vectors of rows. There are fewer than `k` columns where C is less.
    """
    scores_QC = products(vectors_QD.astype(np.float64), rows_QC, read)
    order_QK = np.lexsort((rows_QC, -scores_QC), axis=-1)[:, :k]
    return _along(rows_QC, order_QK), _along(scores_QC, order_QK)


def joined(found: Sequence[tuple[Vectors, Rows]]) -> tuple[Vectors, Rows]:
    """Scores and rows that several have found, the highest score first."""
    scores_QF = np.concatenate([scores for scores, _ in found], axis=1)
    rows_QF = np.concatenate([rows for _, rows in found], axis=1)
    order_QF = np.argsort(-scores_QF, axis=1)
    return _along(scores_QF, order_QF), _along(rows_QF, order_QF)


def _along(values_QC: Any, places_QK: Rows) -> Any:
    # np.take_along_axis takes six times as long for one query.
    return values_QC[np.arange(len(values_QC))[:, None], places_QK]


def products(
    queries_QD: npt.NDArray[Any], rows_QC: Rows, read: Callable[[Rows], Vectors]
) -> Vectors:
    """Inner products in the precision of the queries, some candidates of each at a time."""
    scores_QC = np.full(rows_QC.shape, -np.inf, np.float32)
    step = max(1, _NUMBERS_AT_ONCE // max(1, queries_QD.size))
    for start in range(0, rows_QC.shape[1], step):
        rows_QB = rows_QC[:, start : start + step]
        stored_CD = read(np.maximum(rows_QB, 0).ravel())
        stored_QBD = stored_CD.reshape(*rows_QB.shape, queries_QD.shape[1])
        # einsum adds up each row by itself, asks no BLAS, and widens a piece of it at a time.
        scores_QC[:, start : start + step] = np.einsum("qbd,qd->qb", stored_QBD, queries_QD)
    scores_QC[rows_QC < 0] = -np.inf
    return scores_QC

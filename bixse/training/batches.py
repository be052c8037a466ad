"""Judged pairs become a batch: queries, documents, and what is known of every cell between them.

A batch is a set of judged pairs. Its rows are their distinct queries, its columns their distinct
documents, so that a document that two queries share is encoded once and no cell counts twice
(methods 1.6, 2). A cell that was judged anywhere has its grade as target; a cell that may well be
relevant but was never judged is masked; every other cell has target 0.

Shapes: Q queries and D documents of the batch, P its judged pairs ("own" cells).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bixse.training.groups import Floats, Ints, Labels

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """A global batch, the same on every rank: of its cells those that are not plain zeros.

    The whole Q x D matrices exist only where somebody asks for them.
    """

    query_Q: Ints
    document_D: Ints
    row_K: Ints
    """The known cells, judged in this batch's pairs or elsewhere, in the order of their row."""
    column_K: Ints
    relevance_K: Floats
    """In [0, 1]."""
    own_K: Bools
    """Judged by a pair of this batch."""
    row_M: Ints
    """The masked cells: perhaps relevant, never judged."""
    column_M: Ints
    row_R: Ints
    """Preferences between two documents of the batch, in the order of their row."""
    a_R: Ints
    b_R: Ints
    prob_a_R: Floats
    cell_O: Ints
    """Clicks on known cells, in the order of those; one for each rank of a cell."""
    click_rate_O: Floats
    rank_bias_O: Floats
    click_weight_O: Floats
    set_number: int
    """The set of labels that it is of."""

    @property
    def target_QD(self) -> Floats:
        """Relevance in [0, 1]; 0 where nothing is known."""
        target_QD = np.zeros(self._shape, np.float32)
        target_QD[self.row_K, self.column_K] = self.relevance_K
        return target_QD

    @property
    def mean_target(self) -> float:
        """Of all cells that are not masked."""
        queries, documents = self._shape
        return float(self.relevance_K.sum(dtype=np.float64)) / (
            queries * documents - len(self.row_M)
        )

    @property
    def weight_QD(self) -> Floats:
        """1, or 0 where the cell is masked."""
        weight_QD = np.ones(self._shape, np.float32)
        weight_QD[self.row_M, self.column_M] = 0
        return weight_QD

    @property
    def known_QD(self) -> Bools:
        known_QD = np.zeros(self._shape, np.bool_)
        known_QD[self.row_K, self.column_K] = True
        return known_QD

    @property
    def own_QD(self) -> Bools:
        own_QD = np.zeros(self._shape, np.bool_)
        own_QD[self.row_K, self.column_K] = self.own_K
        return own_QD

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.query_Q), len(self.document_D)


def batch_of(labels: Labels, pairs: Ints, set_number: int = 0) -> Batch:
    """The batch of some pairs; a function of the set of them, not of their order."""
    query_Q = np.unique(labels.query_of(pairs))
    document_D = np.unique(labels.document_P[pairs])
    row, judged = _spans(labels.pairs_from_Q1, query_Q)
    column, here = _columns(document_D, labels.document_P[judged])
    masked = [
        (row, column)
        for row, query in enumerate(query_Q.tolist())
        for column in np.flatnonzero(np.isin(document_D, labels.suspects.get(query, ()))).tolist()
    ]
    row_M, column_M = np.asarray(masked, np.int64).reshape(-1, 2).T
    row_R = a_R = b_R = np.zeros(0, np.int64)
    prob_a_R = np.zeros(0, np.float32)
    if labels.preferences is not None:
        row_R, known = _spans(labels.preferences.from_Q1, query_Q)
        a_R, a_here = _columns(document_D, labels.preferences.a_R[known])
        b_R, b_here = _columns(document_D, labels.preferences.b_R[known])
        both = a_here & b_here
        row_R, a_R, b_R = row_R[both], a_R[both], b_R[both]
        prob_a_R = labels.preferences.prob_a_R[known][both]
    cell_O = np.zeros(0, np.int64)
    rate_O = rank_bias_O = weight_O = np.zeros(0, np.float32)
    if labels.clicks is not None:
        cell_O, seen = _spans(labels.clicks.from_P1, judged[here])
        rate_O, weight_O = labels.clicks.rate_O[seen], labels.clicks.weight_O[seen]
        rank_bias_O = labels.clicks.rank_bias_O[seen]
    return Batch(
        query_Q,
        document_D,
        row[here],
        column[here],
        labels.relevance_P[judged][here],
        np.isin(judged[here], pairs),
        row_M,
        column_M,
        row_R,
        a_R,
        b_R,
        prob_a_R,
        cell_O,
        rate_O,
        rank_bias_O,
        weight_O,
        set_number,
    )


def _spans(from_Q1: Ints, query_Q: Ints) -> tuple[Ints, Ints]:
    """What each query (or pair) has between its two bounds: the place of the query among these, and
    the number of what it has."""
    size_Q = from_Q1[query_Q + 1] - from_Q1[query_Q]
    row = np.repeat(np.arange(len(query_Q)), size_Q)
    before_Q = np.cumsum(size_Q) - size_Q
    return row, np.arange(len(row)) + (from_Q1[query_Q] - before_Q)[row]


def _columns(document_D: Ints, documents: Ints) -> tuple[Ints, Bools]:
    """The columns of some documents, and which of them have one."""
    column: Ints = np.minimum(np.searchsorted(document_D, documents), len(document_D) - 1)
    return column, document_D[column] == documents

"""Scores are float64 products whatever the batch; float32 ones leave out only what cannot win."""

import numpy as np
import pytest

from bixse.retrieval import scoring
from bixse.retrieval.scoring import ROUNDING, best, near
from tests.retrieval.made import unit

RNG = np.random.default_rng(11)
STORED = unit(RNG.normal(size=(500, 48)))
QUERIES = unit(RNG.normal(size=(9, 48)))
ROWS = np.array([RNG.permutation(500)[:70] for _ in QUERIES])


def read(rows: np.ndarray) -> np.ndarray:
    return STORED[rows]


@pytest.mark.parametrize("numbers", [1, 1000, 1 << 20])
def test_the_best_do_not_depend_on_what_is_scored_at_once(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", numbers)
    rows_QK, scores_QK = best(QUERIES, ROWS, read, 10)
    for query, candidates, rows, scores in zip(QUERIES, ROWS, rows_QK, scores_QK, strict=True):
        by_hand = {int(r): np.float32(np.dot(STORED[r].astype(float), query)) for r in candidates}
        assert rows.tolist() == sorted(by_hand, key=lambda row: (-by_hand[row], row))[:10]
        assert scores.tolist() == [by_hand[row] for row in rows.tolist()]
        ((alone,), (own,)) = best(query[None], candidates[None, ::-1], read, 10)
        assert (alone.tolist(), own.tolist()) == (rows.tolist(), scores.tolist())


def test_equal_scores_go_by_row_and_nothing_stands_last() -> None:
    same = np.ones((4, 2), np.float32)
    rows, scores = best(same[:1], np.array([[3, -1, 0, 2]]), lambda rows: same[rows], 4)
    assert rows.tolist() == [[0, 2, 3, -1]]
    assert scores.tolist() == [[2.0, 2.0, 2.0, -np.inf]]


def test_only_what_is_within_rounding_of_the_kth_is_near() -> None:
    third = 0.5
    close, below = third - ROUNDING / 2, third - 3 * ROUNDING
    scores = np.array([[0.9, 0.8, third, close, below], [0.9, 0.8, third, below, -9]], np.float32)
    rows = np.array([[4, 3, 2, 1, 0], [7, 8, 9, 5, -1]])
    assert near(scores, rows, 3).tolist() == [[4, 3, 2, 1], [7, 8, 9, -1]]
    assert near(scores, rows, 5).tolist() == rows.tolist()
    assert near(scores[:0], rows[:0], 3).shape == (0, 0)
    assert near(scores[:, :0], rows[:, :0], 3).shape == (2, 0)

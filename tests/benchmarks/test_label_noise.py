"""Noise in labels: an exact share, another grade each time, the same from run to run."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.label_noise import flip, with_noise
from bixse.records import JUDGMENTS
from bixse.scale import UMBRELA


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_an_exact_share_gets_another_grade(share: float) -> None:
    steps = np.random.default_rng(1).integers(0, 4, 1000)
    noisy = flip(steps, 4, share, seed=7)
    assert (noisy != steps).sum() == round(1000 * share)
    assert set(noisy.tolist()) <= {0, 1, 2, 3}
    assert noisy.tolist() == flip(steps, 4, share, seed=7).tolist()
    if share:
        assert noisy.tolist() != flip(steps, 4, share, seed=8).tolist()
        moves = np.bincount((noisy - steps) % 4, minlength=4)[1:]
        # Each of the three other grades about as often.
        assert moves.min() > 0.25 * moves.sum()


def test_more_noise_keeps_what_less_has_flipped() -> None:
    steps = np.random.default_rng(1).integers(0, 4, 1000)
    some, more = (flip(steps, 4, share, seed=0) for share in (0.2, 0.4))
    assert (more[some != steps] == some[some != steps]).all()


@pytest.mark.parametrize("share, count", [(1.1, 4), (-0.1, 4), (0.5, 1)])
def test_impossible_noise_is_refused(share: float, count: int) -> None:
    with pytest.raises(ValueError, match=r"share of noise|no other"):
        flip(np.zeros(3, np.int64), count, share, seed=0)


def test_noisy_judgments_are_judgments() -> None:
    grades = [0, 1, 2, 3] * 5
    probs = [UMBRELA.grade_probs(grade) for grade in grades]
    table = pa.table(
        {
            "query_id": [f"q{row % 3}" for row in range(20)],
            "doc_id": [f"d{row:02}" for row in range(20)],
            "grade_probs": probs,
            "relevance": [UMBRELA.relevance(p) for p in probs],
            "judge": ["someone"] * 20,
            "prompt": [""] * 20,
            "origin": ["human"] * 20,
            "disagreement": [None] * 20,
        },
        schema=JUDGMENTS,
    )
    noisy = with_noise(table, UMBRELA.values, 0.4, 3)
    assert noisy.equals(with_noise(table.take(list(range(20))[::-1]), UMBRELA.values, 0.4, 3))
    before = {row["doc_id"]: row for row in table.to_pylist()}
    changed = 0
    for row in noisy.to_pylist():
        assert row["relevance"] == pytest.approx(UMBRELA.relevance(row["grade_probs"]), abs=1e-6)
        assert row["query_id"] == before[row["doc_id"]]["query_id"]
        assert row["judge"] == "someone with 0.4 flipped"
        changed += row["relevance"] != before[row["doc_id"]]["relevance"]
    assert changed == 8

"""The simulated log is what it says, and every system learns from the same one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.click_models import TRAINED, Options, Ranked, _labels, _log, compare, quick
from bixse.judging.clicks import rank_bias


def ranked() -> Ranked:
    ids = [(f"q{q}", f"d{d}") for q in range(200) for d in range(5)]
    texts = {name: f"text {name}" for pair in ids for name in pair}
    worth = np.tile([0.0, 1.0, 0.5, 0.0, 1.0], 200)
    return Ranked({f"q{q}": texts[f"q{q}"] for q in range(200)}, texts, ids, worth)


def test_clicks_follow_grades_and_ranks() -> None:
    options = Options(lists=100, ranks=5, swap_share=0.5)
    shown = _log(ranked(), options, seed=0)
    assert shown.impressions_O.sum() == 200 * 100 * 5
    of_pair = np.bincount(shown.pair_O, shown.impressions_O)
    assert (of_pair == 100).all()
    # Places change with the next one only.
    assert (np.abs(shown.rank_O - 1 - shown.pair_O % 5) <= 1).all()
    drawn = _log(ranked(), replace(options, policy="shuffled", swap_share=0.0), seed=0)
    assert (drawn.impressions_O == 100).all()
    ranks_QK = drawn.rank_O.reshape(-1, 5)
    assert (np.sort(ranks_QK, axis=1) == np.arange(1, 6)).all()
    assert len(np.unique(ranks_QK, axis=0)) > 60
    for worth, rank in ((0.0, 1), (1.0, 2), (0.5, 3)):
        here = (ranked().relevance_P[shown.pair_O] == worth) & (shown.rank_O == rank)
        rate = shown.clicks_O[here].sum() / shown.impressions_O[here].sum()
        wanted = 1 / (1 + np.exp(-(-3 + 4 * worth - np.log(rank))))
        assert rate == pytest.approx(wanted, abs=0.02)
    found = rank_bias(shown, 5, 0.5).theta_K
    np.testing.assert_allclose(found, -np.log(np.arange(1, 6)), atol=0.15)


def test_systems_differ_in_what_they_make_of_one_log() -> None:
    options = Options(lists=100, ranks=5, swap_share=0.5)
    shown = _log(ranked(), options, seed=0)
    bias = rank_bias(shown, 5, 0.5)
    labels = {name: _labels(ranked(), shown, bias, name) for name in TRAINED}
    assert {name for name, made in labels.items() if made.clicks is not None} == {
        "two_tower", "rank_blind",
    }  # fmt: skip
    assert labels["human"].relevance_P[:5].tolist() == [0, 1, 0.5, 0, 1]
    # The last of five is as good as the second, and clicked less.
    rates, debiased = (
        labels[name].relevance_P.reshape(-1, 5) for name in ("click_rate", "debiased")
    )
    assert rates[:, 4].mean() < 0.8 * rates[:, 1].mean()
    assert debiased[:, 4].mean() == pytest.approx(debiased[:, 1].mean(), rel=0.05)


@pytest.mark.slow
def test_quick_compares_all_systems(tmp_path: Path) -> None:
    found = compare(quick(replace(Options(), out=str(tmp_path))))
    assert set(found["ndcg@10"]) == {"base", *TRAINED}
    assert found["ndcg@10"]["human"]["mean"] > found["ndcg@10"]["base"]["mean"]

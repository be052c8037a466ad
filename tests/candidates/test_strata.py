"""Samples that keep the shape of the scores, and windows of a ranking."""

import numpy as np
import pytest

from bixse.candidates.strata import Strata, stratified, window_pairs


def entropy(scores: np.ndarray, low: float, high: float) -> float:
    share = np.histogram(scores, bins=8, range=(low, high))[0] / len(scores)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def test_bins_of_score_keep_variance_and_entropy_where_the_best_do_not() -> None:
    """Methods 11: within a tenth of the pool's, over draws; 8 % of single draws miss it."""
    shares = []
    for seed in range(50):
        scores = np.random.default_rng(seed).uniform(-8, 8, 200)
        found = scores[stratified(scores, 32, "score", seed=seed)]
        best = np.sort(scores)[-32:]
        assert len(found) == 32
        shares.append(found.var() / scores.var())
        assert shares[-1] == pytest.approx(1, abs=0.25)
        assert entropy(found, -8, 8) == pytest.approx(entropy(scores, -8, 8), rel=0.1)
        assert best.var() < 0.1 * scores.var()
        assert entropy(best, -8, 8) < 0.5 * entropy(scores, -8, 8)
    assert np.mean(shares) == pytest.approx(1, abs=0.05)
    assert np.mean(np.abs(np.asarray(shares) - 1) < 0.1) > 0.8


def test_a_skewed_pool_is_covered_from_end_to_end() -> None:
    # Most candidates are bad: equal counts follow them, equal widths cover the range.
    scores = np.concatenate([np.linspace(0, 0.1, 95), [0.3, 0.5, 0.7, 0.9, 1.0]])
    by_score = scores[stratified(scores, 10, "score", seed=0)]
    by_rank = scores[stratified(scores, 10, "rank", seed=0)]
    assert set(by_score[-5:].round(1)) == {0.3, 0.5, 0.7, 0.9, 1.0}
    assert (by_rank > 0.1).sum() <= 1
    assert len(by_rank) == len(set(by_rank)) == 10


@pytest.mark.parametrize("by", ["score", "rank"])
def test_ties_small_pools_seeds_and_positives(by: Strata) -> None:
    tied = np.zeros(20)
    found = stratified(tied, 6, by, seed=0)
    assert len(set(found.tolist())) == 6
    assert stratified(tied[:4], 6, by, seed=0).tolist() == [0, 1, 2, 3]
    scores = np.random.default_rng(1).normal(size=50)
    assert stratified(scores, 8, by, 3).tolist() == stratified(scores, 8, by, 3).tolist()
    draws = {tuple(stratified(scores, 8, by, seed).tolist()) for seed in range(5)}
    assert len(draws) > 1
    lowest = int(scores.argmin())
    for seed in range(5):
        kept = stratified(scores, 8, by, seed, keep=(lowest, 7))
        assert len(set(kept.tolist())) == 8
        assert {lowest, 7} <= set(kept.tolist())
    assert stratified(scores, 2, by, 0, keep=(lowest, 7)).tolist() == sorted({lowest, 7})
    with pytest.raises(ValueError, match="3 documents to keep and room for 2"):
        stratified(scores, 2, by, 0, keep=(1, 2, 3))


def test_windows_hold_near_ranks_once() -> None:
    everything = window_pairs(100, 5, 10_000, seed=0)
    assert len(everything) == 95 * 5 + 4 + 3 + 2 + 1
    drawn = window_pairs(100, 5, 100, seed=0)
    assert len(set(drawn)) == 100
    assert all(0 < j - i <= 5 for i, j in drawn)
    assert set(drawn) <= set(everything)
    assert drawn == window_pairs(100, 5, 100, seed=0)
    assert drawn != window_pairs(100, 5, 100, seed=1)
    assert window_pairs(3, 5, 10, seed=0) == [(0, 1), (0, 2), (1, 2)]
    assert window_pairs(1, 5, 10, seed=0) == []

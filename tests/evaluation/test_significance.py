import numpy as np
import pytest
from scipy import stats

from bixse.evaluation.significance import interval, randomisation_p, resampled_means


def test_interval_of_a_constant_is_the_constant():
    means = resampled_means(np.full((20, 1), 0.3), 500, seed=0)
    assert interval(means[:, 0]) == pytest.approx((0.3, 0.3), abs=1e-12)


def test_interval_of_two_queries_is_known():
    # Means of two draws from {0, 1}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4.
    means = resampled_means(np.array([[0.0], [1.0]]), 20_000, seed=0)[:, 0]
    found, counts = np.unique(means, return_counts=True)
    assert found.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(counts / 20_000, [0.25, 0.5, 0.25], atol=0.015)
    assert interval(means) == (0.0, 1.0)


def test_interval_agrees_with_scipy_and_the_normal_one():
    values = np.random.default_rng(1).normal(0.4, 0.2, size=(400, 1))
    low, high = interval(resampled_means(values, 10_000, seed=0)[:, 0])
    theirs = stats.bootstrap(
        (values[:, 0],), np.mean, method="percentile", n_resamples=10_000, rng=0
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1.5e-3)
    width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - width, values.mean() + width), abs=1.5e-3)


def test_the_interval_of_a_difference_is_paired():
    rng = np.random.default_rng(2)
    one = rng.uniform(size=200)
    other = one + 0.05
    means = resampled_means(np.stack([one, other], axis=1), 1000, seed=0)
    # Each varies, their difference never does.
    assert np.ptp(means[:, 0]) > 0.05
    assert interval(means[:, 1] - means[:, 0]) == pytest.approx((0.05, 0.05), abs=1e-12)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(3)
    inside = 0
    for number in range(300):
        values = rng.beta(2, 3, size=(80, 1))
        low, high = interval(resampled_means(values, 400, seed=number)[:, 0])
        inside += low <= 0.4 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_seeds_give_equal_numbers_and_pieces_give_the_whole(monkeypatch):
    values = np.random.default_rng(4).uniform(size=(37, 2))
    differences = values[:, [0]] - values[:, [1]]
    means = resampled_means(values, 300, seed=9)
    p = randomisation_p(differences, 300, seed=9)
    assert not np.array_equal(means, resampled_means(values, 300, seed=10))
    monkeypatch.setattr("bixse.evaluation.significance._CHUNK", 37 * 8)
    np.testing.assert_allclose(resampled_means(values, 300, seed=9), means, atol=1e-15)
    np.testing.assert_allclose(randomisation_p(differences, 300, seed=9), p)


def test_p_of_five_equal_gains_is_one_in_sixteen():
    # Of 32 sign patterns, only all plus and all minus are as extreme: 2 / 32.
    p = randomisation_p(np.ones((5, 1)), 100_000, seed=0)
    assert p[0] == pytest.approx(2 / 32, abs=0.003)


def test_p_agrees_with_the_exact_test_of_scipy():
    rng = np.random.default_rng(5)
    differences = rng.normal(0.3, 1.0, size=(10, 3))
    ours = randomisation_p(differences, 100_000, seed=0)
    for column, p in zip(differences.T, ours, strict=True):
        exact = stats.permutation_test(
            (column, np.zeros(10)), lambda a, b: np.mean(a - b), permutation_type="samples"
        )
        assert p == pytest.approx(exact.pvalue, abs=0.006)


def test_p_is_one_where_nothing_differs_and_never_zero():
    same_and_sure = np.stack([np.zeros(50), np.ones(50)], axis=1)
    p = randomisation_p(same_and_sure, 999, seed=0)
    assert p.tolist() == [1.0, 1 / 1000]


def test_p_is_uniform_when_there_is_no_difference():
    differences = np.random.default_rng(6).normal(size=(60, 400))
    p = randomisation_p(differences, 500, seed=0)
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_no_query_is_refused():
    with pytest.raises(ValueError, match="at least one query"):
        resampled_means(np.zeros((0, 1)), 10, seed=0)
    with pytest.raises(ValueError, match="at least one query"):
        randomisation_p(np.zeros((0, 1)), 10, seed=0)

"""Known answers, and equality with the library on all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from bixse.judging.agreement import (
    Aligned,
    calibration_error,
    confusion,
    grade,
    interval,
    intervals,
    kappa,
    measures,
    reliability,
    steps,
)

FOUR = steps([0, 1, 2, 3])


def aligned(judged: list[float], human: list[float], queries: list[int] | None = None) -> Aligned:
    """Grades 0 to 3 as relevance."""
    numbers = np.asarray(queries or [0] * len(human))
    return Aligned(numbers, np.asarray(judged) / 3, np.asarray(human) / 3, FOUR)


def test_kappa_of_a_worked_matrix() -> None:
    """po = 35/50, pe = 1/2 (the 2 x 2 example of most textbooks)."""
    assert kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    # Observed 1*5 + 4*5 = 25; expected (each off-diagonal count of the margins): see below.
    counts = np.array([[5, 5, 5], [0, 5, 0], [0, 0, 5]])
    weights = np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]])
    chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    expected = 1 - (weights * counts).sum() / (weights * chance).sum()
    assert kappa(counts, "quadratic") == pytest.approx(expected)


def test_kappa_of_one_grade_has_no_value() -> None:
    assert np.isnan(kappa(np.array([[7, 0], [0, 0]])))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_kappa_of_cells_is_kappa_of_pairs(pairs: list[tuple[int, int]]) -> None:
    human, judged = zip(*pairs, strict=True)
    counts = confusion(aligned(list(judged), list(human)))
    assert counts.sum() == len(pairs)
    if len({*human, *judged}) > 1:
        for weights in (None, "quadratic"):
            whole = cohen_kappa_score(human, judged, labels=range(4), weights=weights)
            assert kappa(counts, weights) == pytest.approx(whole)


def test_confusion_has_people_in_rows() -> None:
    counts = confusion(aligned([3, 3, 0], [0, 3, 0]))
    assert counts[0].tolist() == [1, 0, 0, 1]
    assert counts[3].tolist() == [0, 0, 0, 1]


def test_a_grade_is_the_nearest_and_half_goes_up() -> None:
    relevance = np.array([0, 0.16, 1 / 6, 1 / 3, 0.5, 0.83, 5 / 6, 1], np.float32)
    assert grade(relevance.astype(float), FOUR).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert grade(np.array([0, 0.4, 0.5, 1]), steps([1, 2])).tolist() == [0, 0, 1, 1]


def test_measures_of_a_judge_that_is_one_grade_too_kind() -> None:
    found = measures(aligned([1, 2, 3, 1], [0, 1, 2, 1]), bins=10)
    assert found["over_rating"] == pytest.approx(0.25)
    assert found["squared_error"] == pytest.approx(3 / 9 / 4)
    assert found["same_grade"] == pytest.approx(0.25)
    # Of 6 pairs of pairs: 4 agree, none is reversed, one tie on each side.
    assert found["kendall"] == pytest.approx(4 / 5)
    assert "length_bias" not in found


def test_a_judge_that_says_what_people_say_is_faultless() -> None:
    found = measures(aligned([0, 1, 2, 3], [0, 1, 2, 3]), bins=10)
    assert found["kappa"] == found["kappa_quadratic"] == found["kendall"] == 1
    assert found["ece"] == found["ece_width"] == found["over_rating"] == 0


def test_calibration_error_of_worked_bins() -> None:
    judged = np.array([0.05, 0.15, 0.95, 0.95])
    human = np.array([0.0, 0.0, 1.0, 0.5])
    # Width, ten bins: gaps .05, .15, and .2 of two pairs.
    assert calibration_error(judged, human, 10, "width") == pytest.approx((0.05 + 0.15 + 0.4) / 4)
    # Mass, two bins: {.05, .15} against 0, {.95, .95} against .75.
    assert calibration_error(judged, human, 2, "mass") == pytest.approx((0.1 + 0.2) / 2)
    curve = reliability(judged, human, 2, "mass")
    assert [b["pairs"] for b in curve] == [2, 2]
    assert curve[1]["judged"] == pytest.approx(0.95)
    assert curve[1]["human"] == pytest.approx(0.75)


def test_equal_judgments_share_a_bin() -> None:
    """Else the order of the rows would decide, and single grades look better than they are."""
    judged, human = np.full(100, 0.5), np.array([0.0, 1.0] * 50)
    for bins in (1, 10):
        assert len(reliability(judged, human, bins, "mass")) == 1
        assert calibration_error(judged, human, bins, "mass") == 0
    one_each = np.repeat([0.0, 1 / 3, 2 / 3, 1.0], [700, 150, 100, 50])
    assert [b["pairs"] for b in reliability(one_each, one_each, 30, "mass")] == [700, 150, 100, 50]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 9))
def test_bins_lose_no_pair_and_keep_order(pairs: int, bins: int, seed: int) -> None:
    judged = np.random.default_rng(seed).random(pairs).round(1)
    for by in ("mass", "width"):
        curve = reliability(judged, judged, bins, by)
        assert sum(b["pairs"] for b in curve) == pairs
        assert len(curve) <= bins
        means = [b["judged"] for b in curve]
        assert means == sorted(means)


def test_length_bias_is_the_sign_of_the_error_along_length() -> None:
    one = aligned([0, 1, 2, 3], [1, 1, 1, 1])
    length = np.array([10.0, 20, 30, 40])
    kind_to_long = Aligned(one.query_N, one.judged_N, one.human_N, FOUR, length)
    assert measures(kind_to_long, 10)["length_bias"] == pytest.approx(1)
    same_length = Aligned(one.query_N, one.judged_N, one.human_N, FOUR, np.full(4, 9.0))
    assert np.isnan(measures(same_length, 10)["length_bias"])


def test_intervals_draw_queries_not_pairs() -> None:
    rng = np.random.default_rng(0)
    judged, human = rng.integers(0, 4, 100).tolist(), rng.integers(0, 4, 100).tolist()
    of_one = intervals(aligned(judged, human), 10, 5, seed=0)
    low, high = of_one["over_rating"]
    assert low == pytest.approx(high)
    many = aligned(judged, human, list(range(100)))
    low, high = intervals(many, 10, 100, seed=0)["over_rating"]
    error = many.judged_N - many.human_N
    # A query a pair: the textbook standard error of a mean.
    assert high - low == pytest.approx(2 * 1.96 * error.std() / 10, rel=0.25)
    assert low < error.mean() < high


def test_intervals_of_two_queries_reach_from_one_to_the_other() -> None:
    """A quarter of the samples is one of them twice, wherever their pairs stand."""
    both = aligned([3, 0, 3, 0], [0, 0, 0, 0], [1, 0, 1, 0])
    assert intervals(both, 10, 100, seed=0)["over_rating"] == (0, 1)


def test_an_interval_is_of_the_samples_that_have_a_value() -> None:
    assert interval(np.array([np.nan, 0.25, 0.25])) == (0.25, 0.25)
    assert np.isnan(interval(np.array([np.nan, np.nan]))).all()


def test_nothing_graded_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pair was graded by both"):
        measures(aligned([], []), 10)

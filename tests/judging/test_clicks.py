"""What ranks do to clicks: known answers, simulated logs whose truth is known, and what no log can
tell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from bixse.judging.clicks import Shown, placement_weights, rank_bias, relevance_of

Ints = np.ndarray


def shown(*rows: tuple[int, int, int, int]) -> Shown:
    """Rows of pair, rank, impressions and clicks."""
    columns = np.array(sorted(rows), np.int64).T
    return Shown(*columns)


def simulated(seed: int, lists: int, random_share: float, queries: int = 400) -> Shown:
    """Lists of 8 of 25 documents, the best first but in a share of them; theta_k = -log k."""
    draw = np.random.default_rng(seed)
    gamma_QD = draw.integers(-2, 3, (queries, 25)).astype(float)
    counts: dict[tuple[int, int], list[int]] = {}
    for query, gamma_D in enumerate(gamma_QD):
        best = np.argsort(-gamma_D, kind="stable")
        for _ in range(lists):
            order = draw.permutation(25) if draw.random() < random_share else best
            logit = gamma_D[order[:8]] - np.log(np.arange(1, 9))
            for rank, clicked in enumerate(draw.random(8) < 1 / (1 + np.exp(-logit)), start=1):
                count = counts.setdefault((query * 25 + order[rank - 1], rank), [0, 0])
                count[0] += 1
                count[1] += bool(clicked)
    return shown(*((pair, rank, n, c) for (pair, rank), (n, c) in counts.items()))


def test_one_document_at_two_ranks_says_its_odds_ratio() -> None:
    found = rank_bias(shown((0, 1, 100, 50), (0, 2, 200, 40)), 2, 0.5)
    np.testing.assert_allclose(found.theta_K, [0, np.log(0.25)], rtol=0.005)


def test_documents_are_strata() -> None:
    """Mantel and Haenszel: (10 * 80 / 200 + 40 * 80 / 200) / (90 * 20 / 200 + 60 * 20 / 200)."""
    rows = ((0, 1, 100, 10), (0, 2, 100, 20), (1, 1, 100, 40), (1, 2, 100, 20))
    found = rank_bias(shown(*rows), 2, 0.5)
    np.testing.assert_allclose(found.theta_K[1], -np.log((4 + 16) / (9 + 6)), rtol=0.005)


def test_more_of_what_is_known_already_does_not_shift_it() -> None:
    """Ranks 1 and 3 are told apart through rank 2, and the direct ratio agrees."""
    odds = {1: 1.0, 2: 0.5, 3: 0.25}
    rows = []
    for pair, ranks in enumerate([(1, 2), (2, 3), (1, 3), (1, 2, 3)]):
        for rank in ranks:
            rows.append((pair, rank, 3000, round(3000 * odds[rank] / (1 + odds[rank]))))
    found = rank_bias(shown(*rows), 3, deviation=100)
    np.testing.assert_allclose(found.theta_K, np.log([1, 0.5, 0.25]), atol=1e-6)


def test_few_clicks_leave_a_rank_near_a_power_of_its_place() -> None:
    """Ranks 1 and 2 are well known, of rank 8 there is one click: alone it would be a ratio of
    any size."""
    known = ((0, 1, 10_000, 5000), (0, 2, 10_000, 3333))
    theta_2 = np.log(0.5)
    rare = ((1, 2, 50, 0), (1, 8, 1, 1))
    near, far = (rank_bias(shown(*known, *rare), 8, deviation) for deviation in (0.05, 50))
    assert near.theta_K[1] == pytest.approx(theta_2, abs=0.01)
    assert near.theta_K[7] == pytest.approx(3 * theta_2, abs=0.1)
    assert far.theta_K[7] > 2


def test_a_rank_that_nobody_clicked_at_is_low_and_finite() -> None:
    found = rank_bias(shown((0, 1, 10**6, 10**5), (0, 2, 10**6, 0), (0, 3, 10**6, 1)), 3, 0.5)
    assert -30 < found.theta_K[1] < -5
    assert np.isfinite(found.theta_K).all()


@given(st.integers(0, 1000), st.floats(0.1, 5))
@settings(deadline=None, max_examples=30)
def test_what_is_found_is_the_top_of_the_posterior(seed: int, deviation: float) -> None:
    """No step from it, of any rank or of eta, makes the clicks and the prior more likely."""
    draw = np.random.default_rng(seed)
    rows = [
        (pair, rank, n, int(draw.integers(0, n + 1)))
        for pair in range(12)
        for rank in sorted(draw.choice(4, 2, replace=False) + 1)
        for n in [int(draw.integers(1, 9))]
    ]
    found = rank_bias(shown(*rows), 4, deviation).theta_K
    known = np.flatnonzero(np.isfinite(found))

    def posterior(theta: np.ndarray) -> float:
        likely = 0.0
        for i, (pair, rank, n, clicks) in enumerate(rows):
            for j, (other, lower, m, _) in enumerate(rows):
                if pair == other and i != j:
                    passed = m - rows[j][3]
                    lead = theta[rank - 1] - theta[lower - 1]
                    likely -= 2 * clicks * passed / (n + m) * np.log1p(np.exp(-lead))
        line = np.log(known + 1.0)
        eta = -(theta[known] @ line) / (line @ line + deviation**2 / 100)
        return (
            likely
            - float(np.square(theta[known] + eta * line).sum()) / (2 * deviation**2)
            - (eta**2 / 200)
        )

    theta = np.where(np.isfinite(found), found, 0.0)
    best = posterior(theta)
    for rank in known[1:]:
        for change in (-1e-3, 1e-3):
            assert posterior(theta + change * (np.arange(4) == rank)) < best + 1e-9


@pytest.mark.parametrize(
    "lists, random_share, most", [(50, 0.1, 0.25), (50, 1.0, 0.1), (5, 1.0, 0.3)]
)
def test_what_ranks_do_is_found_whatever_the_policy(
    lists: int, random_share: float, most: float
) -> None:
    found = rank_bias(simulated(0, lists, random_share), 8, 0.5)
    wrong_K = np.abs(found.theta_K + np.log(np.arange(1, 9)))
    assert wrong_K.mean() < most
    assert (wrong_K[1:] < 6 * found.error_K[1:]).all()


def test_a_log_without_swaps_says_nothing_of_ranks() -> None:
    found = rank_bias(simulated(0, 20, 0.0), 8, 0.5)
    assert found.known_K.tolist() == [True, *[False] * 7]


def test_ranks_are_known_where_documents_connect_them() -> None:
    rows = [
        *((0, 1, 10, 5), (0, 2, 10, 4)),
        *((1, 3, 10, 5), (1, 4, 10, 4)),
        # Nobody clicked at either: it says nothing.
        *((2, 2, 10, 0), (2, 5, 10, 0)),
    ]
    found = rank_bias(shown(*rows), 6, 0.5)
    assert found.known_K.tolist() == [True, True, False, False, False, False]
    joined = rank_bias(shown(*rows, (3, 2, 10, 3), (3, 4, 10, 5)), 6, 0.5)
    assert joined.known_K.tolist() == [True, True, True, True, False, False]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=8))
@settings(deadline=None, max_examples=60)
def test_known_ranks_are_those_that_swaps_lead_to_from_the_first(
    swaps: list[tuple[int, int]],
) -> None:
    rows = [(pair, rank, 10, 5) for pair, both in enumerate(swaps) for rank in sorted({*both})] or [
        (0, 1, 10, 5)
    ]
    found = rank_bias(shown(*rows), 6, 0.5)
    reached = {1}
    for _ in swaps:
        reached |= {rank for both in swaps if reached & {*both} for rank in both}
    assert set(np.flatnonzero(found.known_K) + 1) == reached


def test_relevance_is_the_click_rate_at_rank_one_where_there_is_much() -> None:
    rows = shown((0, 1, 10**6, 300_000), (1, 2, 10**6, 176_470), (2, 2, 1, 0))
    theta_O = np.array([0.0, np.log(0.5), np.log(0.5)])
    found = relevance_of(rows, theta_O, prior_deviation=1.0)
    # Odds of 3 in 7, once as they are and once halved by the rank.
    np.testing.assert_allclose(found[:2], [0.3, 0.3], atol=1e-4)
    assert 0.15 < found[2] < 0.3


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=2, max_size=8),
    st.floats(0.1, 3),
)
@settings(deadline=None, max_examples=80)
def test_relevance_is_a_mode_and_rises_with_clicks(
    counts: list[tuple[int, int]], deviation: float
) -> None:
    rows = [(pair, 1, n, min(n, c)) for pair, (n, c) in enumerate(counts)]
    log = shown(*rows)
    found = relevance_of(log, np.zeros(len(rows)), deviation)
    assert ((found > 0) & (found < 1)).all()
    clicks, impressions = log.clicks_O.sum(), log.impressions_O.sum()
    middle = brentq(lambda m: clicks - impressions / (1 + np.exp(-m)) - m / 100, -30, 30)
    gamma = np.log(found / (1 - found))
    slope = log.clicks_O - log.impressions_O * found - (gamma - middle) / deviation**2
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    for one, relevance in zip(rows, found, strict=True):
        for other, theirs in zip(rows, found, strict=True):
            if one[2] == other[2] and one[3] < other[3]:
                assert relevance < theirs


def test_placement_weights_are_inverse_shares_clipped_with_mean_one() -> None:
    impressions, of_query = np.array([90, 10, 1, 100]), np.array([100, 100, 100, 100])
    found = placement_weights(impressions, of_query, largest=20)
    np.testing.assert_allclose(found / found[3], [100 / 90, 10, 20, 1])
    assert np.average(found, weights=impressions) == pytest.approx(1)
    fixed = placement_weights(np.array([7, 7]), np.array([7, 7]), largest=10)
    assert fixed.tolist() == [1, 1]

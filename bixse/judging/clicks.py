"""Clicks: what a rank does to them, and what is left of them as relevance.

The additive model of two-tower click models, arXiv 2506.20501: a click on document d, shown for
query q at rank k, has the probability

    sigma(theta_k + gamma_qd),  theta_1 = 0

with theta what the rank does and gamma what the document is worth. Only documents that were shown
at two ranks for the same query tell the two apart (finding 1): theta is known among ranks that such
documents connect, and nothing is said of the others.

theta comes from comparisons, in which gamma has no part: where a document was clicked at rank j and
not at rank k, for the same query, j wins against k, and it does so with probability
sigma(theta_j - theta_k) (Bradley and Terry's model; the likelihood given that one of the two was
clicked). The comparisons of a pair weigh the same over its impressions, as in Mantel and Haenszel's
odds ratio, which this is for two ranks: so it stays right where each pair was shown a few times
only, as maximum likelihood with a gamma for every pair does not, and no encoder's errors end up in
it, as they do where theta is learnt beside one (finding 3). A log has few clicks far down, so
theta_k is drawn to -eta log k, with eta found in the log.

Shapes: O observations, a pair of query and document at a rank; P pairs; K ranks, from 1.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_ANYWHERE = 10.0
"""Deviation of what is known but where all was clicked, or nothing: how often documents are, and
how steeply clicks fall with the rank."""
_STEPS, _FARTHEST = 200, 2.0
"""Of Newton's method; a dozen steps do."""
_GROUPS = 20
"""Of the jackknife."""


@dataclass(frozen=True)
class Shown:
    """How often pairs were shown at a rank, and clicked there."""

    pair_O: Ints
    """Rising, from 0."""
    rank_O: Ints
    """Rising within a pair."""
    impressions_O: Ints
    clicks_O: Ints

    def where(self, chosen_O: npt.NDArray[np.bool_]) -> "Shown":
        """Some of them; a pair may have none then, and keeps its number."""
        return Shown(
            self.pair_O[chosen_O],
            self.rank_O[chosen_O],
            self.impressions_O[chosen_O],
            self.clicks_O[chosen_O],
        )


@dataclass(frozen=True)
class RankBias:
    """What each rank does to the log-odds of a click, beside rank 1."""

    theta_K: Floats
    """NaN for a rank that nothing connects with rank 1."""
    error_K: Floats
    """Standard errors, by a jackknife over groups of pairs; NaN where a group alone connects."""

    @property
    def known_K(self) -> npt.NDArray[np.bool_]:
        return np.isfinite(self.theta_K)


def rank_bias(shown: Shown, ranks: int, deviation: float) -> RankBias:
    """theta of ranks 1 to `ranks`, which lies about `deviation` from a power of the rank."""
    theta_K = _theta(shown, ranks, deviation)
    groups = min(_GROUPS, int(shown.pair_O.max(initial=0)) + 1)
    without_GK = np.stack(
        [
            _theta(shown.where(shown.pair_O % groups != group), ranks, deviation)
            for group in range(groups)
        ]
    )
    apart_GK = without_GK - without_GK.mean(axis=0)
    error_K = np.sqrt(np.square(apart_GK).sum(axis=0) * (groups - 1) / groups)
    return RankBias(theta_K, error_K)


def _theta(shown: Shown, ranks: int, deviation: float) -> Floats:
    wins_KK = _wins(shown, ranks)
    _, part_K = connected_components(wins_KK > 0, directed=False)
    (known,) = np.nonzero(part_K == part_K[0])
    theta_K = np.full(ranks, np.nan)
    theta_K[0] = 0.0
    if len(known) > 1:
        wins_KK = wins_KK[np.ix_(known, known)]
        theta_K[known] = _most_likely(wins_KK, np.log(known + 1.0), deviation)
    return theta_K


def _wins(shown: Shown, ranks: int) -> Floats:
    """How often a document was clicked at one rank and not at another, [K, K].

    Two over its impressions each: of a pair shown as often at two ranks, which hardly differ, they
    bend the likelihood as its clicks themselves do.
    """
    pairs = int(shown.pair_O.max(initial=-1)) + 1
    impressions_P = np.bincount(shown.pair_O, shown.impressions_O, pairs)
    place = shown.pair_O, shown.rank_O - 1
    clicked, passed = shown.clicks_O, shown.impressions_O - shown.clicks_O
    clicked_PK = coo_array((2 * clicked / impressions_P[shown.pair_O], place), (pairs, ranks))
    passed_PK = coo_array((passed, place), (pairs, ranks))
    wins_KK: Floats = (clicked_PK.T.tocsr() @ passed_PK.tocsr()).toarray()
    np.fill_diagonal(wins_KK, 0)
    return wins_KK


def _most_likely(wins_KK: Floats, log_rank_K: Floats, deviation: float) -> Floats:
    """theta, of which the first is 0, where its posterior is highest; by Newton's method.

    Of theta and eta together: sum_jk wins_jk log sigma(theta_j - theta_k) - sum_k (theta_k + eta
    log k)^2 / (2 deviation^2) - eta^2 / 200, which is concave.
    """
    ranks, precision = len(wins_KK), 1 / deviation**2
    both = np.zeros(ranks)  # theta after the first, then eta.
    for _ in range(_STEPS):
        theta_K, eta = np.append(0.0, both[:-1]), both[-1]
        wins = _sigma(theta_K[:, None] - theta_K)
        surprise_KK = wins_KK * (1 - wins)
        curvature_KK = (wins_KK + wins_KK.T) * wins * (1 - wins)
        from_line_K = theta_K + eta * log_rank_K
        slope_K = surprise_KK.sum(axis=1) - surprise_KK.sum(axis=0) - from_line_K * precision
        slope_eta = -(from_line_K @ log_rank_K) * precision - eta / _ANYWHERE**2
        slope = np.append(slope_K[1:], slope_eta)
        bend = np.zeros((ranks, ranks))
        bend[:-1, :-1] = (np.diag(curvature_KK.sum(axis=1)) - curvature_KK)[1:, 1:]
        bend[:-1, :-1] += np.eye(ranks - 1) * precision
        bend[:-1, -1] = bend[-1, :-1] = log_rank_K[1:] * precision
        bend[-1, -1] = log_rank_K @ log_rank_K * precision + 1 / _ANYWHERE**2
        step = np.linalg.solve(bend, slope)
        # Far from the top a whole step may pass it by.
        both = both + np.clip(step, -_FARTHEST, _FARTHEST)
        if np.abs(step).max() < 1e-10:
            break
    return np.append(0.0, both[:-1])


def relevance_of(shown: Shown, theta_O: Floats, prior_deviation: float) -> Floats:
    """sigma(gamma) of each pair, [P]: how probably it would be clicked at rank 1.

    gamma is the mode under a normal prior of the deviation around what fits all clicks together: a
    pair that was shown once is worth little more or less than any. `theta_O` is of the rank of each
    observation.
    """
    pairs = int(shown.pair_O.max()) + 1
    low, high = np.full(1, -30.0), np.full(1, 30.0)
    as_one = replace(shown, pair_O=np.zeros_like(shown.pair_O))
    (middle,) = _bisected(as_one, theta_O, low, high, 0.0, _ANYWHERE)
    reach = np.full(pairs, 30.0)
    gamma_P = _bisected(shown, theta_O, middle - reach, middle + reach, middle, prior_deviation)
    return _sigma(gamma_P)


def _bisected(
    shown: Shown, theta_O: Floats, low: Floats, high: Floats, middle: float, deviation: float
) -> Floats:
    """Where the derivative of each pair's log posterior is 0; it falls."""
    for _ in range(60):
        gamma = (low + high) / 2
        expected_O = shown.impressions_O * _sigma(gamma[shown.pair_O] + theta_O)
        slope = np.bincount(shown.pair_O, shown.clicks_O - expected_O, len(gamma))
        rising = slope - (gamma - middle) / deviation**2 > 0
        low, high = np.where(rising, gamma, low), np.where(rising, high, gamma)
    found: Floats = (low + high) / 2
    return found


def placement_weights(impressions_O: Ints, of_query_O: Ints, largest: float) -> Floats:
    """1 / P(document at its rank | query), which imitates a policy that places at random.

    P is the share of the query's impressions (`of_query_O`) in which the document stood there. At
    most `largest`, then with a mean of 1 over the impressions. A policy that always shows the same
    list has P = 1 and weights of 1 (findings 3 and 4).
    """
    weight_O = np.minimum(of_query_O / impressions_O, largest)
    weight_O /= np.average(weight_O, weights=impressions_O)
    found: Floats = weight_O
    return found


def _sigma(logit: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-np.clip(logit, -700, 700)))
    return found

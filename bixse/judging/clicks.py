"""Clicks: what a rank does to them, and what is left of them as relevance.

The additive model of two-tower click models, arXiv 2506.20501: a click on document d, shown for
query q at rank k, has the probability

    sigma(theta_k + gamma_qd),  theta_1 = 0

with theta what the rank does and gamma what the document is worth. Only documents that were shown
at two ranks for the same query tell the two apart (finding 1): theta is known among ranks that such
documents connect, and nothing is said of the others.

theta comes from a tower that has a gamma for every pair, so that no encoder's errors end up in it
(finding 3), and by Mantel and Haenszel's common odds ratio, which stays right where each pair was
shown a few times only; maximum likelihood does not (Breslow, Biometrika 1981).

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
"""Deviation of what all documents have in common: known but where all were clicked, or none."""
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


@dataclass(frozen=True)
class _OddsRatios:
    """Of pairs of ranks, log of the common odds ratio of a click and its variance."""

    first: Ints
    second: Ints
    log_ratio: Floats
    variance: Floats


def rank_bias(shown: Shown, ranks: int) -> RankBias:
    """theta of ranks 1 to `ranks`: the weighted least squares of the odds ratios between ranks."""
    theta_K = _theta(shown, ranks)
    groups = min(_GROUPS, int(shown.pair_O.max(initial=0)) + 1)
    without_GK = np.stack(
        [_theta(_some(shown, shown.pair_O % groups != group), ranks) for group in range(groups)]
    )
    apart_GK = without_GK - without_GK.mean(axis=0)
    error_K = np.sqrt(np.square(apart_GK).sum(axis=0) * (groups - 1) / groups)
    return RankBias(theta_K, error_K)


def _some(shown: Shown, chosen_O: npt.NDArray[np.bool_]) -> Shown:
    return Shown(
        shown.pair_O[chosen_O],
        shown.rank_O[chosen_O],
        shown.impressions_O[chosen_O],
        shown.clicks_O[chosen_O],
    )


def _theta(shown: Shown, ranks: int) -> Floats:
    ratios = _odds_ratios(shown, ranks)
    edges = coo_array((np.ones(len(ratios.first)), (ratios.first, ratios.second)), (ranks, ranks))
    _, part_K = connected_components(edges, directed=False)
    (known,) = np.nonzero(part_K == part_K[0])
    theta_K = np.full(ranks, np.nan)
    theta_K[0] = 0.0
    if len(known) > 1:
        theta_K[known[1:]] = _least_squares(ratios, known)
    return theta_K


def _odds_ratios(shown: Shown, ranks: int) -> _OddsRatios:
    """Mantel and Haenszel's ratio of every two ranks, over the pairs shown at both.

    Its variance is that of Robins, Breslow and Greenland (Biometrics 1986). Two ranks whose ratio
    is 0 or infinite say nothing of each other.
    """
    sums = np.zeros((5, ranks * ranks))
    yes, no = shown.clicks_O, shown.impressions_O - shown.clicks_O
    apart = 1
    while (same := np.flatnonzero(shown.pair_O[apart:] == shown.pair_O[:-apart])).size:
        i, j = same, same + apart
        total = (shown.impressions_O[i] + shown.impressions_O[j]).astype(np.float64)
        for_i, for_j = yes[i] * no[j] / total, no[i] * yes[j] / total
        agree, differ = (yes[i] + no[j]) / total, (no[i] + yes[j]) / total
        key = (shown.rank_O[i] - 1) * ranks + shown.rank_O[j] - 1
        terms = (
            for_i,
            for_j,
            agree * for_i,
            agree * for_j + differ * for_i,
            differ * for_j,
        )
        sums += np.stack([np.bincount(key, term, ranks * ranks) for term in terms])
        apart += 1
    (keys,) = np.nonzero((sums[0] > 0) & (sums[1] > 0))
    r, s, pr, mixed, qs = sums[:, keys]
    variance = pr / (2 * r**2) + mixed / (2 * r * s) + qs / (2 * s**2)
    return _OddsRatios(keys // ranks, keys % ranks, np.log(r / s), variance)


def _least_squares(ratios: _OddsRatios, known: Ints) -> Floats:
    """theta of the known ranks but the first, which has 0."""
    place = np.full(known.max() + 1, -1)
    place[known] = np.arange(len(known))
    here = np.isin(ratios.first, known)
    i, j = place[ratios.first[here]], place[ratios.second[here]]
    weight = 1 / ratios.variance[here]
    design = np.zeros((len(i), len(known)))
    design[np.arange(len(i)), i] = 1
    design[np.arange(len(i)), j] = -1
    inner = design[:, 1:]
    precision = inner.T @ (inner * weight[:, None])
    theta = np.linalg.solve(precision, inner.T @ (weight * ratios.log_ratio[here]))
    return np.asarray(theta, np.float64)


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

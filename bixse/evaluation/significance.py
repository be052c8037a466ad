"""How sure a mean over queries is, and how sure a difference between two systems.

The queries are the sample. Intervals are percentile bootstrap intervals (Efron 1979): the queries
are drawn again with replacement, the same draws for every system and measure, so that the interval
of a difference is paired. P-values come from Fisher's paired randomisation test, which needs no
assumption on the distribution (Smucker, Allan & Carterette, CIKM 2007).

Shapes: Q queries, M measures (or systems and measures), B resamples.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Random numbers held at a time; memory follows this, not the queries.
_CHUNK = 1 << 22


def resampled_means(values_QM: Floats, resamples: int, seed: int) -> Floats:
    """Means over bootstrap samples of the queries, [B, M]; column by column the same samples.

    Raises ValueError without a query.
    """
    queries = len(values_QM)
    if queries == 0:
        raise ValueError("an interval needs at least one query")
    rng = np.random.default_rng(seed)
    means_BM = np.empty((resamples, values_QM.shape[1]))
    rows = max(1, _CHUNK // queries)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn_BQ = rng.integers(0, queries, size=(size, queries))
        for column, values_Q in enumerate(values_QM.T):
            means_BM[start : start + size, column] = values_Q[drawn_BQ].mean(axis=1)
    return means_BM


def interval(means_B: Floats, level: float = 0.95) -> tuple[float, float]:
    """The central interval that holds `level` of the resampled means."""
    tail = (1 - level) / 2
    low, high = np.quantile(means_B, [tail, 1 - tail])
    return float(low), float(high)


def randomisation_p(differences_QM: Floats, resamples: int, seed: int) -> Floats:
    """Two-sided p of each column's mean difference, [M], under random signs of the differences.

    The observed signs count as one of the draws, so p is never 0 (Phipson & Smyth 2010); it is 1
    where no query differs. Raises ValueError without a query.
    """
    queries = len(differences_QM)
    if queries == 0:
        raise ValueError("a test needs at least one query")
    rng = np.random.default_rng(seed)
    # A sum that is equal but for its order of addition is as extreme.
    observed_M = np.abs(differences_QM.sum(axis=0)) * (1 - 1e-12) - 1e-15
    extreme_M = np.ones(differences_QM.shape[1])
    rows = max(1, _CHUNK // queries)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        signs_BQ = rng.integers(0, 2, size=(size, queries), dtype=np.int8) * 2.0 - 1.0
        extreme_M += (np.abs(signs_BQ @ differences_QM) >= observed_M).sum(axis=0)
    p_M: Floats = extreme_M / (resamples + 1)
    return p_M

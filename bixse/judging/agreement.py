"""A judge against people, on pairs that both have graded.

    kappa            Cohen's kappa of the two grades (Cohen 1960); kappa_quadratic weighs a
                     disagreement by the squared distance of the grades (Cohen 1968)
    kendall          tau-b of judged and human relevance over all pairs, ties counted (Kendall 1945)
    same_grade       share of pairs with one grade
    over_rating      mean of judged - human relevance; above 0 the judge is too kind
    squared_error    mean of (judged - human)^2
    ece              sum_b n_b / N |mean judged_b - mean human_b| over bins b of equally many pairs
                     (Naeini et al., AAAI 2015); pairs of equal judged relevance share a bin, so
                     that grades without a distribution make a bin each
    ece_width        the same over bins of equal width on [0, 1] (Guo et al., ICML 2017)
    length_bias      Spearman correlation of judged - human with the document's length

A grade is the step of the human scale nearest to a relevance, upwards from half-way. So judges on
any scale, and judges behind a calibration map, are measured alike. Where a measure has no value (a
single grade, no variance) it is NaN here and null in a report, never a number.

Shape suffixes: N pairs, K grades of the human scale, B resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import cohen_kappa_score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bins = Literal["mass", "width"]


@dataclass(frozen=True)
class Aligned:
    """N pairs, each with what the judge says and what people say."""

    query_N: Ints
    """Number of the query: queries are the sample that intervals draw from."""
    judged_N: Floats
    """Relevance in [0, 1]."""
    human_N: Floats
    """Relevance in [0, 1]."""
    steps_K: Floats
    """Relevance of each grade of the human scale, rising."""
    length_N: Floats | None = None
    """Characters of the document, where they are known."""

    def __len__(self) -> int:
        return len(self.query_N)

    def at(self, rows_N: Ints) -> "Aligned":
        """These rows, in this order."""
        length_N = None if self.length_N is None else self.length_N[rows_N]
        return Aligned(
            self.query_N[rows_N], self.judged_N[rows_N], self.human_N[rows_N], self.steps_K,
            length_N,
        )  # fmt: skip


def steps(values: Sequence[float]) -> Floats:
    """Relevance of each grade of a scale with these values."""
    values_K = np.asarray(values, np.float64)
    steps_K: Floats = (values_K - values_K[0]) / (values_K[-1] - values_K[0])
    return steps_K


def grade(relevance_N: Floats, steps_K: Floats) -> Ints:
    """Number of the grade nearest to each relevance; half-way goes up."""
    middle = (steps_K[1:] + steps_K[:-1]) / 2
    # float32 columns: two thirds of a step apart, never within 1e-6 of a middle but by rounding.
    found: Ints = np.searchsorted(middle - 1e-6, relevance_N, side="right").astype(np.int64)
    return found


def confusion(aligned: Aligned) -> Ints:
    """[K, K] counts: a row for each human grade, a column for each grade of the judge."""
    steps_K, K = aligned.steps_K, len(aligned.steps_K)
    cell_N = grade(aligned.human_N, steps_K) * K + grade(aligned.judged_N, steps_K)
    counts: Ints = np.bincount(cell_N, minlength=K * K).reshape(K, K)
    return counts


def kappa(counts_KK: Ints, weights: Literal["quadratic"] | None = None) -> float:
    """Cohen's kappa of a confusion matrix; NaN where both sides know one grade only."""
    rows, columns = np.nonzero(counts_KK)
    if len({*rows.tolist(), *columns.tolist()}) < 2:
        return float("nan")
    labels = range(len(counts_KK))
    counts = counts_KK[rows, columns]
    # Each cell once, weighing what it counts, is the same as every pair by itself.
    found = cohen_kappa_score(rows, columns, labels=labels, weights=weights, sample_weight=counts)
    return float(found)


def reliability(judged_N: Floats, human_N: Floats, bins: int, by: Bins) -> list[dict[str, float]]:
    """The reliability curve: of each bin that holds a pair its pairs and both mean relevances."""
    order_N = np.argsort(judged_N, kind="stable")
    number_N = _bin(judged_N, bins, by)[order_N]
    starts = np.flatnonzero(np.diff(number_N, prepend=-1))
    pairs = np.diff(starts, append=len(order_N))
    judged = np.add.reduceat(judged_N[order_N], starts) / pairs
    human = np.add.reduceat(human_N[order_N], starts) / pairs
    rows = zip(pairs.tolist(), judged.tolist(), human.tolist(), strict=True)
    return [{"pairs": n, "judged": j, "human": h} for n, j, h in rows]


def _bin(judged_N: Floats, bins: int, by: Bins) -> Ints:
    """Number of each pair's bin; equal values share one."""
    if by == "width":
        return np.minimum((judged_N * bins).astype(np.int64), bins - 1)
    place_N = np.searchsorted(np.sort(judged_N), judged_N, side="left")
    return place_N * bins // len(judged_N)


def calibration_error(judged_N: Floats, human_N: Floats, bins: int, by: Bins) -> float:
    """Expected calibration error over `reliability`'s bins."""
    curve = reliability(judged_N, human_N, bins, by)
    return sum(b["pairs"] * abs(b["judged"] - b["human"]) for b in curve) / len(judged_N)


def measures(aligned: Aligned, bins: int) -> dict[str, float]:
    """Every figure of the module's docstring. Raises ValueError without a pair."""
    if not len(aligned):
        raise ValueError("no pair was graded by both the judge and people")
    counts_KK = confusion(aligned)
    judged_N, human_N = aligned.judged_N, aligned.human_N
    error_N = judged_N - human_N
    found = {
        "kappa": kappa(counts_KK),
        "kappa_quadratic": kappa(counts_KK, "quadratic"),
        "kendall": _correlation(kendalltau, judged_N, human_N),
        "same_grade": float(np.trace(counts_KK) / len(aligned)),
        "over_rating": float(error_N.mean()),
        "squared_error": float((error_N**2).mean()),
        "ece": calibration_error(judged_N, human_N, bins, "mass"),
        "ece_width": calibration_error(judged_N, human_N, bins, "width"),
    }
    if aligned.length_N is not None:
        found["length_bias"] = _correlation(spearmanr, error_N, aligned.length_N)
    return found


def _correlation(of: Any, a_N: Floats, b_N: Floats) -> float:
    if np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return float("nan")  # scipy warns and says the same.
    return float(of(a_N, b_N).statistic)


def resampled(aligned: Aligned, bins: int, resamples: int, seed: int) -> dict[str, Floats]:
    """[B] of each measure over bootstrap samples of the queries; of one seed and the same queries
    the same samples, so that differences of two judges are paired.
    """
    order_N = np.argsort(aligned.query_N, kind="stable")
    starts = np.flatnonzero(np.diff(aligned.query_N[order_N], prepend=-1))
    rows_of = np.split(order_N, starts[1:])
    rng = np.random.default_rng(seed)
    drawn: list[Mapping[str, float]] = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(rows_of), size=len(rows_of))
        drawn.append(measures(aligned.at(np.concatenate([rows_of[q] for q in chosen])), bins))
    return {name: np.array([one[name] for one in drawn]) for name in drawn[0]}


def interval(values_B: Floats) -> tuple[float, float]:
    """Central 95 %; resamples that leave a measure without a value are left out.

    Calibration error cannot be negative and a sample's bins are noisy, so that its interval may lie
    above a value near 0.
    """
    values_B = values_B[np.isfinite(values_B)]
    if not len(values_B):
        return float("nan"), float("nan")
    low, high = np.quantile(values_B, [0.025, 0.975])
    return float(low), float(high)


def intervals(
    aligned: Aligned, bins: int, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap interval of each measure; whole queries are drawn again."""
    found = resampled(aligned, bins, resamples, seed)
    return {name: interval(values_B) for name, values_B in found.items()}

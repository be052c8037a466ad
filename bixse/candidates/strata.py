"""A sample of candidates that covers the range of a teacher's scores (arXiv 2604.04734).

The best k distort the distribution that a student is to learn: they lie close together. Taking one
from each stratum of the range keeps its variance and entropy (methods 11; the binning is ours, the
paper's is unknown).

Shapes: N candidates of a query.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
Strata = Literal["score", "rank"]


def stratified(
    score_N: Scores, count: int, by: Strata, seed: int, keep: tuple[int, ...] = ()
) -> Ints:
    """Rows of `count` candidates in rising order, `keep` (the positives) among them.

    score: bins of equal width from the lowest to the highest score; an empty one takes what is left
    nearest to its middle. rank: bins of equal count in the order of scores. One is drawn from each.
    All candidates where there are no more than `count`. A function of its arguments; ties in score
    stand in the order of the rows. Raises ValueError when `keep` is larger than `count`.
    """
    kept = list(dict.fromkeys(keep))
    if len(kept) > count:
        raise ValueError(f"{len(kept)} documents to keep and room for {count}")
    if len(score_N) <= count:
        return np.arange(len(score_N))
    left = np.setdiff1d(np.arange(len(score_N)), kept)
    left = left[np.argsort(score_N[left], kind="stable")]
    draw = np.random.default_rng(seed)
    bins = count - len(kept)
    if by == "rank":
        kept += [int(draw.choice(part)) for part in np.array_split(left, bins)] if bins else []
        return np.sort(np.asarray(kept, np.int64))
    edges = np.linspace(score_N.min(), score_N.max(), bins + 1)
    inside = np.clip(np.searchsorted(edges, score_N[left], side="right") - 1, 0, bins - 1)
    members = [left[inside == number] for number in range(bins)]
    taken = {number: int(draw.choice(part)) for number, part in enumerate(members) if len(part)}
    kept += taken.values()
    for number in (number for number in range(bins) if number not in taken):
        free = left[~np.isin(left, kept)]
        middle = (edges[number] + edges[number + 1]) / 2
        kept.append(int(free[np.abs(score_N[free] - middle).argmin()]))
    return np.sort(np.asarray(kept, np.int64))


def window_pairs(count: int, window: int, sample: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of ranks (i, j), i < j <= i + window, both from 0: what a pairwise judge is asked.

    `sample` of them drawn without replacement, in rising order (all, where there are no more): the
    near ranks are what pointwise scores leave open (PairDistill, arXiv 2410.01383: window 5, sample
    100 of the top 100). The better-ranked stands first.
    """
    pairs = [(i, j) for i in range(count) for j in range(i + 1, min(count, i + window + 1))]
    if len(pairs) <= sample:
        return pairs
    drawn = np.random.default_rng(seed).choice(len(pairs), sample, replace=False)
    return [pairs[number] for number in np.sort(drawn)]

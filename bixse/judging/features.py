"""The embedded judge: an ordinal model of BM25, cosine, term overlap and title match.

Proportional odds (McCullagh 1980, JRSS B 42:109) over the grades of a scale, K of them:

    P(grade <= k | x) = sigmoid(threshold_k - w . x),  k = 0 .. K-2,  w >= 0

so `grade_probs` is a distribution and more evidence never lowers the expected relevance. The four
features are shares or a cosine, none grows with the corpus:

    bm25     BM25 of the document / the best BM25 that the query has in its corpus, in [0, 1];
             0 when no document shares a word with the query
    cosine   of query and document (title and text) under the packaged encoder, in [-1, 1]
    overlap  share of the query's distinct terms that stand in the document, title included
    title    share of the query's distinct terms that stand in the title; 0 without a title

Terms are what BM25 sees: stemmed words without stop words. A query without terms has shares of 0.
`features.json` beside this file holds the coefficients, how they came about and how far the judge
agrees with people; `benchmarks/fit_features.py` writes it. It is the baseline that a language model
must beat, not a substitute for one.

Shape suffixes: N documents of a query, F features, K grades, T = K - 1 thresholds.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bixse.scale import SCALES, Scale

FEATURES = ("bm25", "cosine", "overlap", "title")
"""Columns of every feature array, in order."""

FITTED = Path(__file__).with_name("features.json")

Floats = npt.NDArray[np.float64]


def features(
    *,
    bm25_N: npt.ArrayLike,
    bm25_top: float,
    cosine_N: npt.ArrayLike,
    query_terms: Sequence[str],
    doc_terms: Sequence[Sequence[str]],
    title_terms: Sequence[Sequence[str]],
) -> Floats:
    """[N, F]: the evidence on the N documents of one query.

    `bm25_top` is the highest score of the query over the whole corpus, `doc_terms` and
    `title_terms` hold the terms of each document (title and text) and of its title alone.

    Raises ValueError when a number is not finite or outside its range, or lengths differ.
    """
    scores_N = np.asarray(bm25_N, np.float64)
    cosines_N = np.asarray(cosine_N, np.float64)
    counts = {scores_N.size, cosines_N.size, len(doc_terms), len(title_terms)}
    if len(counts) != 1:
        raise ValueError(f"features of one query need equally many values each, found {counts}")
    if not (np.isfinite(scores_N).all() and np.isfinite(cosines_N).all() and np.isfinite(bm25_top)):
        raise ValueError("a BM25 score or a cosine is not finite")
    if scores_N.size and (scores_N.min() < 0 or scores_N.max() > bm25_top * (1 + 1e-6)):
        raise ValueError(f"BM25 scores must lie between 0 and the query's best, {bm25_top:g}")
    if (np.abs(cosines_N) > 1 + 1e-3).any():
        raise ValueError("a cosine lies outside [-1, 1]: are the vectors unit length?")
    wanted = frozenset(query_terms)
    columns = (
        scores_N / bm25_top if bm25_top > 0 else np.zeros_like(scores_N),
        cosines_N,
        [_share(wanted, terms) for terms in doc_terms],
        [_share(wanted, terms) for terms in title_terms],
    )
    return np.column_stack([np.asarray(column, np.float64) for column in columns])


def _share(wanted: frozenset[str], found: Sequence[str]) -> float:
    return len(wanted.intersection(found)) / len(wanted) if wanted else 0.0


def ordinal_probs(evidence_N: Floats, thresholds_T: Floats) -> Floats:
    """[N, K]: the distribution over the grades at `evidence` = w . x, thresholds rising."""
    probs_NK: Floats = np.exp(ordinal_log_probs(evidence_N, thresholds_T))
    return probs_NK


def ordinal_log_probs(evidence_N: Floats, thresholds_T: Floats) -> Floats:
    """[N, K]: its logarithm, through s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), s the sigmoid.

    The plain difference would lose the tails: both sigmoids round to 1.
    """
    excess_NT = evidence_N[:, None] - thresholds_T[None, :]
    below_NT, above_NT = -np.logaddexp(0.0, excess_NT), -np.logaddexp(0.0, -excess_NT)
    gap_K = np.concatenate([[0.0], np.log(-np.expm1(-np.diff(thresholds_T))), [0.0]])
    log_probs_NK: Floats = np.tile(gap_K, (len(evidence_N), 1))
    log_probs_NK[:, :-1] += below_NT
    log_probs_NK[:, 1:] += above_NT
    return log_probs_NK


@dataclass(frozen=True)
class FeaturesJudge:
    """Coefficients in, distributions over grades out; loaded once, called often."""

    scale: Scale
    weights: tuple[float, ...]
    """One a feature, in the order of `FEATURES`, none negative."""
    thresholds: tuple[float, ...]
    """K - 1, rising."""
    encoder: str
    """Fingerprint of the encoder whose cosines it was fitted on; others mean other numbers."""

    def __post_init__(self) -> None:
        numbers = (*self.weights, *self.thresholds)
        gaps = np.diff(self.thresholds)
        if len(self.weights) != len(FEATURES) or len(gaps) != len(self.scale.values) - 2:
            raise ValueError(
                f"a features judge on scale {self.scale.name} needs {len(FEATURES)} weights and "
                f"{len(self.scale.values) - 1} thresholds, "
                f"found {len(self.weights)} and {len(self.thresholds)}"
            )
        if not np.isfinite(numbers).all() or min(self.weights) < 0 or (gaps <= 0).any():
            raise ValueError("weights must be finite and not negative, thresholds must rise")

    @classmethod
    def load(cls, path: Path = FITTED) -> "FeaturesJudge":
        """The fitted judge. Raises ValueError when the file is of other features."""
        found = json.loads(path.read_text())
        if tuple(found["weights"]) != FEATURES:
            raise ValueError(f"{path.name} has features {list(found['weights'])}, not {FEATURES}")
        return cls(
            scale=SCALES[found["scale"]],
            weights=tuple(float(w) for w in found["weights"].values()),
            thresholds=tuple(float(t) for t in found["thresholds"]),
            encoder=found["encoder"]["fingerprint"],
        )

    @property
    def fingerprint(self) -> str:
        """Identity of its answers: features, coefficients, scale and encoder."""
        identity = [FEATURES, self.weights, self.thresholds, self.scale.name, self.encoder]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def grade_probs(self, features_NF: npt.ArrayLike) -> Floats:
        """[N, K]: a distribution over the grades of `scale` for each row of features.

        Raises ValueError when a feature is not finite or the width is not F.
        """
        x_NF = np.asarray(features_NF, np.float64)
        if x_NF.ndim != 2 or x_NF.shape[1] != len(FEATURES):
            raise ValueError(f"expected features [N, {len(FEATURES)}], found {x_NF.shape}")
        if not np.isfinite(x_NF).all():
            row, column = np.argwhere(~np.isfinite(x_NF))[0]
            raise ValueError(f"feature {FEATURES[column]} of row {row} is not finite")
        return ordinal_probs(x_NF @ np.asarray(self.weights), np.asarray(self.thresholds))

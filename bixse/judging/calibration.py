"""A map from what a judge says to what people would say, applied when judgments are read.

Judgments stay as they were made: they hold the judge's distribution, so another map costs no new
answer. Two maps:

    temperature   p_k' = p_k^(1/T) / sum_j p_j^(1/T)   (Guo et al., ICML 2017): T minimises
                  -sum_k y_k log p_k' over p_k > 0, y the human relevance as a distribution on
                  the judge's scale; one grade with all the probability has no temperature
    isotonic      relevance' = f(relevance), f the non-decreasing function of least squared error
                  (Zadrozny & Elkan, KDD 2002), linear between its knots; of judgments that are one
                  grade each, f is the mean human relevance of every grade

`isotonic` never turns the order of two pairs around, `temperature` never that of a pair's grades:
what it makes of unlike distributions may change places. `isotonic` gives the mean of what people
say, and a mean is seldom an end of the scale: calibration error falls, and agreement of single
grades (kappa) may fall with it.

Shape suffixes: N pairs, K grades of the judge's scale.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

from bixse.artifacts import Artifact
from bixse.judging.given import ASSUMED
from bixse.settings import Settings

Floats = npt.NDArray[np.float64]

FILE = "calibration.json"
KIND = "calibration"

LEAST_PAIRS = 100
"""Pairs that an isotonic map is fitted on at the least (ours).

A step function has as many knots as the pairs ask for, and of few pairs it follows their noise. Of
maps drawn from two years of trec-dl for the third (12 judge-years, 100 draws each), 27 % of those
of 10 pairs made the squared error larger than without a map, 14 % of 20, 3 % of 50, .5 % of 100 and
none of 200; their mean distance from the map of all pairs was .14, .11, .07, .05 and .04. Below 200
to 1,000 cases a curve of two parameters is the better one still (Niculescu-Mizil & Caruana, ICML
2005).
"""

_TINY = 1e-9
"""The least probability that a logarithm is taken of: float32 cannot tell smaller ones apart."""


class Temperature(Settings):
    """One number that sharpens (below 1) or softens the judge's distributions."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(gt=0)


class Isotonic(Settings):
    """Knots of a rising function from relevance to relevance; flat outside them."""

    kind: Literal["isotonic"] = "isotonic"
    judged: tuple[float, ...] = Field(min_length=1)
    human: tuple[float, ...] = Field(min_length=1)


class Calibration(Settings):
    """A fitted map, and whose judgments it is for."""

    map: Annotated[Temperature | Isotonic, Field(discriminator="kind")]
    signed: tuple[tuple[str, str], ...]
    """(judge, prompt) of the judgments it was fitted on: it says nothing of others."""
    scale: tuple[float, ...]
    """Values of the judge's grades."""
    pairs: int
    queries: int


def expected_relevance(probs_NK: Floats, scale: Sequence[float]) -> Floats:
    """`Scale.relevance` of every row."""
    values_K = np.asarray(scale, np.float64)
    mean_N = probs_NK @ values_K / probs_NK.sum(axis=1)
    found: Floats = np.clip((mean_N - values_K[0]) / (values_K[-1] - values_K[0]), 0.0, 1.0)
    return found


def apply(map_: Temperature | Isotonic, probs_NK: Floats, scale: Sequence[float]) -> Floats:
    """[N]: calibrated relevance in [0, 1] of distributions over a scale with these values."""
    if map_.kind == "temperature":
        return expected_relevance(_tempered(probs_NK, map_.temperature), scale)
    relevance_N = expected_relevance(probs_NK, scale)
    found: Floats = np.interp(relevance_N, map_.judged, map_.human)
    return found


def _tempered(probs_NK: Floats, temperature: float) -> Floats:
    log_NK = np.log(np.maximum(probs_NK, _TINY)) / temperature
    powers_NK = np.exp(log_NK - log_NK.max(axis=1, keepdims=True))
    powers_NK[probs_NK <= 0] = 0
    tempered: Floats = powers_NK / powers_NK.sum(axis=1, keepdims=True)
    return tempered


def fit_isotonic(probs_NK: Floats, human_N: Floats, scale: Sequence[float]) -> Isotonic:
    """The isotonic map of N pairs. Raises ValueError without a pair."""
    _check(probs_NK, human_N)
    regression = IsotonicRegression(y_min=0, y_max=1, increasing=True)
    regression.fit(expected_relevance(probs_NK, scale), human_N)
    return Isotonic(
        judged=tuple(regression.X_thresholds_.tolist()),
        human=tuple(regression.y_thresholds_.tolist()),
    )


def fit_temperature(probs_NK: Floats, human_N: Floats, scale: Sequence[float]) -> Temperature:
    """The temperature of N pairs, between 0.05 and 20.

    A grade without any probability (of sampled votes, or below an endpoint's top tokens) keeps none
    at every temperature: what people say of it says nothing of T and is left out.

    Raises ValueError without a pair, or when every judgment is a single grade.
    """
    _check(probs_NK, human_N)
    if single_grades(probs_NK):
        raise ValueError(
            "every judgment is a single grade: no temperature changes it; fit isotonic instead"
        )
    target_NK = np.where(probs_NK > 0, _narrow(human_N, scale), 0.0)

    def loss(log_temperature: float) -> float:
        tempered_NK = _tempered(probs_NK, np.exp(log_temperature))
        log_NK = np.log(np.maximum(tempered_NK, np.finfo(np.float64).tiny))
        return float(-(target_NK * log_NK).sum(axis=1).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return Temperature(temperature=float(np.exp(found.x)))


def single_grades(probs_NK: Floats) -> bool:
    """Whether every judgment gives one grade all the probability."""
    return bool((probs_NK.max(axis=1) >= 1 - 1e-6).all())


def _narrow(relevance_N: Floats, scale: Sequence[float]) -> Floats:
    """[N, K]: the narrowest distributions with this relevance (`Scale.grade_probs` of each)."""
    values_K = np.asarray(scale, np.float64)
    grade_N = values_K[0] + relevance_N * (values_K[-1] - values_K[0])
    below_N = np.clip(np.searchsorted(values_K, grade_N, side="right") - 1, 0, len(values_K) - 2)
    step_N = values_K[below_N + 1] - values_K[below_N]
    above_N = (grade_N - values_K[below_N]) / step_N
    target_NK: Floats = np.zeros((len(grade_N), len(values_K)))
    rows_N = np.arange(len(grade_N))
    target_NK[rows_N, below_N] = 1 - above_N
    target_NK[rows_N, below_N + 1] = above_N
    return target_NK


def _check(probs_NK: Floats, human_N: Floats) -> None:
    if not len(human_N):
        raise ValueError("nothing to fit a map on: no pair was graded by both the judge and people")
    if not (np.isfinite(probs_NK).all() and np.isfinite(human_N).all()):
        raise ValueError("grade probabilities and human relevance must be finite")


def grade_probs(table: pa.Table, scale: Sequence[float]) -> Floats:
    """[N, K] of a table of JUDGMENTS. Raises ValueError when a row is not of this scale."""
    column = table["grade_probs"].combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != len(scale)).any():
        raise ValueError(f"the judgments are not on the scale {list(scale)} of their manifest")
    probs_NK: Floats = column.flatten().to_numpy().astype(np.float64).reshape(-1, len(scale))
    return probs_NK


def signers(table: pa.Table) -> tuple[tuple[str, str], ...]:
    """Every (judge, prompt) that signed a row, sorted."""
    rows = table.select(["judge", "prompt"]).group_by(["judge", "prompt"]).aggregate([])
    return tuple(sorted((row["judge"], row["prompt"]) for row in rows.to_pylist()))


def relevance(table: pa.Table, scale: Sequence[float], calibration: Calibration | None) -> Floats:
    """[N]: relevance of the rows of JUDGMENTS as training reads it, through the map if any.

    A candidate that nobody judged stays what it was assumed to be: no judge's answer is mapped.

    Raises ValueError when the map was fitted on another scale or has not seen a row's judge or
    prompt: of them it knows nothing.
    """
    if calibration is None:
        stored: Floats = table["relevance"].to_numpy().astype(np.float64)
        return stored
    if tuple(scale) != calibration.scale:
        raise ValueError(
            f"the calibration map is for the scale {list(calibration.scale)}, "
            f"the judgments are on {list(scale)}"
        )
    known = {*calibration.signed, (ASSUMED, "")}
    foreign = [signer for signer in signers(table) if signer not in known]
    if foreign:
        raise ValueError(
            f"the calibration map was fitted on {_named(calibration.signed)}, "
            f"the judgments are also by {_named(foreign)}: fit one on them"
        )
    probs_NK = grade_probs(table, scale)
    found_N = apply(calibration.map, probs_NK, scale)
    assumed_N = pc.equal(table["judge"], ASSUMED).to_numpy()
    found_N[assumed_N] = expected_relevance(probs_NK[assumed_N], scale)
    return found_N


def _named(signed: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{judge} (prompt {prompt})" if prompt else judge for judge, prompt in signed)


def load(artifact: Artifact) -> Calibration:
    """The map that an artefact of kind `calibration` holds."""
    return Calibration.model_validate_json(artifact.place.read(FILE))

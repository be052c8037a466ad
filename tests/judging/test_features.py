"""The embedded judge: hand-worked probabilities, order, refusals, and agreement measured again."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.judging.features import FEATURES, FITTED, FeaturesJudge, features, ordinal_probs
from bixse.judging.features_fit import fit_ordinal
from bixse.models.encoder import encoder_fingerprint, resolve
from bixse.scale import LIGHTBLUE, UMBRELA

DATA = Path(__file__).parents[2].parent / "shared" / "data"

JUDGE = FeaturesJudge(UMBRELA, (2.0, 3.0, 0.0, 1.0), (1.0, 2.0, 4.0), encoder="x")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_probabilities_by_hand() -> None:
    """Evidence 2 * 0.5 + 3 * 0.4 + 0 + 1 * 0.3 = 2.5 against thresholds 1, 2 and 4."""
    (probs,) = JUDGE.grade_probs([[0.5, 0.4, 0.9, 0.3]])
    at_most = [sigmoid(1 - 2.5), sigmoid(2 - 2.5), sigmoid(4 - 2.5), 1.0]
    expected = [at_most[0], *(b - a for a, b in itertools.pairwise(at_most))]
    assert probs == pytest.approx(expected, abs=1e-12)


def test_tails_keep_their_mass() -> None:
    """Where plain differences of sigmoids would be 0, each grade is a constant odds away."""
    low, high = ordinal_probs(np.array([-60.0, 60.0]), np.array([-1.0, 0.0, 2.0]))
    assert low[1:] == pytest.approx(
        np.exp(-60) * np.array([math.e - 1, 1 - math.exp(-2), math.exp(-2)]), rel=1e-9
    )
    assert high[:3] == pytest.approx(
        np.exp(-60) * np.array([math.exp(-1), 1 - math.exp(-1), math.exp(2) - 1]), rel=1e-9
    )


unit = st.floats(0, 1)
row = st.tuples(unit, st.floats(-1, 1), unit, unit)


@given(st.lists(row, min_size=1, max_size=20))
def test_every_row_is_a_distribution(rows: list[tuple[float, ...]]) -> None:
    for judge in (JUDGE, FeaturesJudge.load()):
        probs = judge.grade_probs(rows)
        assert probs.shape == (len(rows), 4)
        assert (probs > 0).all()
        assert probs.sum(axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-12)
        for found in probs:
            assert 0 <= judge.scale.relevance(found.tolist()) <= 1


@given(row, st.integers(0, len(FEATURES) - 1), st.floats(0.01, 1))
def test_more_evidence_never_lowers_relevance(
    values: tuple[float, ...], column: int, more: float
) -> None:
    """Strictly higher where the weight is positive, and at every grade: no mass moves down."""
    judge = FeaturesJudge.load()
    raised = list(values)
    raised[column] += more
    before, after = judge.grade_probs([values, raised])
    at_least_before, at_least_after = (np.cumsum(p[::-1])[:-1] for p in (before, after))
    assert (at_least_after >= at_least_before - 1e-12).all()
    if judge.weights[column] > 0:
        assert judge.scale.relevance(after.tolist()) > judge.scale.relevance(before.tolist())


def test_features_by_hand() -> None:
    found = features(
        bm25_N=[3.0, 12.0, 0.0],
        bm25_top=12.0,
        cosine_N=[0.25, -0.5, 1.0],
        query_terms=["open", "file", "file", "mode"],
        doc_terms=[["open", "file", "file"], ["mode"], []],
        title_terms=[["open"], [], []],
    )
    assert found == pytest.approx(
        np.array([[0.25, 0.25, 2 / 3, 1 / 3], [1.0, -0.5, 1 / 3, 0.0], [0.0, 1.0, 0.0, 0.0]])
    )


def test_a_query_without_words_has_no_shares() -> None:
    found = features(
        bm25_N=[0.0],
        bm25_top=0.0,
        cosine_N=[0.3],
        query_terms=[],
        doc_terms=[["word"]],
        title_terms=[["word"]],
    )
    assert found.tolist() == [[0.0, 0.3, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"bm25_N": [math.nan]}, "not finite"),
        ({"bm25_top": math.inf}, "not finite"),
        ({"cosine_N": [math.inf]}, "not finite"),
        ({"cosine_N": [1.5]}, "unit length"),
        ({"bm25_N": [-1.0]}, "between 0 and the query's best, 2"),
        ({"bm25_N": [3.0]}, "between 0 and the query's best, 2"),
        ({"doc_terms": []}, "equally many"),
        ({"bm25_N": [1.0, 1.0]}, "equally many"),
    ],
)
def test_features_refuse_what_cannot_be(wrong: dict[str, object], sentence: str) -> None:
    right = {
        "bm25_N": [1.0],
        "bm25_top": 2.0,
        "cosine_N": [0.5],
        "query_terms": ["a"],
        "doc_terms": [["a"]],
        "title_terms": [[]],
    }
    assert features(**right).shape == (1, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        features(**{**right, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", range(len(FEATURES)))
def test_a_feature_that_is_not_finite_is_refused(bad: float, column: int) -> None:
    rows = np.zeros((3, len(FEATURES)))
    rows[1, column] = bad
    with pytest.raises(ValueError, match=f"feature {FEATURES[column]} of row 1 is not finite"):
        JUDGE.grade_probs(rows)


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected features \[N, 4\]"):
        JUDGE.grade_probs([[0.1, 0.2, 0.3]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": (1.0, 1.0, 1.0)},
        {"weights": (1.0, 1.0, 1.0, -0.1)},
        {"weights": (1.0, 1.0, 1.0, math.nan)},
        {"thresholds": (1.0, 3.0, 2.0)},
        {"thresholds": (1.0, 2.0)},
        {"scale": LIGHTBLUE},
    ],
)
def test_a_judge_of_another_shape_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="weights"):
        dataclasses.replace(JUDGE, **wrong)  # type: ignore[arg-type]


def test_the_file_agrees_with_the_code(tmp_path: Path) -> None:
    stored = json.loads(FITTED.read_text())
    judge = FeaturesJudge.load()
    assert tuple(stored["weights"]) == FEATURES
    assert judge.scale is UMBRELA
    assert judge.weights == tuple(stored["weights"].values())
    # The judge of this machine's packaged encoder is the one that was fitted.
    assert judge.encoder == encoder_fingerprint(resolve(stored["encoder"]["start"]))
    other = tmp_path / "features.json"
    stored["weights"]["length"] = 1.0
    other.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="has features"):
        FeaturesJudge.load(other)


def test_the_fingerprint_covers_what_shapes_an_answer() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"weights": (2.0, 3.0, 0.0, 1.1)},
        {"thresholds": (1.0, 2.0, 4.1)},
        {"encoder": "y"},
    ]
    prints = {dataclasses.replace(JUDGE, **c).fingerprint for c in changes}  # type: ignore[arg-type]
    assert len(prints) == len(changes)
    assert dataclasses.replace(JUDGE).fingerprint == JUDGE.fingerprint


def simulated(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of unlike spread, and grades drawn from `JUDGE`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 4)) * [1.0, 0.3, 2.0, 1.0]
    probs = JUDGE.grade_probs(x)
    grades = (rng.random(rows)[:, None] > np.cumsum(probs, axis=1)).sum(axis=1)
    return x, np.eye(4)[grades]


def test_the_fit_finds_the_model_that_made_the_grades() -> None:
    x, target = simulated(20_000)
    weights, thresholds = fit_ordinal(x, target, np.ones(len(x)), l2=0.0)
    assert weights == pytest.approx(JUDGE.weights, abs=0.12)
    assert weights[2] == pytest.approx(0.0, abs=0.03)
    assert thresholds == pytest.approx(JUDGE.thresholds, abs=0.1)
    found = ordinal_probs(x @ weights, thresholds)
    assert found.mean(axis=0) == pytest.approx(target.mean(axis=0), abs=1e-3)


def test_a_row_of_weight_two_is_a_row_twice() -> None:
    x, target = simulated(400)
    weight = np.where(np.arange(400) < 100, 2.0, 1.0)
    twice = np.concatenate([np.arange(400), np.arange(100)])
    once = fit_ordinal(x, target, weight, l2=1e-3)
    repeated = fit_ordinal(x[twice], target[twice], np.ones(500), l2=1e-3)
    for a, b in zip(once, repeated, strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_a_feature_that_speaks_against_relevance_gets_no_weight() -> None:
    x, target = simulated(2000)
    weights, _ = fit_ordinal(-x, target, np.ones(len(x)), l2=1e-3)
    assert weights == pytest.approx(np.zeros(4), abs=1e-6)


def test_the_fit_refuses_what_it_cannot_fit() -> None:
    x, target = simulated(100)
    with pytest.raises(ValueError, match="finite"):
        fit_ordinal(np.where(x > 1, np.nan, x), target, np.ones(100), l2=0.0)
    with pytest.raises(ValueError, match="no pair has grade number 3"):
        fit_ordinal(x, np.eye(4)[np.arange(100) % 3], np.ones(100), l2=0.0)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, the public graded sets")
def test_agreement_with_people_is_what_the_file_says() -> None:
    """Measured again from text: BM25, encoder, features, judge, on queries it was not fitted on."""
    from benchmarks.fit_features import agreement
    from benchmarks.graded_sets import SOURCES, Collection
    from bixse.models.encoder import Encoder
    from bixse.models.settings import PACKAGED

    stored = json.loads(FITTED.read_text())["agreement"]["recheck"]
    source = next(source for source in SOURCES if source.name == stored["set"])
    collection = Collection(source, DATA, Encoder.load(PACKAGED), cache=None)
    assert stored["split"] == "test"
    found = agreement(FeaturesJudge.load(), collection.rows("test", stored["queries"]))
    said = stored["agreement"]
    assert found["pairs"] == said["pairs"]
    for measure in ("spearman", "kappa", "auc", "ece"):
        assert found[measure] == pytest.approx(said[measure], abs=0.02), measure

"""Maps with known answers, and the refusals of a map that was fitted on something else."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.judging.calibration import (
    Calibration,
    Isotonic,
    Temperature,
    apply,
    expected_relevance,
    fit_isotonic,
    fit_temperature,
    relevance,
    signers,
)
from bixse.judging.given import ASSUMED
from bixse.records import JUDGMENTS
from bixse.scale import LIGHTBLUE, UMBRELA, Scale

SCALE = UMBRELA.values


def one_hot(grades: list[int]) -> np.ndarray:
    return np.eye(4)[grades]


def table(probs: np.ndarray, judge: str = "gpt", prompt: str = "p") -> pa.Table:
    rows = [
        {
            "query_id": f"q{n}", "doc_id": "d", "grade_probs": row, "judge": judge,
            "relevance": UMBRELA.relevance(row), "prompt": prompt, "origin": "llm",
        }
        for n, row in enumerate(probs.tolist())
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=JUDGMENTS)


@pytest.mark.parametrize("scale", [UMBRELA, LIGHTBLUE])
def test_expected_relevance_is_that_of_the_scale(scale: Scale) -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(len(scale.values)), 50)
    each = [scale.relevance(row) for row in probs.tolist()]
    assert expected_relevance(probs, scale.values) == pytest.approx(np.array(each))


def test_isotonic_of_single_grades_is_what_people_say_on_average() -> None:
    judged = [0, 0, 1, 1, 2, 2, 3, 3]
    human = np.array([0, 0, 0, 1, 1, 2, 2, 3]) / 3
    fitted = fit_isotonic(one_hot(judged), human, SCALE)
    assert apply(fitted, one_hot([0, 1, 2, 3]), SCALE) == pytest.approx(
        np.array([0, 0.5, 1.5, 2.5]) / 3
    )


def test_isotonic_pools_what_falls() -> None:
    """Grade 2 is worth less than grade 1 to people: both become their common mean."""
    human = np.array([0.0, 0.6, 0.6, 0.2, 0.2, 1.0])
    fitted = fit_isotonic(one_hot([0, 1, 1, 2, 2, 3]), human, SCALE)
    assert apply(fitted, one_hot([0, 1, 2, 3]), SCALE) == pytest.approx([0, 0.4, 0.4, 1])


def test_isotonic_is_linear_between_its_knots_and_flat_outside() -> None:
    fitted = Isotonic(judged=(1 / 3, 2 / 3), human=(0.1, 0.5))
    between = np.array([[0, 0.5, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert apply(fitted, between, SCALE) == pytest.approx([0.3, 0.1, 0.5])


def test_temperature_is_recovered() -> None:
    """People draw from p; the judge says p sharpened: T brings p back."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(4, 2.0), 20_000)
    sharp = truth**2.5 / (truth**2.5).sum(axis=1, keepdims=True)
    drawn = (rng.random((len(truth), 1)) > truth.cumsum(axis=1)).sum(axis=1)
    fitted = fit_temperature(sharp, drawn / 3, SCALE)
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert apply(fitted, sharp, SCALE) == pytest.approx(expected_relevance(truth, SCALE), abs=0.02)
    assert fit_temperature(sharp, drawn / 3, (1, 2, 3, 4)) == fitted


def test_a_temperature_stays_within_its_bounds() -> None:
    probs = np.array([[0.28, 0.24, 0.24, 0.24]])
    agreed, contradicted = (fit_temperature(probs, np.array([z]), SCALE) for z in (0.0, 1.0))
    assert 0.05 <= agreed.temperature < 0.051
    assert 19.9 < contradicted.temperature <= 20


def test_grades_without_a_vote_have_no_part_in_the_temperature() -> None:
    """People and votes are drawn from one p: what is to be mended is the noise of ten votes, and
    no temperature gives a grade without a vote any."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(4, 0.3), 4000)
    votes = rng.multinomial(10, truth) / 10
    drawn = (rng.random((len(truth), 1)) > truth.cumsum(axis=1)).sum(axis=1) / 3
    fitted = fit_temperature(votes[:2000], drawn[:2000], SCALE)
    assert fitted.temperature == pytest.approx(1.1, abs=0.1)
    raw, mapped = expected_relevance(votes, SCALE), apply(fitted, votes, SCALE)
    errors = [((found - drawn)[2000:] ** 2).mean() for found in (raw, mapped)]
    assert errors[1] < errors[0] + 1e-4


def test_temperature_one_changes_nothing_and_zero_stays_zero() -> None:
    probs = np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 0.5, 0.5], [1, 0, 0, 0]])
    same = apply(Temperature(temperature=1), probs, SCALE)
    assert same == pytest.approx(expected_relevance(probs, SCALE))
    assert apply(Temperature(temperature=20), probs, SCALE)[1:] == pytest.approx([2.5 / 3, 0])


def test_single_grades_have_no_temperature() -> None:
    with pytest.raises(ValueError, match="fit isotonic instead"):
        fit_temperature(one_hot([0, 1, 2, 3]), np.array([0, 0.3, 0.6, 1]), SCALE)


@pytest.mark.parametrize("fit", [fit_isotonic, fit_temperature])
def test_what_no_map_can_be_fitted_on_is_an_error(fit: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="nothing to fit a map on"):
        fit(np.zeros((0, 4)), np.zeros(0), SCALE)
    even = np.full((2, 4), 0.25)
    for probs, human in ((even * np.nan, [0.0, 1.0]), (even, [0.0, np.nan])):
        with pytest.raises(ValueError, match="must be finite"):
            fit(probs, np.array(human), SCALE)


@given(st.integers(0, 20), st.integers(2, 60))
def test_isotonic_never_adds_squared_error_where_it_was_fitted(seed: int, pairs: int) -> None:
    rng = np.random.default_rng(seed)
    probs, human = rng.dirichlet(np.ones(4), pairs), rng.random(pairs)
    before = expected_relevance(probs, SCALE)
    after = apply(fit_isotonic(probs, human, SCALE), probs, SCALE)
    assert ((after - human) ** 2).mean() <= ((before - human) ** 2).mean() + 1e-12
    assert after.mean() == pytest.approx(human.mean())  # no over-rating is left
    order = np.argsort(before, kind="stable")
    assert (np.diff(after[order]) >= -1e-12).all()


def calibration(**changes: object) -> Calibration:
    return Calibration(
        map=Isotonic(judged=(0, 1), human=(0.1, 0.6)), signed=(("gpt", "p"),), scale=SCALE,
        pairs=10, queries=2,
    ).replace(**changes)  # fmt: skip


def test_judgments_read_through_a_map_and_stay_as_they_are() -> None:
    rows = table(one_hot([0, 3]))
    assert relevance(rows, SCALE, None) == pytest.approx([0, 1])
    assert relevance(rows, SCALE, calibration()) == pytest.approx([0.1, 0.6])
    assert rows["relevance"].to_pylist() == [0, 1]


def test_a_map_of_other_judges_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"fitted on gpt \(prompt p\).*also by llama"):
        relevance(table(one_hot([0]), judge="llama"), SCALE, calibration())
    with pytest.raises(ValueError, match=r"also by gpt \(prompt other\)"):
        relevance(table(one_hot([0]), prompt="other"), SCALE, calibration())
    both = pa.concat_tables([table(one_hot([0]), "llama"), table(one_hot([0, 0]), prompt="")])
    assert signers(both) == (("gpt", ""), ("llama", "p"))


def test_a_candidate_that_nobody_judged_is_not_mapped() -> None:
    """It is irrelevant by assumption, and no map can be fitted on what nobody said."""
    assumed = table(one_hot([0]), judge=ASSUMED, prompt="")
    rows = pa.concat_tables([table(one_hot([0, 3])), assumed])
    assert relevance(rows, SCALE, calibration()) == pytest.approx([0.1, 0.6, 0])


def test_a_map_of_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="for the scale"):
        relevance(table(one_hot([0])), (1, 2, 3, 4), calibration())
    with pytest.raises(ValueError, match="not on the scale"):
        relevance(table(one_hot([0])), (1, 2, 3, 4, 5), calibration(scale=(1, 2, 3, 4, 5)))


@pytest.mark.parametrize(
    "map_", [Temperature(temperature=1.5), Isotonic(judged=(0, 1), human=(0, 0.5))]
)
def test_a_map_reads_back_from_its_json(map_: Temperature | Isotonic) -> None:
    one = calibration(map=map_)
    assert Calibration.model_validate_json(one.model_dump_json()) == one

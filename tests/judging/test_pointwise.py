"""Log-probabilities in, one judgment or one rejection out."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.judging.pointwise import BROKEN, Logprobs, judgment, refuse_unreadable, unreadable
from bixse.judging.prompts import PROMPTS
from bixse.records import Judgment, Rejection

UMBRELA = PROMPTS["umbrela"]


def judge(*by_order: Logprobs, min_grade_mass: float = 0.5) -> Judgment | Rejection:
    return judgment("q", "d", by_order, UMBRELA, "tiny", min_grade_mass)


def logs(*probs: float) -> list[float | None]:
    return [math.log(p) for p in probs]


def test_both_orders_by_hand() -> None:
    """Masses 0.8 and 0.5: renormalised (1, 1, 2, 4)/8 and (2, 1, 1, 1)/5, then the mean."""
    found = judge(logs(0.1, 0.1, 0.2, 0.4), logs(0.2, 0.1, 0.1, 0.1))
    assert isinstance(found, Judgment)
    assert found.grade_probs == pytest.approx((0.2625, 0.1625, 0.225, 0.35), abs=1e-12)
    expected = (0.1625 + 2 * 0.225 + 3 * 0.35) / 3
    assert found.relevance == pytest.approx(expected, abs=1e-12)
    assert (found.judge, found.prompt, found.origin) == ("tiny", UMBRELA.hash, "llm")
    assert found.disagreement == pytest.approx(0.5 - 0.2, abs=1e-12)
    alone = judge(logs(0.1, 0.1, 0.2, 0.4))
    assert isinstance(alone, Judgment)
    assert alone.disagreement is None


@pytest.mark.parametrize(
    "second,reason",
    [
        (logs(0.1, 0.1, 0.1, 0.1), "grade mass 0.4 is below 0.5, passage first"),
        ([None, *logs(0.3, 0.3, 0.3)], "no finite log-probability for every grade, passage first"),
        ([math.nan, *logs(0.3, 0.3, 0.3)], "no finite log-probability for every grade"),
        ([-math.inf, *logs(0.3, 0.3, 0.3)], "no finite log-probability for every grade"),
        ([], "no finite log-probability for every grade"),
    ],
)
def test_one_unreadable_order_is_a_rejection(second: Logprobs, reason: str) -> None:
    first = logs(0.1, 0.1, 0.2, 0.4)
    found = judge(first, second)
    assert isinstance(found, Rejection)
    assert found.reason.startswith(reason)
    assert (found.query_id, found.doc_id) == ("q", "d")
    raw = json.loads(found.response)
    assert raw["query first"] == dict(zip("0123", first, strict=True))
    assert list(raw["passage first"]) == list("0123")[: len(second)]


def test_a_judge_that_never_grades_is_refused() -> None:
    grade, none = judge(logs(0.1, 0.1, 0.2, 0.4)), judge(logs(0.1, 0.1, 0.1, 0.1))
    assert unreadable([none, grade, none]) == unreadable([none] * 2)
    refuse_unreadable(unreadable([none] * (BROKEN - 1)))
    with pytest.raises(ValueError, match=r"none of 32 answers was a grade \(grade mass 0\.4 is"):
        refuse_unreadable(unreadable([none] * BROKEN))


@given(
    st.lists(
        st.lists(st.floats(-40, 0), min_size=4, max_size=4).filter(
            lambda row: 1e-6 <= sum(map(math.exp, row)) <= 1
        ),
        min_size=1,
        max_size=2,
    ),
    st.floats(-5, 0),
)
def test_a_distribution_whatever_the_mass(rows: list[list[float]], shift: float) -> None:
    """Probability that goes elsewhere changes nothing, as long as enough is left."""
    found = judge(*rows, min_grade_mass=1e-9)
    less = judge(*([value + shift for value in row] for row in rows), min_grade_mass=1e-9)
    assert isinstance(found, Judgment)
    assert isinstance(less, Judgment)
    assert sum(found.grade_probs) == pytest.approx(1, abs=1e-9)
    assert 0 <= found.relevance <= 1
    assert less.grade_probs == pytest.approx(found.grade_probs, abs=1e-9)

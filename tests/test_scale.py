"""Grades to relevance: LightBlue's mapping by hand, and what any distribution must obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.scale import LIGHTBLUE, UMBRELA, Grade, Scale, linear


def test_lightblue_mapping_by_hand() -> None:
    probs = (0.1, 0.0, 0.2, 0.3, 0.4)
    mean_exp_val = 0.1 * 1 + 0.2 * 3 + 0.3 * 4 + 0.4 * 5
    assert LIGHTBLUE.relevance(probs) == pytest.approx((mean_exp_val - 1) / 4)
    max7 = (mean_exp_val - 1) * 6 / 4 + 1
    assert LIGHTBLUE.relevance(probs) == pytest.approx((max7 - 1) / 6)


def test_labels_are_what_a_judge_prints() -> None:
    assert UMBRELA.labels == ("0", "1", "2", "3")
    assert LIGHTBLUE.labels == ("1", "2", "3", "4", "5")
    assert linear(0, 0.5).labels == ("0", "0.5")


@given(st.floats(0, 4), st.integers(1, 4))
def test_a_grade_survives_the_way_to_relevance(grade: float, top: int) -> None:
    scale = linear(0, top)
    if grade > top:
        with pytest.raises(ValueError, match="outside scale"):
            scale.grade_probs(grade)
        return
    probs = scale.grade_probs(grade)
    assert sum(probs) == pytest.approx(1)
    assert sum(p > 0 for p in probs) <= 2
    assert scale.relevance(probs) == pytest.approx(grade / top, abs=1e-9)


def test_fractional_scale_keeps_vote_shares() -> None:
    scale = linear(0, 1)
    assert scale.grade_probs(0.25) == (0.75, 0.25)
    assert scale.relevance((0.75, 0.25)) == 0.25


def test_given_grades_have_whole_steps_or_two_ends() -> None:
    assert linear(-1, 1).values == (-1, 0, 1)
    assert len(linear(100, 200).values) == 101
    assert linear(0, 101).values == (0, 101)
    assert linear(0.5, 2).values == (0.5, 2)
    assert linear(0, 1.5).values == (0, 1.5)


@pytest.mark.parametrize("probs", [(0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (-0.5, 0.5, 0.5, 0.5)])
def test_what_is_no_distribution_has_no_relevance(probs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="distribution"):
        UMBRELA.relevance(probs)


def test_nan_has_no_relevance() -> None:
    with pytest.raises(ValueError, match="distribution"):
        UMBRELA.relevance((float("nan"), 0.5, 0.25, 0.25))


@pytest.mark.parametrize("values", [(1,), (1, 1), (2, 1)])
def test_a_scale_rises(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        Scale(name="x", source="x", grades=tuple(Grade(value=v, meaning="") for v in values))


def test_the_nearest_grade_goes_up_from_half_way() -> None:
    assert [UMBRELA.nearest(step / 6) for step in range(7)] == [0, 1, 1, 2, 2, 3, 3]
    assert [LIGHTBLUE.nearest(z) for z in (0.0, 0.12, 0.125, 0.5, 1.0)] == [0, 0, 1, 2, 4]
    # As float32 columns have it.
    assert UMBRELA.nearest(0.16666667163372040) == UMBRELA.nearest(0.16666665673255920) == 1

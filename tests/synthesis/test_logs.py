"""What a generator learns from a log: documents that show what a grade changes."""

from hypothesis import given
from hypothesis import strategies as st

from bixse.synthesis.logs import Graded, of_several_grades


def test_the_likeliest_grade_and_how_likely() -> None:
    assert Graded.surest("q", "d", [0.1, 0.2, 0.6, 0.1]) == Graded("q", "d", 2, 0.6)
    assert Graded.surest("q", "d", [0.5, 0.5]).grade == 0


def test_one_query_a_document_and_grade_and_no_document_of_one_grade() -> None:
    pairs = [
        Graded("a", "d1", 0, 0.7), Graded("b", "d1", 0, 0.9), Graded("c", "d1", 3, 0.5),
        Graded("a", "d2", 0, 0.9), Graded("b", "d2", 0, 0.9),
        Graded("c", "d0", 1, 0.4), Graded("b", "d0", 1, 0.4), Graded("a", "d0", 2, 0.4),
    ]  # fmt: skip
    expected = [
        Graded("b", "d0", 1, 0.4), Graded("a", "d0", 2, 0.4),
        Graded("b", "d1", 0, 0.9), Graded("c", "d1", 3, 0.5),
    ]  # fmt: skip
    assert of_several_grades(pairs) == of_several_grades(pairs[::-1]) == expected


@given(
    st.lists(
        st.builds(
            Graded, st.sampled_from("abc"), st.sampled_from("de"), st.integers(0, 3),
            st.sampled_from([0.3, 0.5]),
        )
    )
)  # fmt: skip
def test_what_is_chosen_is_of_the_log_and_irrelevance_is_no_flood(pairs: list[Graded]) -> None:
    chosen = of_several_grades(pairs)
    assert set(chosen) <= set(pairs)
    keys = [(pair.doc_id, pair.grade) for pair in chosen]
    assert len(set(keys)) == len(keys)
    for doc_id in {pair.doc_id for pair in chosen}:
        seen = {pair.grade for pair in pairs if pair.doc_id == doc_id}
        assert {pair.grade for pair in chosen if pair.doc_id == doc_id} == seen
        assert len(seen) > 1

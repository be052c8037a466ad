import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.evaluation.leakage import Leak, find_leaks, find_near, shingles
from bixse.records import text_hash


def test_the_same_text_under_another_id_is_found_whatever_its_spelling():
    evaluated = {"e1": "What is  BM25?", "e2": "ﬁle formats", "e3": "nothing like it"}
    trained = [("t1", "what is bm25?"), ("t2", "File formats"), ("t3", "something else")]
    assert find_leaks(evaluated, trained) == [
        Leak("e1", "t1", "What is  BM25?"),
        Leak("e2", "t2", "ﬁle formats"),
    ]


def test_every_leaked_query_is_named_once():
    evaluated = {"e1": "a b", "e2": "A B"}
    assert find_leaks(evaluated, [("t1", "a b"), ("t2", "a  b")]) == [
        Leak("e1", "t1", "a b"),
        Leak("e2", "t1", "A B"),
    ]


def test_no_leak():
    assert find_leaks({"e1": "a"}, []) == []
    assert find_leaks({}, [("t1", "a")]) == []


def test_shingles_are_runs_of_folded_characters() -> None:
    assert shingles("Ab  cD", 3) == {"ab ", "b c", " cd"}
    assert shingles("ab", 5) == {"ab"}


def jaccard(one: str, other: str, size: int) -> float:
    a, b = shingles(one, size), shingles(other, size)
    return len(a & b) / len(a | b)


@given(
    st.lists(st.text("ab c", max_size=12), min_size=1, max_size=8),
    st.lists(st.text("ab c", max_size=12), max_size=8),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_near_leaks_are_those_of_every_pair_compared(
    evaluated: list[str], trained: list[str], at_least: float
) -> None:
    found = find_near(
        {f"e{n}": text for n, text in enumerate(evaluated)},
        [(f"t{n}", text) for n, text in enumerate(trained)],
        size=3,
        at_least=at_least,
    )
    expected = {}
    for n, text in enumerate(evaluated):
        others = [other for other in trained if text_hash(other) != text_hash(text)]
        best = max((jaccard(text, other, 3) for other in others), default=0.0)
        if best >= at_least:
            expected[f"e{n}"] = pytest.approx(best)
    assert {leak.query_id: leak.similarity for leak in found} == expected


def test_a_near_leak_names_both_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bixse.evaluation.leakage._CHUNK", 1)
    trained = [("t1", "how is coffee made"), ("t2", "how is green tea made?"), ("t3", "How is tea")]
    (leak,) = find_near({"e1": "how is green tea made"}, trained, size=5, at_least=0.8)
    assert (leak.query_id, leak.training_query_id) == ("e1", "t2")
    assert leak.similarity == pytest.approx(17 / 18)
    assert leak.training_text == "how is green tea made?"


def test_equal_texts_are_not_near() -> None:
    assert find_near({"e": "tea"}, [("t", "TEA ")], size=5, at_least=0.5) == []
    with pytest.raises(ValueError, match="a similarity lies in"):
        find_near({"e": "tea"}, [], size=5, at_least=0)

"""BM25 against the formula, its ties, and what it does with words it has never seen."""

import math

import pytest

from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical

TEXTS = {"d1": "cats chase mice", "d2": "dogs chase cats and cats", "d3": "birds fly"}


def index(**settings: object) -> LexicalIndex:
    return LexicalIndex(list(TEXTS), list(TEXTS.values()), Lexical(**settings))


def test_the_formula_by_hand() -> None:
    # Lucene's BM25 with k1 1.2, b 0.75: "and" is a stop word, so the lengths are 3, 4 and 2.
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    lengths = {"d1": 3, "d2": 4}
    for doc_id, count in (("d1", 1), ("d2", 2)):
        norm = 1.2 * (1 - 0.75 + 0.75 * lengths[doc_id] / 3)
        expected = idf * count / (count + norm)
        assert index().scores_of("cat", [doc_id])[0] == pytest.approx(expected, rel=1e-5)


def test_only_documents_that_share_a_word() -> None:
    assert [hit.doc_id for hit in index().search("cat", 10)] == ["d2", "d1"]
    assert index().search("elephant", 10) == []
    assert index().search("", 10) == []
    assert index().search("!?", 10) == []


def test_ties_break_by_doc_id() -> None:
    tied = LexicalIndex(["b", "c", "a"], ["same words"] * 3, Lexical())
    assert [hit.doc_id for hit in tied.search("same", 2)] == ["a", "b"]


def test_a_mark_beside_a_letter_parts_no_word() -> None:
    """Vowel signs of Hindi, and French whose accents stand by themselves."""
    texts = {"tea": "चाय की पत्ती असम में", "rail": "रेल गाड़ी समय पर", "e": "e\u0301te\u0301"}
    made = LexicalIndex(list(texts), list(texts.values()), Lexical(language="none"))
    assert made.tokenize(list(texts.values())) == [text.split() for text in texts.values()]
    assert [hit.doc_id for hit in made.search("चाय की खेती", 10)] == ["tea"]
    assert made.tokenize(["it's a 7-bit, x_y"]) == [["it", "bit", "x_y"]]


def test_bigrams_for_languages_without_spaces() -> None:
    chinese = LexicalIndex(["x", "y"], ["深度学习模型", "天气预报"], Lexical(language="bigrams"))
    assert [hit.doc_id for hit in chinese.search("学习", 5)] == ["x"]


@pytest.mark.parametrize(("ids", "texts"), [([], []), (["a"], ["?"])])
def test_nothing_to_index_is_refused(ids: list[str], texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"empty|no document"):
        LexicalIndex(ids, texts, Lexical())

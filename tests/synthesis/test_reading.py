"""Answers are read strictly: the JSON that was asked for, or a reason."""

import contextlib
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.synthesis.reading import (
    Unreadable,
    is_copy,
    read_better,
    read_passages,
    read_query,
)

DOCUMENT = "Tea is brewed from the dried leaves of Camellia sinensis. It was first drunk in China."


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("how is tea made", "how is tea made"),
        ("  how \n is tea   made ", "how is tea made"),
        ("Query: how is tea made", "how is tea made"),
        ('Search query: "how is tea made"', "how is tea made"),
        ("\u201cwhat's tea\u201d", "what's tea"),
        ('what is "Camellia"', 'what is "Camellia"'),
        ('"Camellia" or "Thea"', '"Camellia" or "Thea"'),
        ("- how is tea made", "how is tea made"),
        ("1. how is tea made", "how is tea made"),
        ("1. Query: how is tea made", "how is tea made"),
        ('"Query: how is tea made"', "how is tea made"),
        ("**Query:** how is tea made", "how is tea made"),
        ("Query: - \u201chow is tea made\u201d", "how is tea made"),
        ("1984. how is tea made", "1984. how is tea made"),
        ("3 ways to brew tea", "3 ways to brew tea"),
        ("Camellia sinensis", "Camellia sinensis"),
        ("お茶", "お茶"),
    ],
)
def test_a_query_is_freed_of_what_nobody_asked_for(written: str, read: str) -> None:
    assert read_query(json.dumps({"query": written}), DOCUMENT) == read


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "not the JSON that was asked for"),
        ("how is tea made", "not the JSON that was asked for"),
        ('{"query": "how is tea', "not the JSON that was asked for"),
        ('{"query": 3}', "not the JSON that was asked for: query"),
        ('{"query": ["a"]}', "not the JSON that was asked for: query"),
        ('{"question": "how"}', "not the JSON that was asked for"),
        ('{"query": "how", "why": "so"}', "not the JSON that was asked for: why"),
        ('{"query": ""}', "not the JSON that was asked for: query"),
        ('```json\n{"query": "how"}\n```', "not the JSON that was asked for"),
        (json.dumps({"query": "x" * 401}), "not the JSON that was asked for: query"),
        (json.dumps({"query": "x" * 400}), "the query was cut off: 400 characters"),
        ('{"query": "\\"?!\\""}', "the query has no word"),
        (
            '{"query": "BREWED from the dried leaves, of Camellia"}',
            "the query is copied from the document",
        ),
        (json.dumps({"query": DOCUMENT}), "the query is copied from the document"),
    ],
)
def test_any_other_answer_is_no_query_and_says_why(response: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}"):
        read_query(response, DOCUMENT)


def test_fewer_than_six_words_in_a_row_are_no_copy_but_a_whole_document_is() -> None:
    assert is_copy("from the dried leaves of Camellia", DOCUMENT)
    assert not is_copy("the dried leaves of Camellia", DOCUMENT)
    assert is_copy("tea leaves", "Tea: leaves.")
    assert not is_copy("was it first drunk in China", DOCUMENT)
    # Documents come with accents of their own, models write them with their letter.
    nfd = unicodedata.normalize("NFD", "On récolte le thé dès l'été près des forêts.")
    assert is_copy("le thé dès l'été près des forêts", nfd)


def test_a_copy_is_seen_where_no_space_parts_words() -> None:
    document = "茶是用茶树的干叶冲泡而成的饮料、最早在中国饮用。"
    assert is_copy("用茶树的干叶冲泡而成的饮料", document)
    assert not is_copy("茶树的干叶", document)
    assert not is_copy("用茶树的鲜叶冲泡而成的饮料", document)


def passages(**changes: str) -> str:
    found = {
        "grade_3": "Steep the leaves in hot water for three minutes.",
        "grade_2": "Leaves are steeped in water.",
        "grade_1": "The leaves are grown in Assam.",
        "grade_0": "Coffee beans are roasted.",
    }
    return json.dumps({**found, **changes})


def test_every_grade_has_its_passage() -> None:
    found = read_passages(passages(), "how do I brew black tea")
    assert list(found) == [3, 2, 1, 0]
    assert found[0] == "Coffee beans are roasted."


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ('{"grade_3": "a", "grade_2": "b", "grade_1": "c"}', "not the JSON that was asked for"),
        (passages(grade_4="d"), "not the JSON that was asked for"),
        (passages(grade_2="Coffee beans  are ROASTED."), "two grades have the same passage"),
        (passages(grade_2="..."), "a passage has no word: grade 2"),
        (passages(grade_1="x" * 2000), "a passage was cut off: 2000 characters"),
        (passages(grade_3="A perfectly relevant text."), "a passage names its grade: grade 3"),
        (passages(grade_1="This is of grade 1."), "a passage names its grade: grade 1"),
        (passages(grade_0="An irrelevant passage."), "a passage names its grade: grade 0"),
        (
            passages(grade_3="How do I brew black tea? Steep it."),
            "a passage repeats the query: grade 3",
        ),
    ],
)
def test_passages_that_break_a_rule_are_none(response: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}"):
        read_passages(response, "how do I brew black tea")


def test_a_short_query_may_stand_in_a_passage_where_no_space_parts_words() -> None:
    said = passages(grade_3="北京历史很长、有三千年。")
    assert read_passages(said, "北京历史")[3] == "北京历史很长、有三千年。"
    with pytest.raises(Unreadable, match="repeats the query"):
        read_passages(said, "北京历史很长、有三千年")


def test_a_comparison_is_one_of_two_words() -> None:
    assert read_better('{"better": "second"}') == "second"
    for response in ('{"better": "third"}', '{"better": "First"}', "first", "{}"):
        with pytest.raises(Unreadable):
            read_better(response)


@given(st.text())
def test_no_answer_raises_anything_else(response: str) -> None:
    for read in (
        lambda: read_query(response, DOCUMENT),
        lambda: read_query(json.dumps({"query": response}), DOCUMENT),
        lambda: read_passages(response, "how do I brew tea"),
        lambda: read_better(response),
    ):
        with contextlib.suppress(Unreadable):
            read()

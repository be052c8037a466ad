"""Cloze queries: known answers, and what holds for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.records import Document, Query, Rejection, text_hash
from bixse.synthesis.queries import cloze, draw_order, sentences
from bixse.synthesis.settings import Cloze

JOIN = Document(
    "str.join",
    "str.join(iterable, /)",
    "S.join(iterable) -> str\n\n"
    "Concatenate any number of strings.\n\n"
    "The string whose method is called is inserted in between each given string.\n"
    "See `bytes.join` for the same on bytes, which takes no string at all.\n\n"
    ">>> '.'.join(['ab', 'pq', 'rs'])\n'ab.pq.rs'\n\n"
    "    indented = 'code is no sentence here either'\n",
)


def every_text(document: Document, **changes: int) -> set[str]:
    """What the document can be asked, over a hundred seeds."""
    made = [cloze(document, Cloze(seed=seed, **changes)) for seed in range(100)]
    return {item.text for item in made if isinstance(item, Query)}


def test_the_sentences_of_a_docstring_without_call_aside_doctest_and_code() -> None:
    assert list(sentences(JOIN, 4)) == [
        "Concatenate any number of strings",
        "The string whose method is called is inserted in between each given string",
    ]


def test_both_sentences_are_asked_and_the_first_more_often() -> None:
    made = [cloze(JOIN, Cloze(seed=seed)) for seed in range(300)]
    texts = [item.text for item in made if isinstance(item, Query)]
    assert len(texts) == 300
    first = sum(text.startswith("Concatenate") for text in texts)
    assert 0.55 < first / 300 < 0.8  # weights 1 and 1/2: two thirds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Return the number of CPUs of a host.", "how do I get the number of CPUs of a host"),
        ("Return True if the path is a link.", "how do I check whether the path is a link"),
        ("Creates a socket and connects it.", "how do I create a socket and connects it"),
        ("L.append(x) -- append x to the end", "how do I append x to the end"),
    ],
)  # fmt: skip
def test_an_order_is_asked_as_a_question_half_of_the_time(text: str, wanted: str) -> None:
    asked = every_text(Document("d", "", text))
    assert wanted in asked
    assert len(asked) == 2
    assert any(not item.startswith("how do I") for item in asked)


def test_vowel_signs_are_letters_and_a_danda_ends_a_sentence() -> None:
    """Hindi writes a third of its letters as marks."""
    text = "पानी सौ डिग्री पर उबलता है। चाय की पत्ती असम में उगाई जाती है।"
    found = sentences(Document("d", "", text), 4)
    assert list(found) == ["पानी सौ डिग्री पर उबलता है", "चाय की पत्ती असम में उगाई जाती है"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "Ist das ein Test von uns? Österreich liegt bzw. ruht mitten in Europa.",
            ["Ist das ein Test von uns?", "Österreich liegt bzw. ruht mitten in Europa"],
        ),
        (
            "Москва является столицей большой страны, ул. длинные. Она стоит на длинной улице.",
            ["Москва является столицей большой страны, ул. длинные", "Она стоит на длинной улице"],
        ),
        (
            "서울은 대한민국의 큰 수도이다. 한강을 끼고 사람이 산다.",
            ["서울은 대한민국의 큰 수도이다", "한강을 끼고 사람이 산다"],
        ),
    ],
)
def test_a_sentence_begins_with_a_capital_or_in_a_script_without(
    text: str, found: list[str]
) -> None:
    assert list(sentences(Document("d", "", text), 4)) == found


def test_a_script_without_spaces_has_sentences_too() -> None:
    text = "北京是中国的首都、也是政治中心。人很多。每年有许多游客来这里参观博物馆。"
    document = Document("d", "", text)
    assert list(sentences(document, 4)) == [
        "北京是中国的首都、也是政治中心",
        "每年有许多游客来这里参观博物馆",
    ]
    assert every_text(document, max_words=3) == {"北京是中国的", "每年有许多游"}


def test_what_is_no_order_is_not_asked_as_one() -> None:
    text = "The capital of France lies on the Seine."
    assert every_text(Document("d", "", text)) == {"The capital of France lies on the Seine"}


def test_the_documents_own_name_does_not_stand_in_its_query() -> None:
    document = Document("os.get_blocking", "", "os.get_blocking() tells if reading fd may block.")
    assert every_text(document) == {"tells if reading fd may block"}


@pytest.mark.parametrize("doc_id", ["12", "1.2", "s:12"])
def test_a_number_that_is_an_id_counts_other_things_in_the_text(doc_id: str) -> None:
    document = Document(doc_id, "", "Take 12 tablets of version 1.2 with some water.")
    assert every_text(document) >= {"Take 12 tablets of version 1.2 with some water"}


def test_a_title_repeated_in_the_text_is_no_query() -> None:
    document = Document("d", "Heat transfer in wings", "Heat transfer in wings. Short.")
    assert isinstance(cloze(document, Cloze()), Rejection)


def test_a_document_without_a_sentence_is_rejected_by_name() -> None:
    rejection = cloze(Document("d7", "t", "Too short."), Cloze(min_words=4))
    assert rejection == Rejection(
        reason="no sentence of 4 or more words", response="Too short.", doc_id="d7"
    )


def test_a_long_sentence_is_cut_to_max_words() -> None:
    text = " ".join(f"word{'abcdefghij'[n % 10]}" for n in range(100))
    assert {len(item.split()) for item in every_text(Document("d", "", text), max_words=9)} == {9}


def test_a_megabyte_of_any_shape_takes_no_time() -> None:
    """None holds a question. A pattern that backtracks runs into the test's time limit instead."""
    for text in ("(" * 10**6, "a(" * 5 * 10**5, " " * 10**6, "a. " * 3 * 10**5, "\n" * 10**6):
        assert isinstance(cloze(Document("d", "", text), Cloze()), Rejection)


document_texts = st.one_of(
    st.text(max_size=400),
    st.lists(st.text(st.characters(categories=("L", "N", "P", "Zs"))), max_size=30).map(" ".join),
    st.lists(st.sampled_from(["Return the", "f(x) ->", "\n\n", ">>> ", "word", ". ", "* ", "   "]))
    .map(" ".join),
)  # fmt: skip


@given(
    doc_id=st.text(min_size=1, max_size=30),
    title=st.text(max_size=30),
    text=document_texts,
    seed=st.integers(0, 5),
    min_words=st.integers(1, 6),
)
def test_any_document_gives_one_query_or_one_rejection(
    doc_id: str, title: str, text: str, seed: int, min_words: int
) -> None:
    document = Document(doc_id, title, text)
    settings = Cloze(seed=seed, min_words=min_words, max_words=8)
    made = cloze(document, settings)
    assert made == cloze(document, settings)
    if isinstance(made, Rejection):
        assert made.doc_id == doc_id
        assert made.reason
        return
    assert made.query_id == f"cloze:{doc_id}"
    assert made.seed_doc_id == doc_id
    assert made.origin == "synthetic"
    assert 1 <= len(made.text.split()) <= 8
    assert made.text == " ".join(made.text.split())
    assert any(c.isalpha() for c in made.text)
    assert text_hash(made.text) != text_hash(title) or len(title.split()) > 8


def test_the_draw_is_uniform_and_another_seed_is_another_draw() -> None:
    places = [draw_order(f"d{n}", 0) / 2**64 for n in range(4000)]
    assert abs(sum(places) / 4000 - 0.5) < 0.02
    both = set(sorted(range(4000), key=lambda n: draw_order(f"d{n}", 0))[:400])
    both &= set(sorted(range(4000), key=lambda n: draw_order(f"d{n}", 1))[:400])
    assert 15 < len(both) < 75  # 40 expected of two independent draws of a tenth

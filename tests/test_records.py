"""Text hashes and splits: what counts as the same text, and where a query lives."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bixse.records import count_words, document_text, split_of, text_hash, words


def test_text_hash_folds_case_space_and_unicode_form() -> None:
    assert text_hash("Caf\u00e9  au\nlait ") == text_hash("cafe\u0301 AU lait")
    assert text_hash("cafe au lait") != text_hash("caf\u00e9 au lait")


@given(st.text())
def test_text_hash_takes_any_text(text: str) -> None:
    assert text_hash(text) == text_hash(f" {text}\n")
    assert len(text_hash(text)) == 32


def test_text_hash_takes_lone_surrogates() -> None:
    assert text_hash("\ud800") != text_hash("\ud801")


def test_a_mark_beside_a_letter_parts_no_word() -> None:
    assert words("Tea, x=1.5; a_b DON'T") == ["tea", "x", "1", "5", "a_b", "don", "t"]
    assert words("पानी कैसे उबलता है।") == ["पानी", "कैसे", "उबलता", "है"]
    assert words("l'e\u0301te\u0301") == words("L'\u00c9T\u00c9") == ["l", "\u00e9t\u00e9"]


def test_two_characters_side_by_side_are_a_word_where_no_space_parts_words() -> None:
    assert words("深度学习 model、天气A茶") == ["深度", "度学", "学习", "model", "天气", "a茶"]
    assert words("ชาร้อน") == ["ชา", "าร", "ร้", "้อ", "อน"]
    assert count_words(words("深度学习的模型 is new")) == 5.0


def test_document_text_is_beirs() -> None:
    assert document_text("a title", "a text") == "a title a text"
    assert document_text("", "a text") == "a text"
    assert document_text("a title", "") == "a title"


def test_splits_are_80_10_10_and_stay() -> None:
    counts = Counter(split_of(f"query-{n}") for n in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.8) < 0.02
    assert abs(counts["dev"] / 20_000 - 0.1) < 0.01
    assert abs(counts["test"] / 20_000 - 0.1) < 0.01
    # A query that an older build trained on must not be examined on by this one.
    found = [split_of(f"q{n}") for n in (0, 1, 5, 10, 11)]
    assert found == ["test", "train", "dev", "test", "dev"]

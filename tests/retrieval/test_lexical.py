"""BM25 against the formula, its ties, and what it does with words it has never seen."""

import math

import pytest

from bixse.retrieval.lexical import LexicalIndex, unspaced_share
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


UNSPACED = {
    "Chinese": {
        "tea": "我们每天早上喝一杯绿茶。茶叶来自云南的高山。",
        "rail": "从北京到上海的高速列车只需要四个半小时。",
        "rain": "天气预报说明天下午南方有大雨。",
        "heart": "心脏每天把几千升血液送到全身。",
    },
    "Japanese": {
        "tea": "静岡で作られた緑茶を毎朝飲みます。",
        "rail": "東京から大阪まで新幹線で二時間半かかります。",
        "rain": "天気予報によると明日は大雨になるでしょう。",
        "heart": "心臓は毎日たくさんの血液を全身に送ります。",
    },
    "Thai": {
        "tea": "ฉันดื่มชาเขียวทุกเช้าและใบชามาจากภูเขาทางเหนือ",
        "rail": "รถไฟความเร็วสูงจากกรุงเทพไปเชียงใหม่ใช้เวลาสี่ชั่วโมง",
        "rain": "พยากรณ์อากาศบอกว่าพรุ่งนี้ภาคใต้มีฝนตกหนัก",
        "heart": "หัวใจสูบฉีดเลือดไปเลี้ยงทั่วร่างกายทุกวัน",
    },
}
ASKED = {
    "Chinese": {
        "tea": "云南绿茶",
        "rail": "高速列车",
        "rain": "明天有雨吗",
        "heart": "血液和心脏",
    },
    "Japanese": {
        "tea": "静岡の緑茶",
        "rail": "新幹線の時間",
        "rain": "明日の天気",
        "heart": "血液と心臓",
    },
    "Thai": {
        "tea": "ใบชาเขียว",
        "rail": "รถไฟเชียงใหม่",
        "rain": "พรุ่งนี้ฝนตกไหม",
        "heart": "เลือดในหัวใจ",
    },
}


@pytest.mark.parametrize("script", UNSPACED)
def test_a_script_without_spaces_is_told_and_bigrams_suit_it(script: str) -> None:
    """As words nothing is found: a sentence is one."""
    texts, asked = UNSPACED[script], ASKED[script]
    assert unspaced_share(texts.values()) == 1
    words, pairs = (
        LexicalIndex(list(texts), list(texts.values()), Lexical(language=language))
        for language in ("english", "bigrams")
    )
    for doc_id, query in asked.items():
        assert words.search(query, 1) == []
        assert [hit.doc_id for hit in pairs.search(query, 1)] == [doc_id]


def test_scripts_with_spaces_are_not_taken_for_those_without() -> None:
    spaced = ["plain English", "चाय की पत्ती", "녹차를 마신다", "горячий чай", "شاي أخضر", "12 34"]
    assert unspaced_share(spaced) == 0
    assert unspaced_share([]) == 0
    assert unspaced_share(["ab", "東京"]) == 0.5


@pytest.mark.parametrize(("ids", "texts"), [([], []), (["a"], ["?"])])
def test_nothing_to_index_is_refused(ids: list[str], texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"empty|no document"):
        LexicalIndex(ids, texts, Lexical())

"""Verified negatives: what nearly equals a positive, or may be one, never trains as a negative."""

import numpy as np

from bixse.judging.settings import Verification
from bixse.judging.verified import Judged, unverified

TEXTS = {
    "tea": "Tea is brewed from the dried leaves of the tea plant in hot water",
    "copy": "Tea is brewed, from the dried leaves of the tea plant in HOT water!",
    "near": "Tea is brewed from the dried leaves of the tea plant in water",
    "half": "The tea plant grows in Assam and its leaves are dried",
    "coffee": "Coffee is made of roasted beans",
    "other": "Water boils at a hundred degrees",
}
SETTINGS = Verification(positive=0.5, negative=0.2, near_duplicate=0.8)


def judged(query_id: str, **relevance: float) -> list[Judged]:
    return [Judged(query_id, doc_id, value) for doc_id, value in relevance.items()]


def test_a_near_copy_of_the_positive_never_enters_the_negatives() -> None:
    """Whatever the judge says of the copies: positive, unsure or irrelevant."""
    for grade in (0.0, 0.1, 0.19, 0.3, 0.49, 0.5, 1.0):
        rows = judged("q", tea=0.9, copy=grade, near=grade, coffee=0.0)
        dropped = unverified(rows, {"q": "tea"}, TEXTS, SETTINGS)
        kept = [row for row in rows if (row.query_id, row.doc_id) not in dropped]
        assert [row.doc_id for row in kept if row.relevance < 0.5] == ["coffee"]
        assert (("q", "copy") in dropped) == (grade < 0.5)


def test_what_is_neither_answer_nor_none_is_dropped_and_the_rest_stays() -> None:
    rows = judged("q", tea=0.5, half=0.2, coffee=0.199, other=0.499)
    assert unverified(rows, {"q": "tea"}, TEXTS, SETTINGS) == {
        ("q", "half"): "neither answer nor none: relevance 0.200",
        ("q", "other"): "neither answer nor none: relevance 0.499",
    }


def test_a_written_query_that_its_own_document_does_not_answer_goes_whole() -> None:
    rows = [*judged("a", tea=0.4, coffee=0.9), *judged("b", coffee=0.9), *judged("c", other=0.9)]
    dropped = unverified(rows, {"a": "tea", "b": "tea"}, TEXTS, SETTINGS)
    assert dropped == {
        ("a", "tea"): "the query's own document does not answer it",
        ("a", "coffee"): "the query's own document does not answer it",
        ("b", "coffee"): "the query's own document has no grade",
    }
    assert unverified(rows[2:], {}, TEXTS, SETTINGS) == {}  # A given query has no document.


def test_positives_of_one_query_are_nothing_to_another() -> None:
    rows = [*judged("a", tea=0.9), *judged("b", copy=0.0, coffee=0.9)]
    assert unverified(rows, {"a": "tea", "b": "coffee"}, TEXTS, SETTINGS) == {}


def test_a_relevance_that_was_stored_reaches_the_threshold_it_equals() -> None:
    """As float32, 0.7 is a little less than 0.7, and was no answer."""
    settings = Verification(positive=0.7, negative=0.3)
    stored = {name: float(np.float32(value)) for name, value in (("tea", 0.7), ("half", 0.3))}
    assert unverified(judged("q", **stored, coffee=0.0), {"q": "tea"}, TEXTS, settings) == {
        ("q", "half"): "neither answer nor none: relevance 0.300"
    }

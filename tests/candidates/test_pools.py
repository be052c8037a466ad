"""Pools: one pair a document and a text, the first source keeps it, chance is reproducible."""

from bixse.candidates.pools import pool, random_hits
from bixse.records import Hit, Pair


def test_a_document_and_a_text_are_proposed_once() -> None:
    rankings = {
        "bm25": [Hit("a", 9.0, 1), Hit("b", 8.0, 2)],
        "dense": [Hit("b", 0.9, 1), Hit("copy of a", 0.8, 2), Hit("c", 0.7, 3)],
    }
    hashes = {"a": "1", "copy of a": "1", "b": "2", "c": "3"}
    assert pool("q", rankings, hashes) == [
        Pair("q", "a", "bm25", 1, 9.0),
        Pair("q", "b", "bm25", 2, 8.0),
        Pair("q", "c", "dense", 3, 0.7),
    ]


def test_random_is_a_function_of_seed_and_query() -> None:
    doc_ids = [f"d{n}" for n in range(100)]
    first = random_hits("q1", doc_ids, 5, seed=0)
    assert first == random_hits("q1", doc_ids, 5, seed=0)
    assert first != random_hits("q2", doc_ids, 5, seed=0)
    assert first != random_hits("q1", doc_ids, 5, seed=1)
    assert len({hit.doc_id for hit in first}) == 5


def test_a_small_corpus_gives_what_it_has() -> None:
    assert [hit.doc_id for hit in random_hits("q", ["only"], 5, seed=0)] == ["only"]

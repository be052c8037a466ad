"""Pools: one pair a document and a text, the first source keeps it, chance is reproducible."""

from bixse.candidates.pools import head_negatives, pool, random_hits
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


def test_negatives_come_from_the_head_and_are_no_positives() -> None:
    hits = [Hit(f"d{rank}", 1 / rank, rank) for rank in range(1, 101)]
    seen: set[str] = set()
    for seed in range(40):
        drawn = head_negatives("q", hits, {"d1", "d4"}, top=20, count=7, seed=seed)
        assert [hit.rank for hit in drawn] == sorted({hit.rank for hit in drawn})
        assert len(drawn) == 7
        seen |= {hit.doc_id for hit in drawn}
    assert seen == {f"d{rank}" for rank in range(1, 21)} - {"d1", "d4"}
    assert drawn == head_negatives("q", hits, {"d1", "d4"}, top=20, count=7, seed=39)
    few = head_negatives("q", hits[:3], {"d1"}, top=20, count=7, seed=0)
    assert [hit.doc_id for hit in few] == ["d2", "d3"]

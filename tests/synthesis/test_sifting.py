"""Filters: exactly what they should drop, with the reason, and nothing else."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.records import Hit, Query, jaccard, text_hash
from bixse.synthesis.sifting import (
    comparisons,
    contradicted,
    disagreeing,
    histogram,
    lost,
    rank_of,
    repeated,
    sift,
    unbalanced,
)
from tests.encoders import texts


def query(name: str, text: str, doc_id: str = "d", grade: float | None = None) -> Query:
    return Query(name, text, "synthetic", doc_id, grade)


def test_words_are_told_apart_by_their_vowel_signs() -> None:
    """The first two share their consonants, in Hindi, and no word."""
    queries = [query("a", "दिन का दाम"), query("b", "दीन की दामी"), query("c", "दाम का दिन")]
    assert repeated(queries, [], 0.8) == {"c": "has the words of a query: a"}


def test_repeats_in_any_dress_are_dropped_and_the_first_stays() -> None:
    queries = [
        query("a", "How is tea made?"),
        query("b", "how  is TEA made?", "e"),
        query("c", "tea: how is made", "f"),
        query("d", "how is green tea made"),
        query("e", "how is green tea made", "g"),
        query("f", "where was tea first drunk"),
        query("g", "What is coffee"),
        query("h", "coffee is what", "h"),
    ]
    found = repeated(queries, ["what is  COFFEE"], near_duplicate=0.8)
    assert found == {
        "b": "equals a query: a",
        "c": "has the words of a query: a",
        "d": "nearly equals a query of its document: a",
        "g": "equals a given query",
        "h": "has the words of a given query",
    }


@given(st.lists(st.sampled_from(["a b", "b a", "a b c", "a", "A", "c d e f"]), max_size=12))
def test_what_stays_repeats_nothing_and_sifting_again_drops_nothing(found: list[str]) -> None:
    queries = [query(str(n), text, doc_id=str(n % 2)) for n, text in enumerate(found)]
    dropped = repeated(queries, [], near_duplicate=0.6)
    kept = [q for q in queries if q.query_id not in dropped]
    assert len({text_hash(q.text) for q in kept}) == len(kept)
    assert {text_hash(q.text) for q in queries} or not kept
    assert repeated(kept, [], near_duplicate=0.6) == {}


def test_jaccard() -> None:
    assert jaccard(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)
    assert jaccard(frozenset(), frozenset()) == 1.0


# Round trip ---------------------------------------------------------------------------------------


def ranks_by(encode: np.ndarray, queries: list[Query], docs: list[str]) -> dict[str, int | None]:
    """Exact search of each query's row of `encode` [N, D] over all documents."""
    order = np.argsort(-encode, axis=1, kind="stable")
    hashes = {f"d{n}": text_hash(text) for n, text in enumerate(docs)}
    ranks = {}
    for row, found in enumerate(order):
        hits = [Hit(f"d{d}", 0.0, rank) for rank, d in enumerate(found[:20].tolist(), start=1)]
        ranks[queries[row].query_id] = rank_of(hashes[queries[row].seed_doc_id or ""], hits, hashes)
    return ranks


def test_a_perfect_retriever_keeps_all() -> None:
    docs = texts(40, seed=3)
    queries = [query(f"q{n}", docs[n], f"d{n}") for n in range(40)]
    assert lost(queries, ranks_by(np.eye(40), queries, docs), 1) == {}


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_removes_planted_wrong_pairs_and_keeps_the_good(seed: int) -> None:
    """30 % of 1,000 queries are of another document than they name; the retriever is BM25."""
    from bixse.retrieval.lexical import LexicalIndex
    from bixse.retrieval.settings import Lexical

    draw = random.Random(seed)
    docs = texts(1000, seed=seed)
    doc_ids = [f"d{n}" for n in range(1000)]
    index = LexicalIndex(doc_ids, docs, Lexical(language="none"))
    hashes = dict(zip(doc_ids, map(text_hash, docs), strict=True))
    wrong = set(draw.sample(range(1000), 300))
    queries = []
    for n in range(1000):
        about = (n + 1 + draw.randrange(998)) % 1000 if n in wrong else n
        words = docs[about].split()
        queries.append(query(f"q{n}", " ".join(words[: max(3, 3 * len(words) // 4)]), f"d{n}"))
    hits = {q.query_id: index.search(q.text, 20) for q in queries}
    ranks = {q.query_id: rank_of(hashes[q.seed_doc_id], hits[q.query_id], hashes) for q in queries}
    before = {f"q{n}" for n in wrong}
    last: set[str] | None = None
    for k in (1, 3, 10, 20):
        dropped = set(lost(queries, ranks, k))
        assert len(dropped & before) >= 0.9 * len(before)
        assert len(dropped - before) <= 0.1 * 700
        assert last is None or dropped <= last  # A larger K keeps whatever a smaller one kept.
        last = dropped
        kept = [q for q in queries if q.query_id not in dropped]
        assert lost(kept, ranks, k) == {}  # Once is enough.


def test_a_copy_of_the_document_is_as_good_as_the_document() -> None:
    hashes = {"a": "x", "b": "y", "c": "x"}
    hits = [Hit("b", 1.0, 1), Hit("c", 0.9, 2), Hit("a", 0.8, 3)]
    assert rank_of("x", hits, hashes) == 2
    assert rank_of("z", hits, hashes) is None
    assert lost([query("q", "t")], {"q": 2}, 2) == {}
    assert set(lost([query("q", "t")], {"q": None}, 2)) == {"q"}


# Agreement, contradiction, balance (SSRA) ---------------------------------------------------------


def graded(per_grade: int, seed: int, obeys: float) -> tuple[list[Query], dict[str, int]]:
    """Queries written at each grade, and what each is really worth: the target, or another."""
    draw = random.Random(seed)
    queries, worth = [], {}
    for grade in range(4):
        for n in range(per_grade):
            made = query(f"{grade}-{n}", f"words {grade} {n}", f"d{n}", float(grade))
            queries.append(made)
            others = [other for other in range(4) if other != grade]
            worth[made.query_id] = grade if draw.random() < obeys else draw.choice(others)
    return queries, worth


def test_agreement_lifts_a_generator_that_obeys_in_60_percent() -> None:
    """The scorer errs in 10 %: more than 90 % of what it lets through is of its grade."""
    queries, worth = graded(per_grade=500, seed=1, obeys=0.6)
    draw = random.Random(2)
    scores = {q: g if draw.random() < 0.9 else draw.randrange(4) for q, g in worth.items()}
    before = np.mean([worth[q.query_id] == q.target_grade for q in queries])
    assert before == pytest.approx(0.6, abs=0.03)
    sifted = sift(queries, {"agreement": lambda q: disagreeing(q, scores)})
    after = np.mean([worth[q.query_id] == q.target_grade for q in sifted.kept])
    assert after > 0.9
    assert set(histogram(sifted.kept)) == {"0", "1", "2", "3"}
    assert all(240 < count < 320 for count in histogram(sifted.kept).values())


def test_a_query_that_the_scorer_did_not_grade_is_dropped_and_never_zero() -> None:
    queries = [query("a", "x", grade=0.0), query("b", "y", grade=2.0)]
    assert disagreeing(queries, {"b": 1}) == {
        "a": "the scorer gave it no grade",
        "b": "written at grade 2, scored 1",
    }


def test_contradiction_drops_exactly_the_reversed_pairs() -> None:
    queries, _ = graded(per_grade=50, seed=0, obeys=1.0)
    asked = comparisons(queries)
    assert len(asked) == 50 * 6
    grade = {q.query_id: q.target_grade for q in queries}
    assert all(grade[c.query_id_high] > grade[c.query_id_low] for c in asked)
    draw = random.Random(4)
    reversed_ = set(draw.sample(range(len(asked)), 20))
    verdicts = [
        (c, "low" if n in reversed_ else draw.choice(["high", "undecided"]))
        for n, c in enumerate(asked)
    ]
    dropped = contradicted(queries, verdicts)
    guilty = [asked[n] for n in reversed_]
    assert set(dropped) == {q for c in guilty for q in (c.query_id_high, c.query_id_low)}


def test_balance_brings_every_grade_within_tolerance_of_the_rarest() -> None:
    queries = [
        query(f"{grade}-{n}", f"{grade} {n}", grade=float(grade))
        for grade, count in enumerate((400, 30, 45, 900))
        for n in range(count)
    ]
    dropped = unbalanced(queries, tolerance=0.1, seed=0)
    kept = [q for q in queries if q.query_id not in dropped]
    assert histogram(kept) == {"0": 33, "1": 30, "2": 33, "3": 33}
    assert unbalanced(queries[::-1], 0.1, 0).keys() == dropped.keys()
    assert unbalanced(queries, 0.1, 1).keys() != dropped.keys()
    assert unbalanced([], 0.1, 0) == {}


def test_the_rate_of_duplicates_falls() -> None:
    draw = random.Random(0)
    queries = [query(f"q{n}", f"w{draw.randrange(80)} x", f"d{n}") for n in range(200)]
    sifted = sift(queries, {"repeated": lambda q: repeated(q, [], 0.8)})
    rates = [1 - len({q.text for q in qs}) / len(qs) for qs in (queries, sifted.kept)]
    assert rates[0] > 0.5
    assert rates[1] == 0.0


def test_every_query_is_kept_or_has_one_reason_and_filters_see_what_is_left() -> None:
    queries, worth = graded(per_grade=20, seed=3, obeys=0.7)
    sifted = sift(
        queries,
        {
            "agreement": lambda q: disagreeing(q, worth),
            "balance": lambda q: unbalanced(q, 0.0, 0),
        },
    )
    assert len(sifted.kept) + len(sifted.dropped) == len(queries)
    assert not {q.query_id for q in sifted.kept} & sifted.dropped.keys()
    assert [c["in"] for c in sifted.counts] == [80, 80 - sifted.counts[0]["dropped"]]
    assert len(set(Counter(q.target_grade for q in sifted.kept).values())) == 1

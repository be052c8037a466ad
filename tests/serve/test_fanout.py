"""What a missing shard means, and that sharded equals whole."""

import string
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.records import CORPUS, Document, Hit
from bixse.retrieval.building import build_shard
from bixse.retrieval.settings import Retrieval
from bixse.retrieval.shard import Shard
from serve.fanout import (
    Answer,
    Missing,
    Verdict,
    Way,
    canary_problem,
    coverage,
    fused,
    one_ranking,
    verdict,
)
from serve.messages import Found, FoundInSlot
from serve.settings import Canary

ROWS = {"shard-00000": 60, "shard-00001": 30, "shard-00002": 10}
A, B, C = ROWS


def test_coverage_counts_documents_not_shards():
    seen = coverage(ROWS, [Missing(C, "late"), Missing(A, "lost")])
    assert (seen.fraction, seen.shards_ok, seen.shards) == (0.3, 1, 3)
    assert seen.degraded == (Missing(A, "lost"), Missing(C, "late"))
    assert coverage(ROWS, []).fraction == 1.0
    assert coverage(ROWS, [Missing(name, "late") for name in ROWS]).fraction == 0.0


def test_an_unknown_shard_is_an_error():
    with pytest.raises(KeyError):
        coverage(ROWS, [Missing("shard-00009", "late")])


@pytest.mark.parametrize(
    "missing, allow_partial, min_coverage, expected",
    [
        ([], False, 1.0, Verdict.ANSWER),
        ([Missing(C, "late")], True, 0.0, Verdict.ANSWER),
        ([Missing(C, "late")], True, 0.9, Verdict.ANSWER),
        ([Missing(C, "late")], True, 0.901, Verdict.UNAVAILABLE),
        ([Missing(C, "late")], False, 0.0, Verdict.UNAVAILABLE),
        ([Missing(A, "lost"), Missing(B, "shed")], True, 0.1, Verdict.ANSWER),
        ([Missing(name, "late") for name in ROWS], True, 0.0, Verdict.TIMEOUT),
        (
            [Missing(A, "late"), Missing(B, "late"), Missing(C, "lost")],
            True,
            0.0,
            Verdict.UNAVAILABLE,
        ),
        ([Missing(name, "failed") for name in ROWS], True, 0.0, Verdict.UNAVAILABLE),
    ],
)
def test_verdict(missing, allow_partial, min_coverage, expected):
    seen = coverage(ROWS, missing)
    assert verdict(seen, allow_partial=allow_partial, min_coverage=min_coverage) is expected


@given(
    lost=st.sets(st.sampled_from(sorted(ROWS))),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
def test_asking_for_more_coverage_never_turns_a_refusal_into_an_answer(lost, low, high):
    low, high = min(low, high), max(low, high)
    seen = coverage(ROWS, [Missing(name, "late") for name in lost])
    if verdict(seen, allow_partial=True, min_coverage=high) is Verdict.ANSWER:
        assert verdict(seen, allow_partial=True, min_coverage=low) is Verdict.ANSWER
    if verdict(seen, allow_partial=False, min_coverage=low) is Verdict.ANSWER:
        assert seen.fraction == 1.0


@pytest.mark.parametrize(
    "hits, problem",
    [
        ([("a", 0.80), ("b", 0.5)], None),
        ([("b", 0.805), ("a", 0.79)], None),
        ([("b", 0.90), ("a", 0.80)], "found b, expected a"),
        ([("b", 0.79), ("c", 0.78)], "found b, expected a"),
        ([("a", 0.85)], "scores 0.850, expected 0.800"),
        ([("a", 0.75)], "scores 0.750, expected 0.800"),
    ],
)
def test_the_canary_sings_when_its_document_shares_the_top(hits, problem):
    found = Found([Hit(doc_id, score, rank) for rank, (doc_id, score) in enumerate(hits, start=1)])
    known = Canary(query="q", doc_id="a", score=0.8)
    said = canary_problem(known, Answer([found], coverage(ROWS, []), {}))
    assert said is None if problem is None else said is not None and problem in said
    assert canary_problem(known, Answer([], coverage(ROWS, []), {})) is not None


scored = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1, max_size=3),
    st.integers(0, 3).map(lambda n: n / 4),
    min_size=1,
    max_size=30,
)


@given(
    scores=scored,
    shards=st.sampled_from([1, 2, 3, 7]),
    k=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_fields_follow_their_hits_and_ties_break_by_doc_id(scores, shards, k, seed):
    rng = np.random.default_rng(seed)
    home = {doc_id: int(rng.integers(shards)) for doc_id in scores}
    found = []
    for shard in range(shards):
        mine = sorted((-scores[d], d) for d in scores if home[d] == shard)[:k]
        fields = [Document(d, f"title {d}", "") for _, d in mine]
        found.append(FoundInSlot([d for _, d in mine], [-minus for minus, _ in mine], fields))
    whole = one_ranking(found, k)
    expected = sorted((-score, doc_id) for doc_id, score in scores.items())[:k]
    assert [(-h.score, h.doc_id) for h in whole.hits] == expected
    assert [h.rank for h in whole.hits] == list(range(1, len(expected) + 1))
    assert whole.documents is not None
    assert [d.title for d in whole.documents] == [f"title {h.doc_id}" for h in whole.hits]


def test_without_fields_from_every_shard_there_are_none():
    with_fields = FoundInSlot(["b"], [0.5], [Document("b", "", "")])
    found = one_ranking([FoundInSlot(["a"], [1.0]), with_fields], 5)
    assert found == Found([Hit("a", 1.0, 1), Hit("b", 0.5, 2)])


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_sharded_equals_whole(shards):
    rng = np.random.default_rng(shards)
    vectors = rng.standard_normal((90, 16)).astype(np.float32)
    vectors[45:60] = vectors[0]  # ties across shards
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.Table.from_pylist(
        [{"doc_id": f"d{n:03d}", "title": "", "text": str(n)} for n in rng.permutation(90)],
        schema=CORPUS,
    )
    queries = np.concatenate([vectors[:1], vectors[rng.integers(90, size=5)]])

    def shard_of(rows: list[int]) -> Shard:
        with tempfile.TemporaryDirectory() as local:
            build_shard(Path(local), table.take(rows), vectors[rows], Retrieval())
            return Shard.load(Path(local))

    whole = shard_of(list(range(90))).search(queries, 20)
    home = rng.integers(shards, size=90)
    parts = [
        shard_of(np.flatnonzero(home == s).tolist()).rankings(queries, [20] * len(queries))
        for s in range(shards)
    ]
    for query in range(len(queries)):
        merged = one_ranking(
            [FoundInSlot(part[query].doc_ids, part[query].scores) for part in parts], 20
        )
        assert merged.hits == whole[query]


def test_fields_of_a_fused_ranking_come_from_the_side_that_found_it():
    a, b = Document("a", "A", "only by vectors"), Document("b", "B", "only by words")
    dense, lexical = Found([Hit("a", 0.5, 1)], [a]), Found([Hit("b", 7.0, 1)], [b])
    found = fused(dense, lexical, Way("hybrid"), 5)
    assert found.documents == [a, b]
    assert [hit.score for hit in found.hits] == [1 / 61, 1 / 61], "a tie, broken by doc_id"
    assert found.fused == (dense.hits, lexical.hits)
    assert fused(Found([Hit("a", 0.5, 1)]), lexical, Way("hybrid"), 5).documents is None
    alone = fused(dense, lexical, Way("hybrid", "weighted", 0.0), 1)
    assert [(hit.doc_id, hit.score) for hit in alone.hits] == [("b", 1.0)]


def test_a_fusion_reads_deeper_than_it_answers():
    assert Way("lexical").depth(10) == 10
    assert Way("hybrid").depth(10) == 100
    assert Way("hybrid").depth(500) == 500

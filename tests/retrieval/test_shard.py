"""A shard answers exactly, with ties by doc_id; sharded equals whole."""

from pathlib import Path

import numpy as np
import pytest

from bixse.records import Hit
from bixse.retrieval.building import build_shard
from bixse.retrieval.merge import merge
from bixse.retrieval.settings import Retrieval
from bixse.retrieval.shard import Shard
from tests.retrieval.made import table, unit


def shard(folder: Path, doc_ids: list[str], vectors: np.ndarray, structure: str = "exact") -> Shard:
    folder.mkdir(parents=True)
    build_shard(folder, table(doc_ids), vectors, Retrieval(structure=structure))
    return Shard.load(folder)


def by_hand(doc_ids: list[str], vectors: np.ndarray, query: np.ndarray, k: int) -> list[str]:
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(1).astype(np.float32)
    order = sorted(range(len(doc_ids)), key=lambda row: (-scores[row], doc_ids[row]))
    return [doc_ids[row] for row in order[:k]]


def corpus(documents: int = 300, dim: int = 16, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Random vectors, a third of them in large groups of equal ones: ties at every depth."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(documents, dim)))
    vectors[documents // 3 : documents // 2] = vectors[0]
    vectors[documents // 2 : 2 * documents // 3] = vectors[1]
    doc_ids = [f"d{n}" for n in rng.permutation(documents)]
    return doc_ids, vectors


@pytest.mark.parametrize("k", [1, 7, 60, 1000])
def test_exact_search_by_hand_with_ties(tmp_path: Path, k: int) -> None:
    doc_ids, vectors = corpus()
    queries = np.concatenate([vectors[:2], unit(np.random.default_rng(1).normal(size=(8, 16)))])
    found = shard(tmp_path / "s", doc_ids, vectors).search(queries, k)
    for query, hits in zip(queries, found, strict=True):
        assert [hit.doc_id for hit in hits] == by_hand(doc_ids, vectors, query, k)
        assert [hit.rank for hit in hits] == list(range(1, min(k, 300) + 1))


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [1, 10, 120])
def test_sharded_equals_whole(tmp_path: Path, shards: int, k: int) -> None:
    doc_ids, vectors = corpus(seed=shards)
    queries = np.concatenate([vectors[:3], unit(np.random.default_rng(2).normal(size=(5, 16)))])
    whole = shard(tmp_path / "whole", doc_ids, vectors).search(queries, k)
    pieces = [
        shard(tmp_path / f"s{n}", doc_ids[n::shards], vectors[n::shards]).search(queries, k)
        for n in range(shards)
    ]
    for number in range(len(queries)):
        assert merge([piece[number] for piece in pieces], k) == whole[number]


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    doc_ids, vectors = corpus()
    index = shard(tmp_path / "s", doc_ids, vectors)
    queries = unit(np.random.default_rng(3).normal(size=(33, 16)))
    together = index.search(queries, 10)
    alone = [index.search(queries[n : n + 1], 10)[0] for n in range(33)]
    assert together == alone


def test_a_k_for_each_query_is_the_head_of_the_largest(tmp_path: Path) -> None:
    doc_ids, vectors = corpus()
    index = shard(tmp_path / "s", doc_ids, vectors)
    queries, ks = vectors[:4], [3, 250, 1, 1000]
    for found, hits, k in zip(
        index.rankings(queries, ks), index.search(queries, 300), ks, strict=True
    ):
        assert found.doc_ids == [hit.doc_id for hit in hits[:k]] == index.doc_ids(found.rows)
        assert found.scores == [hit.score for hit in hits[:k]]


def test_rows_of_fewer_hits_end_in_nothing(tmp_path: Path) -> None:
    """Of lists that hold too little, as of a whole index that does."""
    vectors = unit(np.random.default_rng(5).normal(size=(80, 4)))
    doc_ids = [f"d{n:02d}" for n in range(80)]
    folder = tmp_path / "lists"
    folder.mkdir()
    build_shard(folder, table(doc_ids), vectors, Retrieval(structure="ivf_flat", nlist=2, nprobe=1))
    index = Shard.load(folder)
    rows, scores = index.search_rows(vectors[:3], 1000)
    assert rows.shape == scores.shape == (3, 80)
    for row, score, hits in zip(rows, scores, index.search(vectors[:3], 1000), strict=True):
        assert 0 < len(hits) < 80
        assert set(row[len(hits) :].tolist()) == {-1}
        assert set(score[len(hits) :].tolist()) == {-np.inf}
        assert index.doc_ids(row[: len(hits)]) == [hit.doc_id for hit in hits]


def test_hnsw_finds_nearly_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    vectors, queries = unit(rng.normal(size=(2000, 32))), unit(rng.normal(size=(50, 32)))
    doc_ids = [f"d{n:04d}" for n in range(2000)]
    graph = shard(tmp_path / "graph", doc_ids, vectors, "hnsw").search(queries, 10)
    exact = shard(tmp_path / "exact", doc_ids, vectors).search(queries, 10)
    pairs = zip(graph, exact, strict=True)
    shared = [len({h.doc_id for h in a} & {h.doc_id for h in b}) for a, b in pairs]
    assert np.mean(shared) / 10 > 0.98


def test_one_document_and_none(tmp_path: Path) -> None:
    query = unit(np.ones((1, 4)))
    one = shard(tmp_path / "one", ["a"], query)
    assert one.search(query, 10) == [[Hit("a", 1.0, 1)]]
    none = shard(tmp_path / "none", [], np.zeros((0, 4), np.float32))
    assert none.search(query, 10) == [[]]


@pytest.mark.parametrize(
    ("vectors", "problem"),
    [
        (np.ones((1, 3), np.float32), "expected vectors"),
        (np.ones(4, np.float32), "expected vectors"),
        (np.full((1, 4), np.nan, np.float32), "not finite"),
        (np.full((1, 4), np.inf, np.float32), "not finite"),
    ],
)
def test_bad_queries_are_refused(tmp_path: Path, vectors: np.ndarray, problem: str) -> None:
    index = shard(tmp_path / "s", ["a"], unit(np.ones((1, 4))))
    with pytest.raises(ValueError, match=problem):
        index.search(vectors, 1)


def test_bad_builds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        shard(tmp_path / "a", ["x", "x"], unit(np.ones((2, 4))))
    with pytest.raises(ValueError, match="2 documents with 1 vectors"):
        shard(tmp_path / "b", ["x", "y"], unit(np.ones((1, 4))))


def test_stored_fields(tmp_path: Path) -> None:
    index = shard(tmp_path / "s", ["b", "a"], unit(np.eye(2)))
    rows, _ = index.search_rows(unit(np.eye(2)), 1)
    assert index.doc_ids(rows[0]) == ["b"]
    assert index.documents(rows[1])[0].text == "text of a"

"""What a filter keeps is found whatever the structure, near the query and far from it."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from bixse.retrieval import finder, metadata
from bixse.retrieval.building import build_shard
from bixse.retrieval.merge import ranked
from bixse.retrieval.metadata import Kept
from bixse.retrieval.neighbours import kept_of, neighbour_counts
from bixse.retrieval.settings import Retrieval, Structure
from bixse.retrieval.shard import Shard
from tests.retrieval.made import clustered, table


def test_as_many_neighbours_are_asked_for_as_are_faster_than_comparing() -> None:
    assert neighbour_counts(10, 10**6) == [128, 1024]
    assert neighbour_counts(10, 1023) == [128]
    assert neighbour_counts(10, 127) == []
    assert neighbour_counts(1000, 10**6) == [4000]
    assert neighbour_counts(1025, 10**6) == []


def test_kept_neighbours_by_hand() -> None:
    kept, none = Kept.of(np.array([1, 0, 1, 1, 0, 0, 0, 1], np.bool_)), -np.inf
    scores = np.array(
        [[0.75, 0.5, 0.25, 0.125], [0.75, 0.5, 0.25, none], [0.75, none, none, none]], np.float32
    )
    rows = np.array([[0, 1, 2, 3], [1, 0, 2, -1], [0, -1, -1, -1]])

    def enough(fetch: int, k: int, whole: bool) -> list[bool]:
        return kept_of(scores, rows, kept, fetch, k, whole)[0].tolist()

    _, found_scores, found_rows = kept_of(scores, rows, kept, fetch=1, k=1, whole=False)
    assert found_rows.tolist() == [[0, 2, 3], [0, 2, -1], [0, -1, -1]]
    assert found_scores.tolist() == [[0.75, 0.25, 0.125], [0.5, 0.25, none], [0.75, none, none]]
    # One of the first two is kept, of each query.
    assert enough(1, 1, whole=False) == [True, True, True]
    assert enough(2, 1, whole=False) == [False, False, False]
    # More may tie with the third of the first query; the others have no third, or no second.
    assert enough(1, 2, whole=True) == [True, True, False]
    assert enough(1, 3, whole=True) == [False, False, False]


def topical(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centres of 20 topics, the topic of each row, and unit vectors [count, 32]."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 32))
    topics = rng.integers(20, size=count)
    rows = centres[topics] + rng.normal(size=(count, 32)) * 0.5
    return centres, topics, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("structure", ["hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq"])
def test_approximate_structures_find_nearly_all_that_is_kept(
    tmp_path: Path, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through FAISS where many rows are kept, where few by comparing them: then exactly."""
    monkeypatch.setattr(metadata, "FEW", 100)
    rows, queries = clustered(4000, 32, seed=1), clustered(40, 32, seed=2)
    doc_ids = [f"d{n:05d}" for n in range(4000)]
    wanted = Retrieval.model_validate(
        {"structure": structure, "nlist": 64, "pq_m": 16, "nprobe": 12, "refine_factor": 16}
    )
    build_shard(tmp_path, table(doc_ids), rows, wanted)
    shard = Shard.load(tmp_path)
    draws, scores = np.random.default_rng(3).random(4000), queries @ rows.T
    for share in (0.5, 0.05, 0.005):
        mask = draws < share
        hits = shard.search(queries, 10, kept=Kept.of(mask))
        order = np.argsort(-np.where(mask, scores, -np.inf), axis=1)[:, :10]
        true = [{doc_ids[row] for row in found} for found in order]
        recall = [len(t & {h.doc_id for h in of}) / 10 for t, of in zip(true, hits, strict=True)]
        assert np.mean(recall) >= (1.0 if share < 0.01 else 0.95)
        assert all(mask[int(h.doc_id[1:])] for of in hits for h in of)
    assert shard.search(queries[:2], 10, kept=Kept.of(np.zeros(4000, np.bool_))) == [[], []]


@pytest.mark.parametrize("structure", get_args(Structure))
@pytest.mark.parametrize("size", [4000, 25])
def test_few_rows_are_compared_exactly(
    tmp_path: Path, structure: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they are compared, ties across blocks of rows included."""
    monkeypatch.setattr(finder, "_BLOCK", 16)
    rows = clustered(4000, 32, seed=1)
    rows[1000:3000] = rows[0]
    queries = np.concatenate([rows[:1], clustered(5, 32, seed=2)])
    wanted = Retrieval.model_validate(
        {"structure": structure, "nlist": 64, "pq_m": 16, "nprobe": 1, "refine_factor": 1}
    )
    doc_ids = [f"d{n:05d}" for n in range(4000)]
    build_shard(tmp_path, table(doc_ids), rows, wanted)
    mask = np.zeros(4000, np.bool_)
    mask[np.random.default_rng(3).permutation(4000)[: size // 4]] = True
    exact = np.einsum("qd,nd->qn", queries.astype("f8"), rows.astype("f8")).astype("f4")
    for k in (1, 7, 40):
        hits = Shard.load(tmp_path).search(queries, k, kept=Kept.of(mask))
        for query, of_query in enumerate(hits):
            scored = [(float(exact[query, row]), doc_ids[row]) for row in np.flatnonzero(mask)]
            assert of_query == ranked(scored, k)


@pytest.mark.parametrize("structure", ["hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq"])
def test_whole_topics_are_found_though_the_querys_is_not_kept(
    tmp_path: Path, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widened by the part of all rows that is kept, HNSW found .67 of these."""
    monkeypatch.setattr(metadata, "FEW", 100)
    _, topics, made = topical(4040)
    rows, queries = made[:4000], made[4000:]
    wanted = Retrieval.model_validate(
        {"structure": structure, "nlist": 64, "pq_m": 16, "nprobe": 8, "refine_factor": 16}
        | {"ef_search": 32}
    )
    doc_ids = [f"d{n:05d}" for n in range(4000)]
    build_shard(tmp_path, table(doc_ids), rows, wanted)
    shard = Shard.load(tmp_path)
    mask = topics[:4000] % 4 == 0
    found, _ = shard.search_rows(queries, 10, kept=Kept.of(mask))
    true = np.argsort(-np.where(mask, queries @ rows.T, -np.inf), axis=1)[:, :10]
    recall_Q = [
        len(set(t) & set(f)) / 10 for t, f in zip(true.tolist(), found.tolist(), strict=True)
    ]
    elsewhere = topics[4000:] % 4 != 0
    assert np.mean(np.array(recall_Q)[elsewhere]) >= 0.95
    assert np.mean(np.array(recall_Q)[~elsewhere]) >= 0.95
    alone = [shard.search_rows(query[None], 10, kept=Kept.of(mask))[0][0] for query in queries]
    assert np.array_equal(alone, found), "does not depend on the batch"


@pytest.mark.parametrize("structure", get_args(Structure))
def test_as_many_are_found_as_are_asked_for(
    tmp_path: Path, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of the kept stand near the query, the others far away."""
    monkeypatch.setattr(metadata, "FEW", 100)
    centres, topics, rows = topical(8000)
    wanted = Retrieval.model_validate(
        {"structure": structure, "nlist": 64, "pq_m": 16, "nprobe": 4, "refine_factor": 16}
    )
    build_shard(tmp_path, table([f"d{n:05d}" for n in range(8000)]), rows, wanted)
    shard = Shard.load(tmp_path)
    query = (centres[0] / np.linalg.norm(centres[0])).astype(np.float32)
    near = np.argsort(-(rows @ query))
    mask = np.isin(topics, range(10, 20))
    mask[near[:20]] = True
    for k in (10, 50, 500):
        ((found, _),) = zip(*shard.search_rows(query[None], k, kept=Kept.of(mask)), strict=True)
        true = [row for row in near.tolist() if mask[row]][:k]
        assert (found >= 0).sum() == k
        assert len(set(true) & set(found.tolist())) >= 0.95 * k

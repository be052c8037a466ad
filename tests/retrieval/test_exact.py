"""Exact search: whatever is compared together, the same ranking."""

import numpy as np

import bixse.retrieval.exact as exact
from bixse.artifacts import Artifact
from bixse.records import Hit
from bixse.retrieval.shard import Shard
from tests.retrieval.made import artefacts, clustered


def test_the_ranking_is_that_of_all_documents_whatever_is_compared_together(tmp_path, monkeypatch):
    vectors, queries = clustered(90, 8, seed=1), clustered(5, 8, seed=2)
    vectors[7::20] = vectors[3]  # Ties across parts.
    doc_ids = [f"d{n:02d}" for n in np.random.default_rng(3).permutation(90)]
    embeddings, _ = artefacts(tmp_path, doc_ids, vectors, part=7)
    cosines = vectors.astype(np.float64) @ queries.T.astype(np.float64)
    scores_NQ = cosines.astype(np.float32).tolist()
    expected = []
    for query in range(5):
        order = sorted(range(90), key=lambda n: (-scores_NQ[n][query], doc_ids[n]))
        best = enumerate(order[:12], start=1)
        expected.append([Hit(doc_ids[n], scores_NQ[n][query], rank) for rank, n in best])
    for numbers, at_once in ((1, 1), (20 * 8, 2), (1 << 20, 100)):
        monkeypatch.setattr(exact, "_BLOCK_NUMBERS", numbers)
        monkeypatch.setattr(exact, "_QUERIES", at_once)
        assert exact.search_exact(embeddings, queries, 12) == expected


def test_small_parts_are_compared_together(tmp_path, monkeypatch):
    embeddings, _ = artefacts(
        tmp_path, [f"d{n}" for n in range(90)], clustered(90, 8, seed=1), part=3
    )
    searched, read = [], []
    rankings, part = Shard.rankings, Artifact.part
    # Counted, and done all the same.
    monkeypatch.setattr(Shard, "rankings", lambda *given: searched.append(0) or rankings(*given))
    monkeypatch.setattr(Artifact, "part", lambda *given: read.append(given[1]) or part(*given))
    assert len(exact.search_exact(embeddings, clustered(2, 8, seed=4), 5)) == 2
    assert len(searched) == 1
    assert read == embeddings.parts()

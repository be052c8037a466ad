"""Rocchio by hand, and that a second exact search is the one of the moved query."""

import numpy as np
import pytest

from bixse.retrieval.exact import search_again, search_exact
from bixse.retrieval.feedback import rocchio
from tests.retrieval.made import artefacts, clustered


def test_a_query_moves_as_worked_by_hand():
    query = np.array([1, 0], np.float32)
    documents = np.array([[0, 1], [0.6, 0.8]], np.float32)
    # mean (0.3, 0.9); half and half (0.65, 0.45), of length sqrt(0.625)
    expected = np.array([0.65, 0.45]) / np.sqrt(0.625)
    assert rocchio(query, documents, 0.5) == pytest.approx(expected, abs=1e-7)
    assert rocchio(query, documents, 0.0) == pytest.approx(query)
    # (0.3, 0.9) of length sqrt(0.9): the mean itself is no unit vector.
    assert rocchio(query, documents, 1.0) == pytest.approx(np.array([0.3, 0.9]) / np.sqrt(0.9))
    assert rocchio(query, documents, 0.5).dtype == np.float32


def test_without_documents_or_direction_the_query_stays():
    query = np.array([1, 0], np.float32)
    assert rocchio(query, np.zeros((0, 2), np.float32), 0.5) is query
    assert rocchio(query, -query[None], 0.5) is query


def test_a_second_search_is_the_exact_one_of_the_moved_queries(tmp_path):
    vectors, queries = clustered(90, 8, seed=1), clustered(5, 8, seed=2)
    doc_ids = [f"d{n:02d}" for n in range(90)]
    embeddings, _ = artefacts(tmp_path, doc_ids, vectors, part=40)
    found = search_exact(embeddings, queries, 10)
    again = search_again(embeddings, queries, found, 3, 0.5, 10)
    for query, before, after in zip(queries, found, again, strict=True):
        head = vectors[[doc_ids.index(hit.doc_id) for hit in before[:3]]]
        cosines = vectors @ rocchio(query, head, 0.5)
        order = sorted(range(90), key=lambda n: (-cosines[n], doc_ids[n]))[:10]
        assert [hit.doc_id for hit in after] == [doc_ids[n] for n in order]
        assert [hit.score for hit in after] == pytest.approx(cosines[order], abs=1e-6)
    assert search_again(embeddings, queries, found, 3, 0.0, 10) == found

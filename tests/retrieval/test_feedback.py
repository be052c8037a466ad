"""Rocchio by hand, and that a second exact search is the one of the moved query."""

import numpy as np
import pytest

from bixse.artifacts import Artifact, begin
from bixse.records import embeddings_schema
from bixse.retrieval.exact import search_exact
from bixse.retrieval.feedback import rocchio, search_again


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

"""Lists of several shards, merged, find what one index of all rows finds."""

import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bixse.retrieval.library import faiss
from bixse.retrieval.lists import merge_lists, share_centroids
from bixse.retrieval.structures import read_index
from tests.retrieval.made import clustered

DIM = 32
VECTORS = clustered(2000, DIM, seed=5)
QUERIES = clustered(5, DIM, seed=6)
KINDS = [f"IVF{{}},PQ{DIM // 2}x4fs", "IVF{},PQ2x4fs", f"RR{DIM},IVF{{}},RaBitQfs"]


def trained(kind: str, lists: int) -> Any:
    index = faiss.index_factory(DIM, kind.format(lists), faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    return index


TRAINED = {(kind, lists): trained(kind, lists) for kind in KINDS for lists in (1, 3)}


def loaded(index: Any) -> Any:
    """As `Shard.load` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        faiss.write_index(index, str(path))
        return read_index(path)


def all_scores(index: Any, rows: int) -> np.ndarray:
    """Of every row by its codes, [Q, rows], in the order of the rows.

    FAISS leaves out rows of the least score that its bytes can tell; they have -inf.
    """
    faiss.extract_index_ivf(index).nprobe = 3
    scores_QF, rows_QF = index.search(QUERIES, rows)
    by_row = np.full((len(QUERIES), rows + 1), -np.inf)
    np.put_along_axis(by_row, rows_QF, scores_QF, axis=1)
    assert np.isfinite(by_row[:, :rows]).mean() > 0.9
    return by_row[:, :rows]


# A block of two product codes is 32 bytes, so that FAISS errs at every multiple of 32 rows.
sizes = st.lists(
    st.one_of(st.sampled_from([0, 1, 31, 32, 33, 64, 128, 256]), st.integers(0, 400)),
    min_size=2,
    max_size=5,
).filter(lambda many: sum(many) > 0)


@pytest.mark.parametrize("kind", KINDS)
@given(counts=sizes, lists=st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_merged_lists_hold_every_row_with_its_code(
    kind: str, counts: list[int], lists: int
) -> None:
    whole, pieces = faiss.clone_index(TRAINED[kind, lists]), []
    for rows in np.split(VECTORS[: sum(counts)], np.cumsum(counts)[:-1]):
        piece = faiss.clone_index(TRAINED[kind, lists])
        if len(rows):
            # In the same batches, since factors of RaBitQ are rounded by the batch.
            whole.add(rows)
            piece.add(rows)
        pieces.append(loaded(piece))
    merged = merge_lists(pieces)
    assert merged is not None
    assert merged.ntotal == sum(counts)
    assert np.array_equal(all_scores(merged, sum(counts)), all_scores(whole, sum(counts)))


def test_centroids_of_many_shards_are_not_in_memory_together() -> None:
    """They are copied out of FAISS to be compared."""
    lists, shards = 1024, 16
    centroids = faiss.IndexFlatIP(DIM)
    centroids.add(VECTORS[:lists])
    indexes = [
        faiss.IndexIVFFlat(centroids, DIM, lists, faiss.METRIC_INNER_PRODUCT) for _ in range(shards)
    ]
    tracemalloc.start()
    try:
        assert share_centroids(indexes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * VECTORS[:lists].nbytes

"""Exact search over an embeddings artefact: for candidates, for evaluation, and as the truth."""

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.artifacts import Artifact
from bixse.records import Hit
from bixse.retrieval.merge import merge
from bixse.retrieval.shard import Shard, Vectors


def search_exact(embeddings: Artifact, vectors_QD: Vectors, k: int) -> list[list[Hit]]:
    """The best `k` documents of each query, ties by `doc_id`; one part in memory at a time."""
    best: list[list[Hit]] = [[] for _ in vectors_QD]
    for name in embeddings.parts():
        part = embeddings.part(name).sort_by("doc_id")
        vectors_ND = vectors_of(part)
        if len(vectors_ND) == 0:
            continue
        index = faiss.IndexFlatIP(vectors_ND.shape[1])
        index.add(vectors_ND)
        found = Shard(index, part.select(["doc_id"])).search(vectors_QD, k)
        best = [merge(both, k) for both in zip(best, found, strict=True)]
    return best


def vectors_of(embeddings: pa.Table | pa.RecordBatch) -> Vectors:
    """The `vector` column as an array [rows, dim], float32."""
    column = embeddings["vector"]
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat: npt.NDArray[Any] = whole.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(-1, column.type.list_size), np.float32)


def recall(found: Sequence[Sequence[Hit]], truth: Sequence[Sequence[Hit]]) -> float:
    """Mean share of the true documents of a query that were found; queries without any count not.

    Raises ValueError when no query has a true document.
    """
    shares = [
        len({hit.doc_id for hit in hits} & {hit.doc_id for hit in true}) / len(true)
        for hits, true in zip(found, truth, strict=True)
        if true
    ]
    if not shares:
        raise ValueError("recall of nothing: no query has a true document")
    return sum(shares) / len(shares)

"""One FAISS shard: build, save, load, search.

A shard is a directory: `index.faiss` (inner product of unit vectors, so cosine) and
`documents.arrow` (doc_id, title, text; Arrow IPC, memory-mapped). Rows stand in the order of
`doc_id`, so that the row number breaks ties. Scores are recomputed from the stored vectors in
float64, which makes them equal whatever the shard, the batch or the BLAS kernel: sharded equals
whole.

Shapes: Q queries, K hits, D dimensions.
"""

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.records import CORPUS, Document, Hit, documents_at
from bixse.retrieval.settings import Retrieval

INDEX_FILE = "index.faiss"
DOCUMENTS_FILE = "documents.arrow"

# Two float32 inner products of the same unit vectors differ by less than this between kernels.
_ROUNDING = 1e-5
_SPARE = 16

Vectors = npt.NDArray[np.float32]


def build_shard(
    directory: Path, documents: pa.Table, vectors_ND: Vectors, settings: Retrieval
) -> None:
    """Write a shard into an existing directory.

    Raises ValueError when vectors and documents differ in number or a `doc_id` stands twice.
    """
    if len(vectors_ND) != documents.num_rows:
        raise ValueError(f"{documents.num_rows} documents with {len(vectors_ND)} vectors")
    doc_ids = np.asarray(documents["doc_id"].to_pylist(), dtype=object)
    order = np.argsort(doc_ids, kind="stable")
    if (doc_ids[order][1:] == doc_ids[order][:-1]).any():
        raise ValueError("a doc_id stands twice in one shard")
    dim = vectors_ND.shape[1]
    index: faiss.Index
    if settings.structure == "exact":
        index = faiss.IndexFlatIP(dim)
    else:
        index = faiss.IndexHNSWFlat(dim, settings.hnsw_m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = settings.ef_construction
        index.hnsw.efSearch = settings.ef_search
    index.add(np.ascontiguousarray(vectors_ND[order], np.float32))
    faiss.write_index(index, str(directory / INDEX_FILE))
    table = documents.select(CORPUS.names).take(pa.array(order)).cast(CORPUS)
    path = str(directory / DOCUMENTS_FILE)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, CORPUS) as writer:
        writer.write_table(table, max_chunksize=4096)


class Shard:
    """A loaded shard; safe for one search at a time."""

    def __init__(self, index: faiss.Index, documents: pa.Table) -> None:
        self._index = index
        self._documents = documents
        self.size = int(index.ntotal)
        self.dim = int(index.d)

    @classmethod
    def load(cls, directory: Path) -> "Shard":
        """Open a shard whose files have been verified (`Artifact.verify`).

        Raises ValueError when the two files disagree.
        """
        path = directory / INDEX_FILE
        # A damaged header must not ask for more memory than the file can hold.
        faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
        index = faiss.read_index(str(path))
        documents = pa.ipc.open_file(pa.memory_map(str(directory / DOCUMENTS_FILE))).read_all()
        if index.ntotal != documents.num_rows:
            raise ValueError(
                f"{directory} holds {index.ntotal} vectors and {documents.num_rows} documents"
            )
        return cls(index, documents)

    def search(self, vectors_QD: Vectors, k: int) -> list[list[Hit]]:
        """The best `k` of this shard for each query, ties by `doc_id`; fewer if it holds fewer.

        Raises ValueError for another dimension or numbers that are not finite.
        """
        rows, scores = self.search_rows(vectors_QD, k)
        return [self._hits(r, s) for r, s in zip(rows, scores, strict=True)]

    def search_rows(
        self, vectors_QD: Vectors, k: int
    ) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.float32]]]:
        """As `search`, in row numbers of this shard and their scores, one array a query."""
        vectors = np.ascontiguousarray(vectors_QD, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"expected vectors [queries, {self.dim}], found {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise ValueError("a query vector is not finite")
        if k < 1:
            raise ValueError(f"k must be 1 or more, found {k}")
        fetch = min(self.size, k + _SPARE)
        found = self._fetch(vectors, fetch)
        rows, scores = [], []
        for query, (query_rows, query_scores) in enumerate(found):
            width = fetch
            # A tie at the k-th place must be whole before `doc_id` can decide it.
            while width < self.size and _cut_in_a_tie(query_scores, k):
                width = min(self.size, width * 4)
                query_rows, query_scores = self._fetch(vectors[query : query + 1], width)[0]
                if len(query_rows) < width:
                    break
            exact = self._exact(vectors[query], query_rows)
            order = np.lexsort((query_rows, -exact))[:k]
            rows.append(query_rows[order])
            scores.append(exact[order])
        return rows, scores

    def doc_ids(self, rows: npt.NDArray[np.int64]) -> list[str]:
        doc_ids = self._documents["doc_id"]
        return [str(doc_ids[row].as_py()) for row in rows.tolist()]

    def documents(self, rows: npt.NDArray[np.int64]) -> list[Document]:
        """The stored fields of rows of this shard."""
        return documents_at(self._documents, rows.tolist())

    def vectors(self, rows: npt.NDArray[np.int64]) -> Vectors:
        """The stored vectors of rows of this shard, [len(rows), D]."""
        store = self._index.storage if hasattr(self._index, "storage") else self._index
        return np.asarray(store.reconstruct_batch(rows), np.float32)

    def _fetch(
        self, vectors_QD: Vectors, fetch: int
    ) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        if fetch == 0:
            return [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(vectors_QD)
        params = None
        if isinstance(self._index, faiss.IndexHNSW):
            width = max(int(self._index.hnsw.efSearch), fetch)
            # A class of faiss 1.15 that its type stubs leave out.
            params = faiss.SearchParametersHNSW(efSearch=width)  # type: ignore[attr-defined]
        scores_QK, rows_QK = self._index.search(vectors_QD, fetch, params=params)
        # FAISS fills what a graph search did not find with row -1.
        return [(r[r >= 0], s[r >= 0]) for r, s in zip(rows_QK, scores_QK, strict=True)]

    def _exact(self, vector_D: Vectors, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        products = self.vectors(rows).astype(np.float64) * vector_D.astype(np.float64)
        scores: Vectors = products.sum(axis=1).astype(np.float32)
        return scores

    def _hits(self, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> list[Hit]:
        found = zip(self.doc_ids(rows), scores.tolist(), strict=True)
        return [Hit(doc_id, score, rank) for rank, (doc_id, score) in enumerate(found, start=1)]


def _cut_in_a_tie(scores: npt.NDArray[np.float32], k: int) -> bool:
    return len(scores) > k - 1 and bool(scores[-1] >= scores[k - 1] - _ROUNDING)

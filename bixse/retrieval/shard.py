"""One FAISS shard: build, save, load, search.

A shard is a directory:

    index.faiss       the structure, inner product of unit vectors, so cosine
    vectors.npy       whole vectors for scoring again, where index.faiss holds codes only
    scales.npy        what each row of int8 vectors is multiplied with
    documents.arrow   doc_id, title, text (Arrow IPC)
    metadata.arrow    what filters read, where there is any (`retrieval/metadata.py`)
    search.json       how wide to search; approximate structures only
    lexical/          BM25 of the same rows, where asked for (`retrieval/lexical_shard.py`)

All of it is memory-mapped and read only, so that processes that serve the same shard share its
pages; only codes (ivf_pq, ivf_rabitq), which FAISS 1.15 cannot map, are read. Rows stand in the
order of `doc_id`, so that the row number breaks ties. Scores are recomputed from the
stored vectors (`retrieval/scoring.py`): sharded equals whole.

Shapes: Q queries, K hits, D dimensions, N documents, F rows that FAISS gives a query, C candidates
of a query. A row -1 is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.records import CORPUS, Document, Hit, documents_at
from bixse.retrieval.device import Device, searchable, takes
from bixse.retrieval.library import faiss
from bixse.retrieval.metadata import METADATA_FILE, Fields, Kept
from bixse.retrieval.neighbours import kept_of, neighbour_counts
from bixse.retrieval.scoring import ROUNDING, Rows, Vectors, best, falling, joined, near
from bixse.retrieval.settings import Search
from bixse.retrieval.structures import Scan, parameters, read_index, widening

INDEX_FILE = "index.faiss"
VECTORS_FILE = "vectors.npy"
SCALES_FILE = "scales.npy"
DOCUMENTS_FILE = "documents.arrow"
SEARCH_FILE = "search.json"

_BLOCK = 8192

_FAR = 8
"""How many times more candidates of codes are scored again where all rows kept are compared: of
whole topics that are not the query's, recall@10 of product codes rose from .71 to 1
(`benchmarks.filtered --by-topic`)."""
_FAR_MOST = 4096
"""The most candidates to score again, unless more are wanted anyhow: each is read from disk."""


Ask = Callable[[Vectors, int], tuple[Vectors, Rows]]
"""Queries and how many candidates to fetch, to float32 scores, falling, and rows, [Q, F]."""


class Ranking(NamedTuple):
    """What a shard found for one query: higher score first, ties by `doc_id`."""

    rows: Rows
    doc_ids: list[str]
    scores: list[float]


def rankings_of(
    rows_QK: Rows, scores_QK: Vectors, ks: Sequence[int], doc_ids_of: Callable[[Rows], list[str]]
) -> list[Ranking]:
    """The first `ks[i]` of query `i`, or as many as there are before the rows -1."""
    counts = np.minimum((rows_QK >= 0).sum(axis=1), ks)
    wanted_QK = np.arange(rows_QK.shape[1]) < counts[:, None]
    rows, scores = rows_QK[wanted_QK], scores_QK[wanted_QK].tolist()
    doc_ids, found, start = doc_ids_of(rows), [], 0
    for end in np.cumsum(counts).tolist():
        found.append(Ranking(rows[start:end], doc_ids[start:end], scores[start:end]))
        start = end
    return found


def checked(vectors_QD: Vectors, dim: int, k: int) -> Vectors:
    """Queries as FAISS takes them. Raises ValueError as `Shard.search`."""
    vectors = np.ascontiguousarray(vectors_QD, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"expected vectors [queries, {dim}], found {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("a query vector is not finite")
    if k < 1:
        raise ValueError(f"k must be 1 or more, found {k}")
    return vectors


class Shard:
    """A loaded shard; safe for one search at a time."""

    def __init__(
        self,
        index: faiss.Index,
        documents: pa.Table,
        search: Search | None = None,
        stored_ND: npt.NDArray[Any] | None = None,
        scales_N: Vectors | None = None,
        fields: Fields | None = None,
        device: Device | None = None,
    ) -> None:
        self.index = index
        self.copy = device.copied(index) if device and searchable(index) else None
        self.fields = fields
        self.table = documents
        # Large, since all ids together may be more than 2 GiB.
        doc_ids = documents["doc_id"].cast(pa.large_string()).combine_chunks()
        _, ends, letters = doc_ids.buffers()
        self._id_ends = np.frombuffer(ends, np.int64)[doc_ids.offset :] if ends else np.zeros(1)
        self._id_letters = memoryview(letters or b"")
        self._store = faiss.downcast_index(getattr(index, "storage", index))
        self._stored_ND = stored_ND
        self._scales_N = scales_N
        self.width = search or Search()
        self.size = int(index.ntotal)
        self.dim = int(index.d)

    @classmethod
    def load(cls, directory: Path, device: Device | None = None) -> "Shard":
        """Map a shard whose files have been verified (`Artifact.verify`).

        Raises ValueError when its files disagree, and as `Device.copied`.
        """
        index = read_index(directory / INDEX_FILE)
        documents = pa.ipc.open_file(pa.memory_map(str(directory / DOCUMENTS_FILE))).read_all()
        search, stored, scales, fields = None, None, None, None
        if (directory / SEARCH_FILE).exists():
            search = Search.model_validate_json((directory / SEARCH_FILE).read_bytes())
        if (directory / VECTORS_FILE).exists():
            stored = np.load(directory / VECTORS_FILE, mmap_mode="r").view(np.ndarray)
        if (directory / SCALES_FILE).exists():
            scales = np.load(directory / SCALES_FILE)
        if (directory / METADATA_FILE).exists():
            fields = Fields.load(directory)
        for name, held in (
            ("documents", documents),
            ("stored vectors", stored),
            ("fields", fields),
        ):
            if held is not None and len(held) != index.ntotal:
                raise ValueError(f"{directory} holds {index.ntotal} vectors and {len(held)} {name}")
        return cls(index, documents, search, stored, scales, fields, device)

    def search(
        self,
        vectors_QD: Vectors,
        k: int,
        width: Search | None = None,
        kept: Kept | None = None,
    ) -> list[list[Hit]]:
        """The best `k` of this shard for each query, ties by `doc_id`; fewer if it finds fewer.

        With `kept`, the best `k` among those rows alone.
        Raises ValueError for another dimension or numbers that are not finite.
        """
        found = self.rankings(vectors_QD, [k] * len(vectors_QD), width, kept)
        return [list(map(Hit, one.doc_ids, one.scores, count(1))) for one in found]

    def rankings(
        self,
        vectors_QD: Vectors,
        ks: Sequence[int],
        width: Search | None = None,
        kept: Kept | None = None,
    ) -> list[Ranking]:
        """As `search` with a `k` for each query, before anything is made of rows and scores."""
        # One search at the largest k: a smaller ranking is the head of a larger one.
        rows_QK, scores_QK = self.search_rows(vectors_QD, max(ks, default=1), width, kept)
        return rankings_of(rows_QK, scores_QK, ks, self.doc_ids)

    def search_rows(
        self,
        vectors_QD: Vectors,
        k: int,
        width: Search | None = None,
        kept: Kept | None = None,
    ) -> tuple[Rows, Vectors]:
        """As `search`, in row numbers of this shard and their scores, both [Q, K].

        Where fewer than `k` were found, rows end in -1 and scores in -inf.
        """
        vectors = checked(vectors_QD, self.dim, k)
        rows_QC = near(*self.candidates(vectors, k, width, kept), k)
        rows_QK, scores_QK = best(vectors, rows_QC, self.vectors, k)
        if missing := min(k, self.size) - rows_QK.shape[1]:
            none = ((0, 0), (0, missing))
            rows_QK = np.pad(rows_QK, none, constant_values=-1)
            scores_QK = np.pad(scores_QK, none, constant_values=-np.inf)
        return rows_QK, scores_QK

    def doc_ids(self, rows: Rows) -> list[str]:
        # By hand: Arrow's `take` and what follows cost six times as much for some dozens of rows.
        ends, letters = self._id_ends, self._id_letters
        spans = zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)
        return [str(letters[start:end], "utf-8") for start, end in spans]

    def documents(self, rows: Rows) -> list[Document]:
        """The stored fields of rows of this shard, and their metadata."""
        found = documents_at(self.table, rows.tolist())
        if self.fields is None:
            return found
        known = [self.fields.at(row) or None for row in rows.tolist()]
        return [replace(one, metadata=own) for one, own in zip(found, known, strict=True)]

    def vectors(self, rows: Rows) -> Vectors:
        """The stored vectors of rows of this shard, [len(rows), D]."""
        if self._stored_ND is None:
            return np.asarray(self._store.reconstruct_batch(rows), np.float32)
        vectors = self._stored_ND[rows].astype(np.float32, copy=False)
        return vectors if self._scales_N is None else vectors * self._scales_N[rows, None]

    def kept(self, text: str) -> Kept:
        """The rows that meet a filter, as `Fields.kept`."""
        if self.fields is None:
            raise ValueError("a filter over documents without metadata")
        return self.fields.kept(text)

    def candidates(
        self,
        vectors_QD: Vectors,
        k: int,
        width: Search | None = None,
        kept: Kept | None = None,
        scan: Scan | None = None,
    ) -> tuple[Vectors, Rows]:
        """Float32 scores and rows, [Q, F], that hold the best `k` of each query as far as the
        structure finds them, scores falling.

        Scores of codes decide nothing: what they find is scored again from whole vectors. `scan` is
        what these queries ask of every shard with the same lists (`structures.Scan`).
        """
        width = width or self.width
        # A few more than k, since what is within rounding of the k-th is wanted too.
        fetch = k + 2 + k // 16
        if self._stored_ND is not None:
            fetch = max(fetch, k * width.refine_factor)
        fetch = min(fetch, self.size if kept is None else kept.count)
        if fetch == 0:
            return _none(len(vectors_QD))
        if kept is not None:
            return self._of_kept(vectors_QD, k, fetch, width, kept)
        found = None if scan is None else scan.of(self.index, fetch)
        return self._whole(vectors_QD, k, fetch, self.size, partial(self._ask, k, width), found)

    def _of_kept(
        self, vectors_QD: Vectors, k: int, fetch: int, width: Search, kept: Kept
    ) -> tuple[Vectors, Rows]:
        """As `candidates`, among the rows kept: of the query's neighbours, or all compared."""
        left, found = np.arange(len(vectors_QD)), []
        coded, flat = self._stored_ND is not None, isinstance(self.index, faiss.IndexFlat)
        near = [] if kept.few or flat else neighbour_counts(fetch, self.size)
        for neighbours in near:
            if not len(left):
                break
            vectors = vectors_QD[left]
            wide = widening(self.index, width)
            answer = self._ask(neighbours, wide, vectors, neighbours)
            enough, scores, rows = kept_of(*answer, kept, fetch, k, whole=not coded)
            if self._stored_ND is not None:
                scores, rows = falling(vectors[enough], rows, self._stored_ND, self.vectors)
            found.append((left[enough], scores, rows))
            left = left[~enough]
        if len(left):
            found.append((left, *self._all_kept(vectors_QD[left], k, fetch, width, kept)))
        # All columns: ties of the k-th may stand in the last.
        shape = len(vectors_QD), max((rows.shape[1] for _, _, rows in found), default=0)
        scores_QF, rows_QF = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        for some, scores, rows in found:
            scores_QF[some, : scores.shape[1]] = scores
            rows_QF[some, : rows.shape[1]] = rows
        return scores_QF, rows_QF

    def _all_kept(
        self, vectors_QD: Vectors, k: int, fetch: int, width: Search, kept: Kept
    ) -> tuple[Vectors, Rows]:
        """As `candidates`, by comparing all rows kept."""
        if not self._compares(kept):
            return self._among(vectors_QD, k, kept.rows)
        wanted = fetch
        if self._stored_ND is not None:
            # Far from the query codes tell neighbours apart less well.
            wanted = min(max(fetch, min(fetch * _FAR, _FAR_MOST)), kept.count)
        ask = partial(self._ask_kept, k, width, kept)
        return self._whole(vectors_QD, k, wanted, kept.count, ask)

    def _compares(self, kept: Kept) -> bool:
        """Whether FAISS had better compare these rows than `_among`.

        Vectors in one piece it reads where they stand. In lists it looks at every row whether it is
        kept, 6 ns each, and compares the kept in 200 ns, `_among` in 700. What codes find is not
        exact, but their whole vectors are on disk.
        """
        if isinstance(self._store, faiss.IndexFlat):
            return True
        if self._stored_ND is not None:
            return not kept.few
        return kept.count * 100 > kept.size

    def _whole(
        self,
        vectors_QD: Vectors,
        k: int,
        fetch: int,
        size: int,
        ask: Ask,
        found: tuple[Vectors, Rows] | None = None,
    ) -> tuple[Vectors, Rows]:
        """As `candidates`, of `size` rows that may be found by asking, or `found` already."""
        scores_QF, rows_QF = found or ask(vectors_QD, fetch)
        if self._stored_ND is not None:
            return falling(vectors_QD, rows_QF, self._stored_ND, self.vectors)
        # A tie at the k-th place must be whole before `doc_id` can decide it.
        if k < fetch < size:
            least_Q = scores_QF[:, k - 1] - np.float32(ROUNDING)
            tied_Q = (rows_QF[:, -1] >= 0) & (scores_QF[:, -1] >= least_Q)
            for query in np.flatnonzero(tied_Q).tolist():
                vector_1D = vectors_QD[query : query + 1]
                whole = _whole_tie(vector_1D, k, fetch, size, ask)
                (rows_K,), (scores_K,) = best(vector_1D, whole[None], self.vectors, k)
                rows_QF[query], scores_QF[query] = -1, -np.inf
                rows_QF[query, : len(rows_K)] = rows_K
                scores_QF[query, : len(rows_K)] = scores_K
        return scores_QF, rows_QF

    def _among(self, vectors_QD: Vectors, k: int, rows_N: Rows) -> tuple[Vectors, Rows]:
        """As `candidates`, of these rows alone and by comparing all of them, a block at a time."""
        found = [_none(len(vectors_QD))]
        for start in range(0, len(rows_N), _BLOCK):
            block = rows_N[start : start + _BLOCK]
            index = faiss.IndexFlatIP(self.dim)
            index.add(self.vectors(block))
            scores_QF, places_QF = Shard(index, CORPUS.empty_table()).candidates(vectors_QD, k)
            found.append((scores_QF, np.where(places_QF < 0, -1, block[places_QF])))
        return joined(found)

    def _ask(self, k: int, width: Search, vectors_QD: Vectors, fetch: int) -> tuple[Vectors, Rows]:
        params = parameters(self.index, width, k, fetch)
        index = self.copy if self.copy is not None and takes(params, fetch) else self.index
        scores_QF, rows_QF = index.search(vectors_QD, fetch, params=params)
        return scores_QF, rows_QF

    def _ask_kept(
        self, k: int, width: Search, kept: Kept, vectors_QD: Vectors, fetch: int
    ) -> tuple[Vectors, Rows]:
        params = parameters(self._store, width, k, fetch, kept)
        scores_QF, rows_QF = self._store.search(vectors_QD, fetch, params=params)
        return scores_QF, rows_QF


def _whole_tie(vector_1D: Vectors, k: int, fetch: int, size: int, ask: Ask) -> Rows:
    """Rows of one query that hold its best `k` of `size`, where more than `fetch` may share the
    k-th."""
    while True:
        fetch = min(size, fetch * 4)
        (scores,), (rows,) = ask(vector_1D, fetch)
        may = (rows >= 0) & (scores >= scores[k - 1] - np.float32(ROUNDING))
        if fetch == size or not may[-1]:
            return np.asarray(rows[may], np.int64)


def _none(queries: int) -> tuple[Vectors, Rows]:
    return np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)

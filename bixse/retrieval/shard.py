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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.records import CORPUS, Document, Hit, Kind, Metadata, documents_at
from bixse.retrieval.device import Device, searchable, takes
from bixse.retrieval.metadata import METADATA_FILE, Fields, Kept, write_metadata
from bixse.retrieval.scoring import ROUNDING, Rows, Vectors, best, falling, joined, near
from bixse.retrieval.settings import Retrieval, Search
from bixse.retrieval.structures import (
    CODED,
    TRAINED,
    Scan,
    asked_search,
    fill,
    parameters,
    read_index,
    resolve,
    trained,
)

INDEX_FILE = "index.faiss"
VECTORS_FILE = "vectors.npy"
SCALES_FILE = "scales.npy"
DOCUMENTS_FILE = "documents.arrow"
SEARCH_FILE = "search.json"

_BLOCK = 8192

FEW = 20_000
"""Up to so many rows that a filter keeps, all are compared with the query: about 1 ms for each
1,000 of 384 numbers, on one core. Of 100,000 rows HNSW is faster where more than about 3,000 are
kept, IVF from 2,000 on; but they look near the query only. Where a filter keeps whole topics, and
seldom the query's, HNSW found .2 of the best 10, IVF .7 to .8, at any share kept
(`benchmarks.filtered --by-topic`): right is worth 20 ms."""


def build_shard(
    directory: Path,
    documents: pa.Table,
    vectors_ND: Vectors,
    settings: Retrieval,
    template: faiss.Index | None = None,
    metadata: Mapping[str, Metadata] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    device: Device | None = None,
) -> None:
    """Write a shard of documents in any order into an existing directory.

    `metadata` of documents by `doc_id`, in fields of these `kinds`.

    A `template` is an empty index trained with these settings; without one the structure is decided
    by, and trained on, these vectors alone.
    Raises ValueError when vectors and documents differ in number, a `doc_id` stands twice, or there
    are too few vectors to train on.
    """
    if len(vectors_ND) != documents.num_rows:
        raise ValueError(f"{documents.num_rows} documents with {len(vectors_ND)} vectors")
    doc_ids = np.asarray(documents["doc_id"].to_pylist(), dtype=object)
    order = np.argsort(doc_ids, kind="stable")
    if (doc_ids[order][1:] == doc_ids[order][:-1]).any():
        raise ValueError("a doc_id stands twice in one shard")
    vectors = np.ascontiguousarray(vectors_ND[order], np.float32)
    if template is None:
        settings = resolve(settings, *vectors_ND.shape)
        template = trained(settings, vectors[: settings.train_rows], device)
    write_vectors(directory, vectors, settings, template, device)
    table = documents.select(CORPUS.names).take(pa.array(order)).cast(CORPUS)
    write_documents(directory, table.to_batches(max_chunksize=4096))
    known = metadata or {}
    write_metadata(directory, [known.get(doc_id) for doc_id in doc_ids[order]], kinds or {})
    if settings.structure in TRAINED or settings.structure == "hnsw":
        write_search(directory, asked_search(settings))


def write_vectors(
    directory: Path,
    vectors_ND: Vectors,
    settings: Retrieval,
    template: faiss.Index,
    device: Device | None = None,
) -> None:
    """Write the structure of vectors that stand in the order of `doc_id`, a block at a time.

    `vectors_ND` may be a memory-mapped array; `template` is trained and empty, and is filled.
    """
    fill(template, _blocks(vectors_ND), device)
    if settings.structure == "ivf_flat":
        lists: Any = template
        lists.make_direct_map(True)
    faiss.write_index(template, str(directory / INDEX_FILE))
    if settings.structure in CODED:
        _write_stored(directory, vectors_ND, settings.stored)


def write_documents(directory: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the stored fields; the batches must be in the order of `doc_id`."""
    path = str(directory / DOCUMENTS_FILE)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, CORPUS) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_search(directory: Path, search: Search) -> None:
    (directory / SEARCH_FILE).write_text(search.model_dump_json())


def _write_stored(directory: Path, vectors_ND: Vectors, stored: str) -> None:
    shape = vectors_ND.shape
    npy: Any = np.lib.format
    out = npy.open_memmap(directory / VECTORS_FILE, "w+", dtype=stored, shape=shape)
    scales = np.zeros(len(vectors_ND) if stored == "int8" else 0, np.float32)
    start = 0
    for block in _blocks(vectors_ND):
        end = start + len(block)
        if stored == "int8":
            # Each row by its own largest number, so that nothing is clipped.
            scales[start:end] = np.abs(block).max(axis=1) / 127
            block = np.rint(block / np.maximum(scales[start:end, None], np.float32(1e-30)))
        out[start:end] = block
        start = end
    out.flush()
    if stored == "int8":
        np.save(directory / SCALES_FILE, scales)


def _blocks(vectors_ND: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(vectors_ND), _BLOCK):
        yield np.ascontiguousarray(vectors_ND[start : start + _BLOCK], np.float32)


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
        # In one piece: taking from the chunks of a mapped table copies all of them first. Large,
        # since all ids together may be more than 2 GiB.
        self._doc_ids = documents["doc_id"].cast(pa.large_string()).combine_chunks()
        self._store = getattr(index, "storage", index)
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
        found: list[str] = (
            self._doc_ids.take(pa.array(rows)).to_numpy(zero_copy_only=False).tolist()
        )
        return found

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
        size = self.size if kept is None else kept.count
        if kept is not None and size <= max(FEW, fetch):
            return self._among(vectors_QD, k, kept.rows)
        fetch = min(size, fetch)
        if fetch == 0:
            return _none(len(vectors_QD))
        if scan is None:
            scores_QF, rows_QF = self._ask(vectors_QD, k, fetch, width, kept)
        else:
            scores_QF, rows_QF = scan.of(self.index, fetch)
        if self._stored_ND is not None:
            return falling(vectors_QD, rows_QF, self._stored_ND, self.vectors)
        # A tie at the k-th place must be whole before `doc_id` can decide it.
        if k < fetch < size:
            least_Q = scores_QF[:, k - 1] - np.float32(ROUNDING)
            tied_Q = (rows_QF[:, -1] >= 0) & (scores_QF[:, -1] >= least_Q)
            for query in np.flatnonzero(tied_Q).tolist():
                vector_1D = vectors_QD[query : query + 1]
                whole = self._whole_tie(vector_1D, k, fetch, width, kept)
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

    def _whole_tie(
        self, vector_1D: Vectors, k: int, fetch: int, width: Search, kept: Kept | None
    ) -> Rows:
        """Rows of one query that hold its best `k`, where more than `fetch` may share the k-th."""
        size = self.size if kept is None else kept.count
        while True:
            fetch = min(size, fetch * 4)
            (scores,), (rows,) = self._ask(vector_1D, k, fetch, width, kept)
            may = (rows >= 0) & (scores >= scores[k - 1] - np.float32(ROUNDING))
            if fetch == size or not may[-1]:
                return np.asarray(rows[may], np.int64)

    def _ask(
        self, vectors_QD: Vectors, k: int, fetch: int, width: Search, kept: Kept | None
    ) -> tuple[npt.NDArray[np.float32], Rows]:
        params = parameters(self.index, width, k, fetch, kept)
        index = self.copy if self.copy is not None and takes(params, fetch) else self.index
        scores, rows = index.search(vectors_QD, fetch, params=params)
        return scores, rows


def _none(queries: int) -> tuple[Vectors, Rows]:
    return np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)

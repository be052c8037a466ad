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

Shapes: Q queries, K hits, D dimensions, N documents, C candidates of a query. A row -1 is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bixse.records import Document, Hit, documents_at
from bixse.retrieval.device import Device
from bixse.retrieval.finder import Finder
from bixse.retrieval.metadata import METADATA_FILE, Fields, Kept
from bixse.retrieval.scoring import Rows, Vectors, best, near
from bixse.retrieval.settings import Search
from bixse.retrieval.stored import Stored
from bixse.retrieval.structures import read_index

INDEX_FILE = "index.faiss"
DOCUMENTS_FILE = "documents.arrow"
SEARCH_FILE = "search.json"


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

    def __init__(self, finder: Finder, documents: pa.Table, fields: Fields | None = None) -> None:
        self.finder = finder
        self.fields = fields
        self.table = documents
        # Large, since all ids together may be more than 2 GiB.
        doc_ids = documents["doc_id"].cast(pa.large_string()).combine_chunks()
        _, ends, letters = doc_ids.buffers()
        self._id_ends = np.frombuffer(ends, np.int64)[doc_ids.offset :] if ends else np.zeros(1)
        self._id_letters = memoryview(letters or b"")
        self.size, self.dim = finder.size, finder.dim

    @classmethod
    def load(cls, directory: Path, device: Device | None = None) -> "Shard":
        """Map a shard whose files have been verified (`Artifact.verify`).

        Raises ValueError when its files disagree, and as `Device.copied`.
        """
        index = read_index(directory / INDEX_FILE)
        documents = pa.ipc.open_file(pa.memory_map(str(directory / DOCUMENTS_FILE))).read_all()
        stored, width, fields = Stored.load(directory), None, None
        if (directory / SEARCH_FILE).exists():
            width = Search.model_validate_json((directory / SEARCH_FILE).read_bytes())
        if (directory / METADATA_FILE).exists():
            fields = Fields.load(directory)
        for name, held in (
            ("documents", documents),
            ("stored vectors", stored),
            ("fields", fields),
        ):
            if held is not None and len(held) != index.ntotal:
                raise ValueError(f"{directory} holds {index.ntotal} vectors and {len(held)} {name}")
        return cls(Finder(index, width, stored, device), documents, fields)

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
        rows_QC = near(*self.finder.candidates(vectors, k, width, kept), k)
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
        return self.finder.vectors(rows)

    def kept(self, text: str) -> Kept:
        """The rows that meet a filter, as `Fields.kept`."""
        if self.fields is None:
            raise ValueError("a filter over documents without metadata")
        return self.fields.kept(text)

"""What finds the candidates of a search: a FAISS structure, and the whole vectors behind its codes.

It knows rows by their numbers alone; `retrieval/shard.py` knows their documents.

Shapes: Q queries, K hits, D dimensions, F rows that FAISS gives a query. A row -1 is none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from bixse.retrieval.device import Device, searchable, takes
from bixse.retrieval.library import faiss, give_back_memory
from bixse.retrieval.lists import Scan, merge_lists
from bixse.retrieval.metadata import Kept
from bixse.retrieval.neighbours import kept_of, neighbour_counts
from bixse.retrieval.scoring import ROUNDING, Rows, Vectors, best, joined
from bixse.retrieval.settings import Search
from bixse.retrieval.stored import Stored
from bixse.retrieval.structures import parameters, widening

_BLOCK = 8192

_FAR = 8
"""How many times more candidates of codes are scored again where all rows kept are compared: of
whole topics that are not the query's, recall@10 of product codes rose from .71 to 1
(`benchmarks.filtered --by-topic`)."""
_FAR_MOST = 4096
"""The most candidates of a shard to score again, unless more are wanted anyhow: each is read from
disk."""


Ask = Callable[[Vectors, int], tuple[Vectors, Rows]]
"""Queries and how many candidates to fetch, to float32 scores, falling, and rows, [Q, F]."""


class Finder:
    """The rows of one shard, or of several whose lists were merged; safe for one search at a time.

    `stored` are their whole vectors where `index` holds codes only. `sizes` are the rows of each
    shard where there are several.
    """

    def __init__(
        self,
        index: faiss.Index,
        width: Search | None = None,
        stored: Stored | None = None,
        device: Device | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        self.index = index
        self.copy = device.copied(index) if device and searchable(index) else None
        self._store: Any = faiss.downcast_index(getattr(index, "storage", index))
        self.stored = stored
        self.width = width or Search()
        self.size = int(index.ntotal)
        self.dim = int(index.d)
        self.shards = max(1, len(sizes))
        self._ends = np.cumsum(sizes or [self.size])

    @classmethod
    def together(cls, finders: Sequence["Finder"]) -> "Finder | None":
        """The rows of all, numbered one after the other; None where their lists do not merge.

        They merge where all hold codes under the same centroids. FAISS moves them, so no code stays
        in memory twice, and each of `finders` answers no more.
        """
        stored = [one.stored for one in finders if one.stored is not None]
        width = finders[0].width
        if len(stored) < len(finders) or any(one.width != width for one in finders):
            return None
        index = merge_lists([one.index for one in finders])
        if index is None:
            return None
        for one in finders:
            # FAISS keeps the memory of a list that it has emptied.
            one.index = one._store = index
        give_back_memory()
        sizes = [one.size for one in finders]
        return cls(index, width, Stored.together(stored), sizes=sizes)

    def vectors(self, rows: Rows) -> Vectors:
        """The stored vectors of rows, [len(rows), D]."""
        if self.stored is not None:
            return self.stored.read(rows)
        return np.asarray(self._store.reconstruct_batch(rows), np.float32)

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
        what these queries ask of every shard with the same lists.
        Raises RuntimeError when the lists were merged with others' (`together`).
        """
        if self.index.ntotal != self.size:
            raise RuntimeError("the lists of this shard were merged with others: ask the group")
        width = width or self.width
        # A few more than k, since what is within rounding of the k-th is wanted too.
        fetch = k + 2 + k // 16
        if self.stored is not None:
            # As many as each shard would give: what recall was measured with.
            fetch = max(fetch, math.ceil(k * width.refine_factor)) * self.shards
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
        coded, flat = self.stored is not None, isinstance(self.index, faiss.IndexFlat)
        near = [] if kept.few or flat else self._neighbour_counts(fetch)
        for neighbours in near:
            if not len(left):
                break
            vectors = vectors_QD[left]
            wide = widening(self.index, width)
            answer = self._ask(neighbours, wide, vectors, neighbours)
            enough, scores, rows = kept_of(*answer, kept, fetch, k, whole=not coded)
            if self.stored is not None:
                scores, rows = self.stored.falling(vectors[enough], rows)
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

    def _neighbour_counts(self, fetch: int) -> list[int]:
        """As many as each shard would be asked for: all rows kept are more where shards are."""
        counts = neighbour_counts(math.ceil(fetch / self.shards), self.size // self.shards)
        return [count * self.shards for count in counts]

    def _all_kept(
        self, vectors_QD: Vectors, k: int, fetch: int, width: Search, kept: Kept
    ) -> tuple[Vectors, Rows]:
        """As `candidates`, by comparing all rows kept."""
        if not self._compares(kept):
            return self._among(vectors_QD, k, kept.rows)
        wanted = fetch
        if self.stored is not None:
            # Far from the query codes tell neighbours apart less well.
            most = min(fetch * _FAR, _FAR_MOST * self.shards)
            wanted = min(max(fetch, most), kept.count)
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
        if self.stored is not None:
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
        if self.stored is not None:
            return self.stored.falling(vectors_QD, rows_QF)
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
        for block in self._blocks(rows_N):
            index = faiss.IndexFlatIP(self.dim)
            index.add(self.vectors(block))
            scores_QF, places_QF = Finder(index).candidates(vectors_QD, k)
            found.append((scores_QF, np.where(places_QF < 0, -1, block[places_QF])))
        return joined(found)

    def _blocks(self, rows_N: Rows) -> Iterator[Rows]:
        """Rows in their order, of one shard at a time: only there do their numbers break ties."""
        for own in np.split(rows_N, np.searchsorted(rows_N, self._ends[:-1])):
            for start in range(0, len(own), _BLOCK):
                yield own[start : start + _BLOCK]

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

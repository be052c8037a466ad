"""Shards of one index in one process, asked as one.

What depends on the number of shards is done once for all of them. Lists of codes become one index:
FAISS takes as long over half a list as over a whole one where lists are short, and codes are in
memory anyhow. Of other inverted files, which stay mapped, the centroids are compared with the
queries once. Only what may be among the best of all shards is scored in float64 and looked up.

The ranking is that of each shard's own `search`, merged. Of codes it is that of one index that
scores as many candidates again as the shards together.

Shapes as in `retrieval/shard.py`; S shards. Rows are numbered through all shards, in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from bixse.records import Document, Hit
from bixse.retrieval.finder import Finder
from bixse.retrieval.lists import Scan, share_centroids
from bixse.retrieval.metadata import Kept, Remembered
from bixse.retrieval.scoring import Rows, Vectors, best, joined, near
from bixse.retrieval.settings import Search
from bixse.retrieval.shard import Ranking, Shard, checked, rankings_of


@dataclass(frozen=True)
class KeptOfShards:
    """The rows that meet a filter."""

    of_shards: tuple[Kept, ...]

    @cached_property
    def together(self) -> Kept:
        """Numbered through all shards."""
        return Kept.of(np.concatenate([kept.mask for kept in self.of_shards]))


class ShardGroup:
    """One shard or more; safe for one search at a time.

    It takes the shards: where they hold codes, only the group answers from then on.
    Raises ValueError for no shard at all, or for shards of different dimensions.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        if len({shard.dim for shard in shards}) != 1:
            raise ValueError("a group needs shards, of one dimension")
        self.shards = tuple(shards)
        sizes = [shard.size for shard in shards]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self.size, self.dim = sum(sizes), shards[0].dim
        finders = [shard.finder for shard in shards]
        self._together = Finder.together(finders) if len(finders) > 1 else None
        # A GPU compares the centroids anew sooner than they would come from here.
        self._one_scan = self._together is None and (
            all(one.width == finders[0].width and one.copy is None for one in finders)
            and share_centroids([one.index for one in finders])
        )
        self._kept: Remembered[KeptOfShards] = Remembered()

    def search(
        self,
        vectors_QD: Vectors,
        k: int,
        width: Search | None = None,
        kept: KeptOfShards | None = None,
    ) -> list[list[Hit]]:
        """As `Shard.search`, over all shards."""
        found = self.rankings(vectors_QD, [k] * len(vectors_QD), width, kept)
        return [list(map(Hit, one.doc_ids, one.scores, count(1))) for one in found]

    def rankings(
        self,
        vectors_QD: Vectors,
        ks: Sequence[int],
        width: Search | None = None,
        kept: KeptOfShards | None = None,
    ) -> list[Ranking]:
        """As `Shard.rankings`, over all shards."""
        k = max(ks, default=1)
        vectors = checked(vectors_QD, self.dim, k)
        rows_QC = self._candidates(vectors, k, width, kept)
        rows_QC, scores_QC = best(vectors, rows_QC, self.vectors, rows_QC.shape[1])
        self._by_doc_id(rows_QC, scores_QC, k)
        return rankings_of(rows_QC[:, :k], scores_QC[:, :k], ks, self.doc_ids)

    def merged(self, of_shards: Sequence[Sequence[Ranking]], ks: Sequence[int]) -> list[Ranking]:
        """What each shard found, by its own row numbers, as rankings over all of them."""
        found = []
        for k, of_query in zip(ks, zip(*of_shards, strict=True), strict=True):
            scored = sorted(
                (-score, doc_id, int(row + start))
                for one, start in zip(of_query, self._starts, strict=True)
                for row, doc_id, score in zip(one.rows, one.doc_ids, one.scores, strict=True)
            )[:k]
            rows = np.array([row for _, _, row in scored], np.int64)
            doc_ids = [doc_id for _, doc_id, _ in scored]
            found.append(Ranking(rows, doc_ids, [-negative for negative, _, _ in scored]))
        return found

    def kept(self, text: str) -> KeptOfShards:
        """The rows that meet a filter, as `Shard.kept`."""
        return self._kept.get(text, self._kept_of_shards)

    def doc_ids(self, rows: Rows) -> list[str]:
        found = np.empty(len(rows), object)
        for shard, places, own in self._by_shard(rows):
            found[places] = shard.doc_ids(own)
        return found.tolist()

    def documents(self, rows: Rows) -> list[Document]:
        """The stored fields of rows, and their metadata."""
        found = np.empty(len(rows), object)
        for shard, places, own in self._by_shard(rows):
            found[places] = shard.documents(own)
        return found.tolist()

    def vectors(self, rows: Rows) -> Vectors:
        """The stored vectors of rows, [len(rows), D]."""
        found = np.empty((len(rows), self.dim), np.float32)
        for shard, places, own in self._by_shard(rows):
            found[places] = shard.vectors(own)
        return found

    def _by_shard(self, rows: Rows) -> list[tuple[Shard, Rows, Rows]]:
        """Of each shard that is met, where its rows stand and their numbers in it."""
        home = np.searchsorted(self._starts, rows, side="right") - 1
        found = []
        for number, shard in enumerate(self.shards):
            places = np.flatnonzero(home == number)
            if len(places):
                found.append((shard, places, rows[places] - self._starts[number]))
        return found

    def _candidates(
        self, vectors_QD: Vectors, k: int, width: Search | None, kept: KeptOfShards | None
    ) -> Rows:
        """Rows [Q, C] that hold the best `k` of all shards."""
        if self._together is not None:
            own = None if kept is None else kept.together
            return near(*self._together.candidates(vectors_QD, k, width, own), k)
        scan = None
        # A filter widens each shard's search by what it keeps there.
        if self._one_scan and kept is None:
            first = self.shards[0].finder
            scan = Scan.begin(first.index, vectors_QD, width or first.width, k)
        found = []
        for number, shard in enumerate(self.shards):
            own = None if kept is None else kept.of_shards[number]
            scores_QF, rows_QF = shard.finder.candidates(vectors_QD, k, width, own, scan)
            found.append((scores_QF, np.where(rows_QF < 0, -1, rows_QF + self._starts[number])))
        return near(*joined(found), k)

    def _kept_of_shards(self, text: str) -> KeptOfShards:
        return KeptOfShards(tuple(shard.kept(text) for shard in self.shards))

    def _by_doc_id(self, rows_QC: Rows, scores_QC: Vectors, k: int) -> None:
        """Put rows of equal scores into the order of `doc_id`, for queries that have such.

        Row numbers do so within a shard, and know nothing of another.
        """
        if len(self.shards) == 1:
            return
        tied_QC = (scores_QC[:, 1:] == scores_QC[:, :-1]) & (rows_QC[:, 1:] >= 0)
        for query in np.flatnonzero(tied_QC[:, :k].any(axis=1)).tolist():
            (held,) = np.nonzero(rows_QC[query] >= 0)
            doc_ids, scores = self.doc_ids(rows_QC[query, held]), scores_QC[query, held].tolist()
            order = sorted(held.tolist(), key=lambda at: (-scores[at], doc_ids[at]))
            rows_QC[query, held] = rows_QC[query, order]

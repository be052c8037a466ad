"""One index shard, a deployment: vectors in, hits out.

Shapes: Q queries, D dimensions.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import numpy.typing as npt

from bixse.artifacts import Artifact, ArtifactError, Place
from bixse.records import Hit
from bixse.retrieval.shard import Shard
from serve.messages import Found, Vectors


def load_shard(url: str, fingerprint: str, name: str) -> Shard:
    """Read the shard `name` of an index, its files checked against the manifest first.

    Raises ArtifactError naming the file that is missing or damaged, or when the index at `url` is
    not the one with `fingerprint`.
    """
    index = Artifact.open(url, "index", verify=False)
    if index.fingerprint != fingerprint:
        raise ArtifactError(f"expected index {fingerprint} at {url}, found {index.fingerprint}")
    if not any(file.startswith(f"{name}/") for file in index.manifest.files):
        raise ArtifactError(f"{url} has no shard {name}")
    # Of a remote index this shard is copied; what is read is what must be right.
    directory = index.local_directory(under=f"{name}/")
    Artifact(Place(str(directory)), index.manifest).verify(under=f"{name}/")
    return Shard.load(directory / name)


class ShardServer:
    """A loaded shard. FAISS runs on one thread of its own, one search at a time."""

    def __init__(self, url: str, fingerprint: str, name: str, threads: int) -> None:
        """Raises ArtifactError as `load_shard`."""
        faiss.omp_set_num_threads(threads)
        self._shard = load_shard(url, fingerprint, name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._probe_1D = self._shard.vectors(np.zeros(1, np.int64))
        self._probe_hits = self._shard.search(self._probe_1D, 1)

    async def search(
        self, vectors_QD: Vectors, ks: Sequence[int], with_fields: Sequence[bool], budget_s: float
    ) -> list[Found]:
        """The best `ks[i]` of this shard for query `i`, with title and text if `with_fields[i]`.

        Raises TimeoutError when `budget_s` is over; a search not begun by then never begins.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(
                self._thread, self._search, vectors_QD, ks, with_fields
            )

    async def check_health(self) -> None:
        """Raises RuntimeError when a stored vector no longer finds what it found at the start."""
        loop = asyncio.get_running_loop()
        hits = await loop.run_in_executor(self._thread, self._shard.search, self._probe_1D, 1)
        if hits != self._probe_hits:
            raise RuntimeError("the shard no longer gives the answer that it gave when loaded")

    def _search(
        self, vectors_QD: Vectors, ks: Sequence[int], with_fields: Sequence[bool]
    ) -> list[Found]:
        # One FAISS call at the largest k: a smaller ranking is the head of a larger one.
        rows, scores = self._shard.search_rows(vectors_QD, max(ks))
        return [
            self._found(row[:k], score[:k], fields)
            for row, score, k, fields in zip(rows, scores, ks, with_fields, strict=True)
        ]

    def _found(self, rows: npt.NDArray[np.int64], scores: Vectors, fields: bool) -> Found:
        scored = zip(self._shard.doc_ids(rows), scores.tolist(), strict=True)
        hits = [Hit(doc_id, score, rank) for rank, (doc_id, score) in enumerate(scored, start=1)]
        return Found(hits, self._shard.documents(rows) if fields else None)

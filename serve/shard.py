"""Index shards: vectors in, hits out.

Shapes: Q queries, D dimensions.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from bixse.artifacts import Artifact, ArtifactError
from bixse.place import Place
from bixse.records import Hit
from bixse.retrieval.lexical_shard import LEXICAL_DIR, LEXICAL_FILE, LexicalShard
from bixse.retrieval.metadata import Kept
from bixse.retrieval.shard import Ranking, Shard
from serve.generation import Generation
from serve.ledger import Follower
from serve.messages import FoundInShard, NotHeld, Vectors, Wanted

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


def load_shard(url: str, fingerprint: str, name: str) -> tuple[Shard, LexicalShard | None]:
    """Read the shard `name` of an index, its files checked against the manifest first; and its
    lexical part, if it has one.

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
    shard, lexical = Shard.load(directory / name), None
    if f"{name}/{LEXICAL_DIR}/{LEXICAL_FILE}" in index.manifest.files:
        lexical = LexicalShard.load(directory / name / LEXICAL_DIR, shard)
    return shard, lexical


def slot_name(slot: int) -> str:
    """The deployment of a slot, named as the shard that it holds when each has its own."""
    return f"shard-{slot:05d}"


def slot_of(shards: Sequence[str], name: str, slots: int) -> int:
    """The slot that holds a shard: an index may have more or fewer shards than there are slots."""
    return sorted(shards).index(name) % slots


@dataclass(frozen=True, slots=True)
class _Loaded:
    shard: Shard
    lexical: LexicalShard | None
    probe_1D: Vectors
    probe_hits: list[list[Hit]]


class ShardStore:
    """Loaded shards of some generations. One search at a time, on `threads` threads of FAISS."""

    def __init__(self, threads: int, slot: int = 0, slots: int = 1) -> None:
        self._slot, self._slots = slot, slots
        self._shards: dict[int, dict[str, _Loaded]] = {}
        # OpenMP keeps its number of threads by thread: it must be set on the one that searches.
        self._thread = ThreadPoolExecutor(
            1, "shards", initializer=faiss.omp_set_num_threads, initargs=(threads,)
        )

    def load(self, generation: Generation) -> None:
        """Load the shards of this slot. Raises ArtifactError as `load_shard`."""
        index = generation.index
        names = [
            name
            for name in index.shard_rows
            if slot_of(list(index.shard_rows), name, self._slots) == self._slot
        ]
        loaded = {}
        for name in names:
            shard, lexical = load_shard(index.url, index.fingerprint, name)
            probe_1D = shard.vectors(np.zeros(1, np.int64))
            hits = self._thread.submit(shard.search, probe_1D, 1).result()
            loaded[name] = _Loaded(shard, lexical, probe_1D, hits)
        self._shards[generation.number] = loaded

    def drop(self, number: int) -> None:
        """Forget a generation."""
        self._shards.pop(number, None)

    async def search(
        self,
        number: int,
        name: str,
        vectors_QD: Vectors,
        wanted: Sequence[Wanted],
        budget_s: float,
    ) -> list[FoundInShard]:
        """The best of a shard for query `i`, as `wanted[i]` says.

        Raises TimeoutError when `budget_s` is over; a search not begun by then never begins. Raises
        NotHeld for a generation that is not loaded here.
        """
        held = self._held(number, name)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(self._thread, _search, held.shard, vectors_QD, wanted)

    async def search_words(
        self,
        number: int,
        name: str,
        queries: Sequence[str],
        wanted: Sequence[Wanted],
        budget_s: float,
    ) -> list[FoundInShard]:
        """As `search`, by the words of the queries."""
        held = self._held(number, name)
        if held.lexical is None:
            raise NotHeld(f"{name} of generation {number} holds no words")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(
                self._thread, _search_words, held.shard, held.lexical, queries, wanted
            )

    def _held(self, number: int, name: str) -> _Loaded:
        held = self._shards.get(number, {}).get(name)
        if held is None:
            raise NotHeld(f"{name} of generation {number} is not loaded here")
        return held

    async def check_health(self) -> None:
        """Raises RuntimeError when a stored vector no longer finds what it found when loaded."""
        loop = asyncio.get_running_loop()
        for held in [one for shards in self._shards.values() for one in shards.values()]:
            hits = await loop.run_in_executor(self._thread, held.shard.search, held.probe_1D, 1)
            if hits != held.probe_hits:
                raise RuntimeError("a shard no longer gives the answer that it gave when loaded")


class ShardServer:
    """One slot of shards, a deployment that follows the ledger."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self, ledger: "DeploymentHandle[Any]", slot: int, slots: int, threads: int
    ) -> None:
        """Raises ArtifactError as `load_shard`."""
        self._store = store = ShardStore(threads, slot, slots)

        async def load(generation: Generation) -> None:
            await asyncio.to_thread(store.load, generation)

        self._follower = Follower(ledger, slot_name(slot), load, store.drop)
        await self._follower.start()

    async def search(self, *ask: Any) -> list[FoundInShard]:
        """As `ShardStore.search`."""
        return await self._store.search(*ask)

    async def search_words(self, *ask: Any) -> list[FoundInShard]:
        """As `ShardStore.search_words`."""
        return await self._store.search_words(*ask)

    async def check_health(self) -> None:
        await self._store.check_health()


def _search(shard: Shard, vectors_QD: Vectors, wanted: Sequence[Wanted]) -> list[FoundInShard]:
    def rank(group: list[int], kept: Kept | None) -> list[Ranking]:
        ks = [wanted[i].k for i in group]
        return shard.rankings(vectors_QD[group], ks, kept=kept)

    return _found(shard, wanted, rank)


def _search_words(
    shard: Shard, lexical: LexicalShard, queries: Sequence[str], wanted: Sequence[Wanted]
) -> list[FoundInShard]:
    def rank(group: list[int], kept: Kept | None) -> list[Ranking]:
        ks = [wanted[i].k for i in group]
        return lexical.rankings([queries[i] for i in group], ks, shard, kept)

    return _found(shard, wanted, rank)


def _found(
    shard: Shard,
    wanted: Sequence[Wanted],
    rank: Callable[[list[int], Kept | None], list[Ranking]],
) -> list[FoundInShard]:
    """What `rank` finds for the queries of a batch, asked once for each filter among them."""
    groups: dict[str | None, list[int]] = {}
    for position, one in enumerate(wanted):
        groups.setdefault(one.filter, []).append(position)
    found: dict[int, Ranking] = {}
    for text, group in groups.items():
        kept = None if text is None else shard.kept(text)
        found |= zip(group, rank(group, kept), strict=True)
    return [
        FoundInShard(
            found[i].doc_ids,
            found[i].scores,
            shard.documents(found[i].rows) if one.with_fields else None,
            shard.vectors(found[i].rows) if one.with_vectors else None,
        )
        for i, one in enumerate(wanted)
    ]

"""Index shards: vectors in, hits out.

Shapes: Q queries, D dimensions.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.artifacts import Artifact, ArtifactError
from bixse.place import Place
from bixse.records import Hit
from bixse.retrieval.device import Device, find
from bixse.retrieval.group import KeptOfShards, ShardGroup
from bixse.retrieval.lexical_shard import LEXICAL_DIR, LEXICAL_FILE, LexicalShard
from bixse.retrieval.library import use_threads
from bixse.retrieval.shard import Ranking, Shard
from serve.generation import Generation
from serve.ledger import Follower
from serve.messages import FoundInSlot, NotHeld, Vectors, Wanted
from serve.reads import Reads

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


_logger = logging.getLogger("bixse")


def load_shard(
    url: str, fingerprint: str, name: str, device: Device | None = None
) -> tuple[Shard, LexicalShard | None]:
    """Read the shard `name` of an index, its files checked against the manifest first; and its
    lexical part, if it has one.

    Raises ArtifactError naming the file that is missing or damaged, or when the index at `url` is
    not the one with `fingerprint`; ValueError as `Shard.load`.
    """
    index = Artifact.open(url, "index", verify=False)
    if index.fingerprint != fingerprint:
        raise ArtifactError(f"expected index {fingerprint} at {url}, found {index.fingerprint}")
    if not any(file.startswith(f"{name}/") for file in index.manifest.files):
        raise ArtifactError(f"{url} has no shard {name}")
    # This shard of a remote index is copied first: the copy is what is read, and so is verified.
    directory = index.local_directory(under=f"{name}/")
    Artifact(Place(str(directory)), index.manifest).verify(under=f"{name}/")
    shard, lexical = Shard.load(directory / name, device), None
    if f"{name}/{LEXICAL_DIR}/{LEXICAL_FILE}" in index.manifest.files:
        lexical = LexicalShard.load(directory / name / LEXICAL_DIR, shard)
    return shard, lexical


def slot_name(slot: int) -> str:
    """The deployment of a slot, named as the shard that it holds when each has its own."""
    return f"shard-{slot:05d}"


def slot_of(shards: Sequence[str], name: str, slots: int) -> int:
    """The slot that holds a shard: an index may have more or fewer shards than there are slots."""
    return sorted(shards).index(name) % slots


def shards_by_slot(shards: Sequence[str], slots: int) -> dict[str, list[str]]:
    """The shards that each slot holds, without the slots that hold none."""
    held: dict[str, list[str]] = {}
    for name in sorted(shards):
        held.setdefault(slot_name(slot_of(shards, name, slots)), []).append(name)
    return held


@dataclass(frozen=True, slots=True)
class _Loaded:
    group: ShardGroup
    lexical: list[LexicalShard]
    """Of every shard or, where the index holds no words, of none."""
    probes: list[tuple[Vectors, list[list[Hit]]]]
    """A vector of each shard, and what it found when loaded."""


class ShardStore:
    """Loaded shards of some generations. One search at a time, on `threads` threads of FAISS."""

    def __init__(
        self, threads: int, slot: int = 0, slots: int = 1, *, on_gpu: bool = False
    ) -> None:
        self._slot, self._slots, self._on_gpu = slot_name(slot), slots, on_gpu
        self._held: dict[int, _Loaded] = {}
        self._reads = Reads()
        self._thread = ThreadPoolExecutor(1, "shards", initializer=use_threads, initargs=(threads,))

    def load(self, generation: Generation) -> None:
        """Load the shards of this slot; one that fails must be dropped as others are.

        Raises ArtifactError and ValueError as `load_shard`, and ValueError when FAISS sees no GPU
        that it should use.
        """
        index = generation.index
        names = shards_by_slot(list(index.shard_rows), self._slots).get(self._slot, [])
        if not names:
            return
        self._reads.begin(generation.number, index.fingerprint)
        # Of this generation alone: another is searched, or forgotten, on another thread meanwhile.
        device = _gpu() if self._on_gpu else None
        loaded = [load_shard(index.url, index.fingerprint, name, device) for name in names]
        stay = [
            name
            for name, (shard, _) in zip(names, loaded, strict=True)
            if shard.finder.copy is None
        ]
        if device is not None and stay:
            kind = type(loaded[0][0].finder.index).__name__
            _logger.warning("%s on the CPU: FAISS searches no %s on a GPU", ", ".join(stay), kind)
        lexical = [words for _, words in loaded if words is not None]
        group, probes = ShardGroup([shard for shard, _ in loaded]), []
        for shard in group.shards:
            probe_1D = shard.vectors(np.zeros(1, np.int64))
            probes.append((probe_1D, self._thread.submit(group.search, probe_1D, 1).result()))
        self._held[generation.number] = _Loaded(group, lexical, probes)

    def drop(self, number: int) -> None:
        """Forget a generation, and remove copies of its index that no other here and no other
        process uses, some time later.
        """
        self._held.pop(number, None)
        self._reads.end(number)

    async def search(
        self, number: int, vectors_QD: Vectors, wanted: Sequence[Wanted], budget_s: float
    ) -> list[FoundInSlot]:
        """The best of this slot's shards for query `i`, as `wanted[i]` says.

        Raises TimeoutError when `budget_s` is over; a search not begun by then never begins. Raises
        NotHeld for a generation that is not loaded here.
        """
        held = self._loaded(number)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(self._thread, _search, held.group, vectors_QD, wanted)

    async def search_words(
        self, number: int, queries: Sequence[str], wanted: Sequence[Wanted], budget_s: float
    ) -> list[FoundInSlot]:
        """As `search`, by the words of the queries."""
        held = self._loaded(number)
        if not held.lexical:
            raise NotHeld(f"generation {number} holds no words")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(budget_s):
            return await loop.run_in_executor(self._thread, _search_words, held, queries, wanted)

    def _loaded(self, number: int) -> _Loaded:
        held = self._held.get(number)
        if held is None:
            raise NotHeld(f"generation {number} is not loaded here")
        return held

    async def check_health(self) -> None:
        """Raises RuntimeError when a stored vector no longer finds what it found when loaded."""
        loop = asyncio.get_running_loop()
        for held in list(self._held.values()):
            for probe_1D, then in held.probes:
                if await loop.run_in_executor(self._thread, held.group.search, probe_1D, 1) != then:
                    raise RuntimeError(
                        "a shard no longer gives the answer that it gave when loaded"
                    )


class ShardServer:
    """One slot of shards, a deployment that follows the ledger."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self, ledger: "DeploymentHandle[Any]", slot: int, slots: int, threads: int, on_gpu: bool
    ) -> None:
        """Raises as `ShardStore.load`."""
        self._store = store = ShardStore(threads, slot, slots, on_gpu=on_gpu)

        async def load(generation: Generation) -> None:
            await asyncio.to_thread(store.load, generation)

        self._follower = Follower(ledger, slot_name(slot), load, store.drop)
        await self._follower.start()

    async def search(self, *ask: Any) -> list[FoundInSlot]:
        """As `ShardStore.search`."""
        return await self._store.search(*ask)

    async def search_words(self, *ask: Any) -> list[FoundInSlot]:
        """As `ShardStore.search_words`."""
        return await self._store.search_words(*ask)

    async def check_health(self) -> None:
        await self._store.check_health()


def _gpu() -> Device:
    device = find()
    if device is None:
        raise ValueError(
            "--shard-gpus asks for a GPU and FAISS sees none here: install faiss-gpu in place of "
            "faiss-cpu (pip install -e '.[gpu]'), or leave it out"
        )
    return device


def _search(group: ShardGroup, vectors_QD: Vectors, wanted: Sequence[Wanted]) -> list[FoundInSlot]:
    def rank(some: list[int], kept: KeptOfShards | None) -> list[Ranking]:
        ks = [wanted[i].k for i in some]
        return group.rankings(vectors_QD[some], ks, kept=kept)

    return _found(group, wanted, rank)


def _search_words(
    held: _Loaded, queries: Sequence[str], wanted: Sequence[Wanted]
) -> list[FoundInSlot]:
    def rank(some: list[int], kept: KeptOfShards | None) -> list[Ranking]:
        ks = [wanted[i].k for i in some]
        asked = [queries[i] for i in some]
        found = [
            lexical.rankings(asked, ks, shard, None if kept is None else kept.of_shards[number])
            for number, (lexical, shard) in enumerate(
                zip(held.lexical, held.group.shards, strict=True)
            )
        ]
        return held.group.merged(found, ks)

    return _found(held.group, wanted, rank)


def _found(
    group: ShardGroup,
    wanted: Sequence[Wanted],
    rank: Callable[[list[int], KeptOfShards | None], list[Ranking]],
) -> list[FoundInSlot]:
    """What `rank` finds for the queries of a batch, asked once for each filter among them."""
    by_filter: dict[str | None, list[int]] = {}
    for position, one in enumerate(wanted):
        by_filter.setdefault(one.filter, []).append(position)
    found: dict[int, Ranking] = {}
    for text, some in by_filter.items():
        kept = None if text is None else group.kept(text)
        found |= zip(some, rank(some, kept), strict=True)
    return [
        FoundInSlot(
            found[i].doc_ids,
            found[i].scores,
            group.documents(found[i].rows) if one.with_fields else None,
            group.vectors(found[i].rows) if one.with_vectors else None,
        )
        for i, one in enumerate(wanted)
    ]

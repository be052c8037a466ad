"""A replica that holds several shards of codes: FAISS merges their lists when they are loaded."""

import asyncio
from typing import Any

import numpy as np
import pytest

from bixse.models.settings import PACKAGED
from bixse.retrieval.filters import Filter
from bixse.retrieval.library import faiss
from bixse.retrieval.settings import Retrieval
from serve.generation import Generation
from serve.messages import Wanted
from serve.settings import ServedIndex
from serve.shard import ShardStore
from tests.serve.conftest import documents, index_of

# All lists, and every candidate scored again: what codes find is exact then.
WHOLE = {"nlist": 4, "pq_m": 192, "nprobe": 4, "refine_factor": 200}
SEEN = Filter.model_validate({"seen": True}).text


def generation(number: int, url: str) -> Generation:
    return Generation(number, ServedIndex.read(url), PACKAGED)


@pytest.mark.parametrize("structure", ["ivf_pq", "ivf_rabitq"])
def test_answers_are_those_of_whole_vectors(structure, index, vectors, encoder, tmp_path):
    settings = Retrieval.model_validate({"structure": structure, **WHOLE})
    coded = index_of(
        tmp_path / "coded", documents(), vectors, encoder.fingerprint, 3, settings=settings
    )
    store = ShardStore(1)
    for number, url in ((1, index.url), (2, coded.url), (3, coded.url)):
        store.load(generation(number, url))
    store.drop(2)
    wanted = [Wanted(10, True), Wanted(3, False), Wanted(20, True, filter=SEEN)]

    async def found(number):
        await store.check_health()
        return await store.search(number, vectors[[0, 50, 199]], wanted, 60)

    assert asyncio.run(found(3)) == asyncio.run(found(1))


def test_codes_that_changed_in_memory_are_no_answer(vectors, encoder, tmp_path):
    settings = Retrieval.model_validate({"structure": "ivf_pq", **WHOLE, "refine_factor": 1})
    coded = index_of(
        tmp_path / "coded", documents(), vectors, encoder.fingerprint, 3, settings=settings
    )
    store = ShardStore(1)
    store.load(generation(1, coded.url))
    asyncio.run(store.check_health())
    index: Any = store._held[1].group.shards[0].finder.index
    lists: Any = faiss.downcast_InvertedLists(index.invlists)
    for number in range(4):
        codes = faiss.rev_swig_ptr(lists.get_codes(number), lists.block_size)
        codes[:] = np.random.default_rng(number).integers(256, size=len(codes))
    with pytest.raises(RuntimeError, match="no longer gives the answer"):
        asyncio.run(store.check_health())

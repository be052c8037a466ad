"""Shards asked together answer as each does alone and merged, whatever the structure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bixse.records import Metadata
from bixse.retrieval.building import build_shard
from bixse.retrieval.filters import Filter
from bixse.retrieval.group import ShardGroup
from bixse.retrieval.library import faiss
from bixse.retrieval.merge import merge
from bixse.retrieval.settings import Retrieval, Search, Structure
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import Counter, resolve, share_centroids, trained
from tests.retrieval.made import clustered, table

DIM = 32
SETTINGS = {
    "exact": Retrieval(structure="exact"),
    "hnsw": Retrieval(structure="hnsw", ef_search=24),
    "ivf_flat": Retrieval(structure="ivf_flat", nlist=32, nprobe=4),
    "ivf_pq": Retrieval(structure="ivf_pq", nlist=32, nprobe=4, pq_m=16),
    "ivf_rabitq": Retrieval(structure="ivf_rabitq", nlist=32, nprobe=4, stored="int8"),
}


def made(rows: int = 2400) -> tuple[list[str], np.ndarray]:
    """Documents whose order is not that of their rows, a hundred of them the same vector."""
    vectors = clustered(rows, DIM, seed=5)
    vectors[rows // 2 : rows // 2 + 100] = vectors[0]
    return [f"d{n:05d}" for n in np.random.default_rng(6).permutation(rows)], vectors


def shards(
    folder: Path,
    settings: Retrieval,
    doc_ids: list[str],
    vectors: np.ndarray,
    count: int,
    metadata: dict[str, Metadata] | None = None,
) -> list[Shard]:
    settings = resolve(settings, *vectors.shape)
    template = trained(settings, vectors)
    found = []
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        ids, own = doc_ids[number::count], vectors[number::count]
        kinds = {"colour": "text"} if metadata else None
        copy = faiss.clone_index(template)
        build_shard(place, table(ids), own, settings, copy, metadata, kinds)  # type: ignore[arg-type]
        found.append(Shard.load(place))
    return found


@pytest.mark.parametrize("structure", SETTINGS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 10, 150])
def test_together_is_each_alone_and_merged(
    structure: Structure, count: int, k: int, tmp_path: Path
) -> None:
    doc_ids, vectors = made()
    each = shards(tmp_path, SETTINGS[structure], doc_ids, vectors, count)
    queries = np.concatenate([vectors[:3], clustered(30, DIM, seed=8)])
    alone = [shard.search(queries, k) for shard in each]
    expected = [merge(of_query, k) for of_query in zip(*alone, strict=True)]
    group = ShardGroup(each)
    assert group.search(queries, k) == expected
    one_by_one = [group.search(query[None], k)[0] for query in queries]
    assert one_by_one == expected, "does not depend on the batch"
    wide = Search(ef_search=60, nprobe=9, refine_factor=7)
    alone = [shard.search(queries, k, wide) for shard in each]
    assert group.search(queries, k, wide) == [merge(q, k) for q in zip(*alone, strict=True)]


@pytest.mark.parametrize("structure", SETTINGS)
def test_with_a_filter(structure: Structure, tmp_path: Path, monkeypatch: object) -> None:
    doc_ids, vectors = made()
    colours: dict[str, Metadata] = {
        doc_id: {"colour": "red" if n % 3 else "blue"} for n, doc_id in enumerate(doc_ids)
    }
    each = shards(tmp_path, SETTINGS[structure], doc_ids, vectors, 3, colours)
    red = Filter.of('{"colour": "red"}').text
    queries = np.concatenate([vectors[:2], clustered(9, DIM, seed=8)])
    alone = [shard.search(queries, 10, kept=shard.kept(red)) for shard in each]
    group = ShardGroup(each)
    found = group.search(queries, 10, kept=group.kept(red))
    assert found == [merge(of_query, 10) for of_query in zip(*alone, strict=True)]


def test_a_k_for_each_query_and_fields_of_rows(tmp_path: Path) -> None:
    doc_ids, vectors = made()
    group = ShardGroup(shards(tmp_path, SETTINGS["exact"], doc_ids, vectors, 3))
    ks: Sequence[int] = [3, 170, 1]
    for found, k, query in zip(group.rankings(vectors[:3], ks), ks, vectors, strict=False):
        assert len(found.doc_ids) == len(found.scores) == k
        assert found.doc_ids == [hit.doc_id for hit in group.search(query[None], k)[0]]
        assert group.doc_ids(found.rows) == found.doc_ids
        assert [one.doc_id for one in group.documents(found.rows)] == found.doc_ids
        by_id = dict(zip(doc_ids, vectors, strict=True))
        assert (group.vectors(found.rows) == [by_id[one] for one in found.doc_ids]).all()


@pytest.mark.parametrize("structure", ["ivf_flat", "ivf_pq", "ivf_rabitq"])
def test_centroids_are_shared_only_where_they_are_the_same(
    structure: Structure, tmp_path: Path
) -> None:
    doc_ids, vectors = made()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, two = shards(tmp_path / "one", SETTINGS[structure], doc_ids, vectors, 2)
    other, _ = shards(tmp_path / "other", SETTINGS[structure], doc_ids, vectors[::-1].copy(), 2)
    assert share_centroids([one.index, two.index])
    assert not share_centroids([one.index, other.index])
    queries = clustered(9, DIM, seed=8)
    alone = [shard.search(queries, 10) for shard in (one, other)]
    found = ShardGroup([one, other]).search(queries, 10)
    assert found == [merge(of_query, 10) for of_query in zip(*alone, strict=True)]


def test_what_has_no_lists_shares_none(tmp_path: Path) -> None:
    each = shards(tmp_path, SETTINGS["hnsw"], *made(), 2)
    assert not share_centroids([shard.index for shard in each])


def test_lists_are_scanned_once_a_shard(tmp_path: Path) -> None:
    """As many vectors are compared as by each shard alone: sharing skips no list."""
    each = shards(tmp_path, SETTINGS["ivf_flat"], *made(), 3)
    queries = clustered(9, DIM, seed=8)
    counter = Counter()
    for shard in each:
        shard.search(queries, 10)
    alone, counter = counter.distances(), Counter()
    ShardGroup(each).search(queries, 10)
    assert counter.distances() == alone > 0


def test_a_group_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs shards"):
        ShardGroup([])
    group = ShardGroup(shards(tmp_path, SETTINGS["exact"], *made(40), 2))
    with pytest.raises(ValueError, match="expected vectors"):
        group.search(np.ones((1, 3), np.float32), 1)
    assert group.search(np.zeros((0, DIM), np.float32), 3) == []

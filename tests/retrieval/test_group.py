"""Shards asked together answer as each does alone and merged, whatever the structure."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bixse.records import Hit, Metadata
from bixse.retrieval import finder, metadata, neighbours
from bixse.retrieval.building import build_shard
from bixse.retrieval.filters import Filter
from bixse.retrieval.finder import Finder
from bixse.retrieval.group import ShardGroup
from bixse.retrieval.library import faiss
from bixse.retrieval.lists import share_centroids
from bixse.retrieval.merge import merge
from bixse.retrieval.metadata import Kept
from bixse.retrieval.settings import Retrieval, Search, Structure
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import Counter, resolve, trained
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


def alone_and_merged(
    each: list[Shard],
    queries: np.ndarray,
    k: int,
    width: Search | None = None,
    kept: str | None = None,
) -> list[list[Hit]]:
    found = [
        shard.search(queries, k, width, None if kept is None else shard.kept(kept))
        for shard in each
    ]
    return [merge(of_query, k) for of_query in zip(*found, strict=True)]


@pytest.mark.parametrize("structure", ["exact", "hnsw", "ivf_flat"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 10, 150])
def test_together_is_each_alone_and_merged(
    structure: Structure, count: int, k: int, tmp_path: Path
) -> None:
    doc_ids, vectors = made()
    each = shards(tmp_path, SETTINGS[structure], doc_ids, vectors, count)
    queries = np.concatenate([vectors[:3], clustered(30, DIM, seed=8)])
    group = ShardGroup(each)
    expected = alone_and_merged(each, queries, k)
    assert group.search(queries, k) == expected
    one_by_one = [group.search(query[None], k)[0] for query in queries]
    assert one_by_one == expected, "does not depend on the batch"
    wide = Search(ef_search=60, nprobe=9, refine_factor=7)
    assert group.search(queries, k, wide) == alone_and_merged(each, queries, k, wide)


@pytest.mark.parametrize("structure", ["exact", "hnsw", "ivf_flat"])
def test_with_a_filter(structure: Structure, tmp_path: Path) -> None:
    doc_ids, vectors = made()
    colours: dict[str, Metadata] = {
        doc_id: {"colour": "red" if n % 3 else "blue"} for n, doc_id in enumerate(doc_ids)
    }
    each = shards(tmp_path, SETTINGS[structure], doc_ids, vectors, 3, colours)
    red = Filter.of('{"colour": "red"}').text
    queries = np.concatenate([vectors[:2], clustered(9, DIM, seed=8)])
    group = ShardGroup(each)
    found = group.search(queries, 10, kept=group.kept(red))
    assert found == alone_and_merged(each, queries, 10, kept=red)


def test_a_k_for_each_query_and_fields_of_rows(tmp_path: Path) -> None:
    doc_ids, vectors = made()
    group = ShardGroup(shards(tmp_path, SETTINGS["exact"], doc_ids, vectors, 3))
    ks: Sequence[int] = [3, 170, 1]
    queries = vectors[:3]
    for found, k, query in zip(group.rankings(queries, ks), ks, queries, strict=True):
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
    assert share_centroids([one.finder.index, two.finder.index])
    assert not share_centroids([one.finder.index, other.finder.index])
    queries = clustered(9, DIM, seed=8)
    found = ShardGroup([one, other]).search(queries, 10)
    assert found == alone_and_merged([one, other], queries, 10)


def test_what_has_no_lists_shares_none(tmp_path: Path) -> None:
    each = shards(tmp_path, SETTINGS["hnsw"], *made(), 2)
    assert not share_centroids([shard.finder.index for shard in each])


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


CODES = ["ivf_pq", "ivf_rabitq"]


def as_one(width: Search, count: int) -> Search:
    """One index that scores as many candidates again as so many shards."""
    return width.replace(refine_factor=width.refine_factor * count)


@pytest.mark.parametrize("structure", CODES)
@pytest.mark.parametrize("stored", ["float32", "int8"])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("k", [1, 10, 150])
def test_codes_of_several_shards_are_asked_as_one_index(
    structure: Structure, stored: str, count: int, k: int, tmp_path: Path
) -> None:
    """Hits, scores and the order of equal ones are those of an index that was never cut, but where
    codes of two rows are equally far and only one of them may be scored again."""
    doc_ids, vectors = made()
    settings = SETTINGS[structure].replace(stored=stored)
    for name in ("one", "cut"):
        (tmp_path / name).mkdir()
    (one,) = shards(tmp_path / "one", settings, doc_ids, vectors, 1)
    group = ShardGroup(shards(tmp_path / "cut", settings, doc_ids, vectors, count))
    queries = clustered(100, DIM, seed=8)
    narrow = Search(nprobe=4, refine_factor=4)
    expected = one.search(queries, k, as_one(narrow, count))
    found = group.search(queries, k, narrow)
    assert sum(map(operator.eq, found, expected)) >= 95
    assert [group.search(query[None], k, narrow)[0] for query in queries] == found
    all_lists = Search(nprobe=32, refine_factor=2400)
    assert group.search(vectors[:3], k, all_lists) == one.search(vectors[:3], k, all_lists)


@pytest.mark.parametrize("structure", CODES)
@pytest.mark.parametrize("few", [50, 20_000])
def test_codes_of_several_shards_with_a_filter(
    structure: Structure, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether neighbours suffice, all kept rows are asked of codes, or are compared exactly."""
    # With 50, each colour goes another way; with 20,000, as it is, all are compared.
    monkeypatch.setattr(metadata, "FEW", few)
    doc_ids, vectors = made()
    colours: dict[str, Metadata] = {
        doc_id: {"colour": "red" if n % 3 else "blue" if n % 30 else "green"}
        for n, doc_id in enumerate(doc_ids)
    }
    for name in ("one", "cut"):
        (tmp_path / name).mkdir()
    (one,) = shards(tmp_path / "one", SETTINGS[structure], doc_ids, vectors, 1, colours)
    group = ShardGroup(shards(tmp_path / "cut", SETTINGS[structure], doc_ids, vectors, 3, colours))
    queries, narrow = clustered(40, DIM, seed=8), Search(nprobe=4, refine_factor=4)
    for colour in ("red", "blue", "green"):
        kept = Filter.model_validate({"colour": colour}).text
        found = group.search(queries, 10, narrow, group.kept(kept))
        expected = one.search(queries, 10, as_one(narrow, 3), one.kept(kept))
        assert sum(map(operator.eq, found, expected)) >= 38
        documents = group.documents(
            group.rankings(queries[:1], [10], narrow, group.kept(kept))[0].rows
        )
        assert {(document.metadata or {})["colour"] for document in documents} == {colour}


@pytest.mark.parametrize("structure", CODES)
def test_equal_scores_among_few_kept_rows_are_in_the_order_of_doc_id(
    structure: Structure, tmp_path: Path
) -> None:
    """More of them than are wanted, of several shards, between which row numbers say nothing."""
    doc_ids, vectors = made()
    colours: dict[str, Metadata] = {doc_id: {"colour": "blue"} for doc_id in doc_ids}
    each = shards(tmp_path, SETTINGS[structure], doc_ids, vectors, 5, colours)
    blue = Filter.of('{"colour": "blue"}').text
    expected = alone_and_merged(each, vectors[:1], 10, kept=blue)
    assert len({hit.score for hit in expected[0]}) == 1
    group = ShardGroup(each)
    assert group.search(vectors[:1], 10, kept=group.kept(blue)) == expected


@pytest.mark.parametrize("structure", CODES)
def test_a_broad_filter_asks_for_neighbours_however_many_shards(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each shard finds among its neighbours, the group does not look for in all lists."""
    # Real limits are beyond what a test can build: 20,000 rows, and 4,096 neighbours.
    monkeypatch.setattr(metadata, "FEW", 50)
    monkeypatch.setattr(neighbours, "_MOST", 128)
    doc_ids, vectors = made()
    colours: dict[str, Metadata] = {
        doc_id: {"colour": "blue" if n % 10 else "red"} for n, doc_id in enumerate(doc_ids)
    }
    group = ShardGroup(shards(tmp_path, SETTINGS[structure], doc_ids, vectors, 5, colours))
    blue, queries = group.kept(Filter.of('{"colour": "blue"}').text), clustered(20, DIM, seed=8)
    counter = Counter()
    found = group.search(queries, 2, Search(nprobe=4, refine_factor=4, list_rows=1000), blue)
    assert all(len(hits) == 2 for hits in found)
    assert counter.distances() < len(queries) * len(doc_ids) / 2


@pytest.mark.parametrize("structure", CODES)
def test_of_all_kept_rows_as_many_are_scored_again_as_by_the_shards(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No neighbours, so that every row kept is asked of codes, and a limit that all shards reach.
    monkeypatch.setattr(metadata, "FEW", 50)
    monkeypatch.setattr(neighbours, "_MOST", 0)
    monkeypatch.setattr(finder, "_FAR_MOST", 40)
    doc_ids, vectors = made()
    colours: dict[str, Metadata] = {doc_id: {"colour": "blue"} for doc_id in doc_ids}
    each = shards(tmp_path, SETTINGS[structure], doc_ids, vectors, 5, colours)
    blue, queries = Filter.of('{"colour": "blue"}').text, clustered(3, DIM, seed=8)
    width = Search(nprobe=4, refine_factor=8)

    def scored(finder: Finder, kept: Kept) -> int:
        return finder.candidates(queries, 1, width, kept)[1].shape[1]

    alone = [scored(shard.finder, shard.kept(blue)) for shard in each]
    assert alone == [40] * 5
    group = ShardGroup(each)
    assert group._together is not None
    assert scored(group._together, group.kept(blue).together) == sum(alone)


@pytest.mark.parametrize("structure", CODES)
def test_a_shard_whose_codes_are_the_groups_answers_no_more(
    structure: Structure, tmp_path: Path
) -> None:
    """FAISS leaves its lists empty or full of other rows: an answer would be wrong."""
    each = shards(tmp_path, SETTINGS[structure], *made(), 3)
    group, queries = ShardGroup(each), clustered(2, DIM, seed=8)
    for shard in each:
        with pytest.raises(RuntimeError, match="ask the group"):
            shard.search(queries, 10)
    assert all(len(found) == 10 for found in group.search(queries, 10))


def test_product_codes_of_another_codebook_are_not_merged(tmp_path: Path) -> None:
    """Under the same centroids the same code may stand for another vector."""
    doc_ids, vectors = made()
    one, other = shards(tmp_path, SETTINGS["ivf_pq"], doc_ids, vectors, 2)
    lists: Any = other.finder.index
    codebook = lists.pq.centroids
    faiss.copy_array_to_vector(faiss.vector_to_array(codebook)[::-1].copy(), codebook)
    queries = clustered(9, DIM, seed=8)
    found = ShardGroup([one, other]).search(queries, 10)
    assert found == alone_and_merged([one, other], queries, 10)

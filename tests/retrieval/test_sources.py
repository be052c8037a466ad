"""What a shard gathers: in order, accounted for, and equal to an index built from nothing."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import bixse.retrieval.sources as sources
from bixse.artifacts import Artifact
from bixse.place import Place
from bixse.records import Kind, Metadata
from bixse.retrieval.building import write_vectors
from bixse.retrieval.settings import Retrieval
from bixse.retrieval.shard import INDEX_FILE, Shard
from bixse.retrieval.sources import (
    Source,
    exact_hits,
    gather,
    sample,
    shard_name,
    shard_of,
)
from bixse.retrieval.structures import empty
from tests.artifacts import drafted
from tests.retrieval.made import artefacts, clustered

DIM, SHARDS = 8, 3
VECTORS = clustered(2500, DIM, seed=6)
DOC_IDS = [f"d{n:05d}" for n in np.random.default_rng(8).permutation(2500)]


def index_of(place: Path, source: Source, shards: int = SHARDS) -> tuple[Artifact, list[int]]:
    """The shards of an exact index, as `jobs.index` makes them but without Ray."""
    draft = drafted(place / "index", "index")
    counts = np.zeros(3, int)
    for number in range(shards):
        folder = Path(draft.place.path(shard_name(number)))
        aside = place / f"aside-{number}"
        folder.mkdir()
        aside.mkdir()
        gathered = gather(source, number, shards, DIM, aside)
        write_vectors(folder, gathered.vectors_ND, exact(), empty(exact(), DIM))
        for path in aside.glob("*.arrow"):
            path.rename(folder / path.name)
        counts += [gathered.added, gathered.replaced, gathered.deleted]
    return draft.finish(rows=0, extra={"metadata": source.kinds()}), counts.tolist()


def exact() -> Retrieval:
    return Retrieval(structure="exact")


def files(index: Artifact) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in index.manifest.files.items()}


def source_of(
    place: Path,
    rows: Sequence[int],
    vectors: np.ndarray = VECTORS,
    metadata: dict[str, Metadata] | None = None,
    kinds: dict[str, Kind] | None = None,
) -> Source:
    place.mkdir()
    ids = [DOC_IDS[row] for row in rows]
    return Source(*artefacts(place, ids, vectors[list(rows)], metadata=metadata, kinds=kinds))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("base")
    index, counts = index_of(place, source_of(place / "from", range(2000)))
    assert counts == [2000, 0, 0]
    return index


def test_rows_stand_in_the_order_of_doc_id(base: Artifact) -> None:
    seen = []
    for number in range(SHARDS):
        shard = Shard.load(base.local_directory() / shard_name(number))
        ids = shard.doc_ids(np.arange(shard.size))
        assert ids == sorted(ids)
        assert {shard_of(doc_id, SHARDS) for doc_id in ids} == {number}
        row_of = {doc_id: row for row, doc_id in enumerate(DOC_IDS)}
        assert np.array_equal(
            shard.vectors(np.arange(shard.size)), VECTORS[[row_of[doc_id] for doc_id in ids]]
        )
        documents = shard.documents(np.array([0, shard.size - 1]))
        assert [d.text for d in documents] == [f"text of {d.doc_id}" for d in documents]
        seen += ids
    assert sorted(seen) == sorted(DOC_IDS[:2000])


def test_a_generation_equals_an_index_built_from_nothing(tmp_path: Path, base: Artifact) -> None:
    """Adds, replacements and deletes: the files of every shard are equal, byte by byte."""
    before = hashlib.sha256(json.dumps(files(base)).encode()).hexdigest()
    changed = VECTORS.copy()
    changed[1900:2000] = VECTORS[100:200]
    new = source_of(tmp_path / "new", range(1900, 2500), changed)
    gone = frozenset(DOC_IDS[:50])
    update = Source(new.embeddings, new.corpus, base, gone)
    (tmp_path / "g").mkdir()
    generation, counts = index_of(tmp_path / "g", update)
    assert counts == [500, 100, 50]
    (tmp_path / "s").mkdir()
    scratch, _ = index_of(tmp_path / "s", source_of(tmp_path / "all", range(50, 2500), changed))
    assert files(generation) == files(scratch)
    again = {name: base.place.entry(name).sha256 for name in files(base)}
    assert hashlib.sha256(json.dumps(again).encode()).hexdigest() == before


@pytest.mark.parametrize("at_once", [2, 512])
def test_what_is_scattered_makes_the_same_shards_and_is_read_once(
    at_once: int, tmp_path: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = source_of(tmp_path / "new", range(1900, 2500))
    update = Source(new.embeddings, new.corpus, base, frozenset(DOC_IDS[:50]))
    (tmp_path / "direct").mkdir()
    direct, counts = index_of(tmp_path / "direct", update)
    place = Place(str(tmp_path / "scattered"))
    monkeypatch.setattr(sources, "_OPEN", at_once)
    inputs: tuple[sources.Input, ...] = ("embeddings", "corpus")
    for which in inputs:
        artifact = new.input(which)
        assert artifact is not None
        for number, part in enumerate(artifact.parts()):
            sources.scatter(update, which, [part], str(number), SHARDS, place)

    def read(*_: object) -> None:
        raise AssertionError("a shard reads all rows")

    monkeypatch.setattr(Artifact, "batches", read)
    (tmp_path / "again").mkdir()
    again, counted = index_of(tmp_path / "again", replace(update, scattered=place))
    assert files(again) == files(direct)
    assert counted == counts == [500, 100, 50]


def test_metadata_grows_with_the_documents(tmp_path: Path) -> None:
    """What stays keeps its own, what is replaced has the new one or none: byte by byte."""
    old: dict[str, Metadata] = {
        DOC_IDS[n]: {"price": n % 7, "tags": [f"t{n % 3}"]} for n in range(0, 300, 2)
    }
    new: dict[str, Metadata] = {
        DOC_IDS[n]: {"price": n / 2, "brand": f"b{n % 5}"} for n in range(250, 400, 3)
    }
    kinds: dict[str, Kind] = {"price": "number", "tags": "texts"}
    more: dict[str, Kind] = {"brand": "text", "price": "number"}
    places = [tmp_path / name for name in ("base", "g", "s")]
    for place in places:
        place.mkdir()
    base, _ = index_of(places[0], source_of(tmp_path / "a", range(300), VECTORS, old, kinds))
    update = source_of(tmp_path / "b", range(250, 400), VECTORS, new, more)
    source = Source(update.embeddings, update.corpus, base, frozenset(DOC_IDS[:20]))
    generation, counts = index_of(places[1], source)
    assert counts == [100, 50, 20]
    replaced = set(DOC_IDS[250:400])
    expected = {d: own for d, own in old.items() if d not in replaced} | new
    everything = source_of(tmp_path / "c", range(20, 400), VECTORS, expected, {**kinds, **more})
    scratch, _ = index_of(places[2], everything)
    assert files(generation) == files(scratch)
    assert "shard-00000/metadata.arrow" in files(generation)
    for number in range(SHARDS):
        shard = Shard.load(generation.local_directory() / shard_name(number))
        for document in shard.documents(np.arange(shard.size)):
            assert document.metadata == expected.get(document.doc_id)


def test_a_field_that_changes_its_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    number: dict[str, Metadata] = {DOC_IDS[0]: {"price": 1}}
    text: dict[str, Metadata] = {DOC_IDS[0]: {"price": "1"}}
    first = source_of(tmp_path / "a", range(5), VECTORS, number, {"price": "number"})
    base, _ = index_of(tmp_path / "i", first)
    second = source_of(tmp_path / "b", range(5), VECTORS, text, {"price": "text"})
    source = Source(second.embeddings, second.corpus, base)
    with pytest.raises(ValueError, match="price is number in the base index and text in the corp"):
        gather(source, 0, SHARDS, DIM, tmp_path)


def test_only_deletes(tmp_path: Path, base: Artifact) -> None:
    source = Source(None, None, base, frozenset(DOC_IDS[1000:2000]))
    generation, counts = index_of(tmp_path, source)
    assert counts == [0, 0, 1000]
    (tmp_path / "s").mkdir()
    scratch, _ = index_of(tmp_path / "s", source_of(tmp_path / "half", range(1000)))
    assert files(generation) == files(scratch)


def test_a_base_that_was_damaged_is_refused(tmp_path: Path, base: Artifact) -> None:
    name = f"{shard_name(1)}/{INDEX_FILE}"
    path = base.local_directory() / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=f"{name} differs from its manifest"):
            gather(Source(None, None, base), 1, SHARDS, DIM, tmp_path)
    finally:
        path.write_bytes(data)


def test_deletes_that_make_no_sense_are_refused(tmp_path: Path, base: Artifact) -> None:
    unknown = Source(None, None, base, frozenset(["nobody"]))
    with pytest.raises(ValueError, match="'nobody' is to be deleted and is not in the base index"):
        gather(unknown, shard_of("nobody", SHARDS), SHARDS, DIM, tmp_path)
    new, doc_id = source_of(tmp_path / "new", range(5)), DOC_IDS[2]
    both = Source(new.embeddings, new.corpus, base, frozenset([doc_id]))
    with pytest.raises(ValueError, match=f"{doc_id!r} is to be deleted and is in the corpus too"):
        gather(both, shard_of(doc_id, SHARDS), SHARDS, DIM, tmp_path)


def test_embeddings_of_other_documents_are_refused(tmp_path: Path) -> None:
    one, other = source_of(tmp_path / "a", range(20)), source_of(tmp_path / "b", range(1, 21))
    with pytest.raises(ValueError, match="hold different documents"):
        gather(Source(one.embeddings, other.corpus), 0, 1, DIM, tmp_path)
    twice = source_of(tmp_path / "twice", [3, 4, 3])
    with pytest.raises(ValueError, match="a doc_id stands twice"):
        gather(twice, 0, 1, DIM, tmp_path)


def test_the_truth_compares_all(tmp_path: Path) -> None:
    gathered = gather(source_of(tmp_path / "a", range(2500)), 0, 1, DIM, tmp_path)
    queries = clustered(20, DIM, seed=9)
    for query, hits in zip(queries, exact_hits(gathered, queries, 10), strict=True):
        scores = (VECTORS.astype(np.float64) * query.astype(np.float64)).sum(1).astype(np.float32)
        order = sorted(range(2500), key=lambda row: (-scores[row], DOC_IDS[row]))[:10]
        assert [hit.doc_id for hit in hits] == [DOC_IDS[row] for row in order]


def test_the_sample_is_the_same_whatever_the_parts(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    small, _ = artefacts(places[0], DOC_IDS, VECTORS, part=13)
    order = np.random.default_rng(1).permutation(2500)
    large, _ = artefacts(places[1], [DOC_IDS[n] for n in order], VECTORS[order], part=2500)
    ids, vectors = sample(small, 100, "train")
    assert (ids, vectors.tolist()) == (lambda s: (s[0], s[1].tolist()))(sample(large, 100, "train"))
    assert len(set(ids)) == 100
    assert len(set(ids) & set(sample(small, 100, "tune")[0])) < 20
    assert pa.array(vectors.ravel()).null_count == 0
    assert len(sample(small, 9999, "train")[0]) == 2500

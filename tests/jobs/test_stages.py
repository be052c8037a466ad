"""pair, embed and index on Ray: known answers, sharded equals whole, refusals.

In one file, for the embeddings that two of them read are made once.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs.index as index_module
import jobs.pair as pair_module
from bixse.artifacts import Artifact, ArtifactError, Draft, begin
from bixse.candidates.settings import Pools
from bixse.models.encoder import Encoder
from bixse.place import Place
from bixse.records import Hit, document_text
from bixse.retrieval.exact import search_exact, vectors_of
from bixse.retrieval.filters import Filter
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.lexical_shard import LexicalShard
from bixse.retrieval.merge import merge, ranked
from bixse.retrieval.settings import Lexical, Retrieval
from bixse.retrieval.shard import Shard
from bixse.retrieval.sources import shard_of
from jobs.embed import embed
from jobs.index import index, task_options
from jobs.ingest import Ingested, ingest
from jobs.pair import pair
from jobs.recipe import Ingest, Placement
from jobs.texts import DocumentTexts
from tests.encoders import save_tiny_encoder

PLACEMENT = Placement()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def data(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    """Every other document has metadata."""
    place = tmp_path_factory.mktemp("described")
    shutil.copytree(beir, place / "beir")
    corpus = place / "beir" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, row in enumerate(rows[::2]):
        row["metadata"] = {"number": number}
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ingest(
        str(place / "beir"), Ingest(part_rows=1300, metadata=("number",)), str(place / "ingested")
    )


@pytest.fixture(scope="module")
def embeddings(data: Ingested, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return embed(data.corpus, encoder, PLACEMENT, str(tmp_path_factory.mktemp("e") / "embeddings"))


def test_embeddings_are_the_encoders_vectors_in_corpus_order(
    data: Ingested, encoder: str, embeddings: Artifact
) -> None:
    rows = data.corpus.table()
    assert len(embeddings.parts()) == 5  # 1,024 + 276, 1,024 + 276, 400
    table = embeddings.table()
    assert table["doc_id"].to_pylist() == rows["doc_id"].to_pylist()
    texts = [document_text("", text) for text in rows["text"].to_pylist()[:50]]
    wanted = Encoder.load(encoder).encode(texts, "document")
    assert np.abs(vectors_of(table)[:50] - wanted).max() < 1e-5
    assert embeddings.manifest.extra["encoder"] == Encoder.load(encoder).fingerprint


@pytest.mark.slow
def test_two_actors_make_the_same_artefact(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    two = embed(data.corpus, encoder, Placement(embed_actors=2), str(tmp_path / "two"))
    assert two.parts() == embeddings.parts()
    assert np.abs(vectors_of(two.table()) - vectors_of(embeddings.table())).max() < 1e-5


def test_only_missing_parts_are_made(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(embeddings.url, out)
    for name in ("manifest.json", "part-00002.parquet"):
        (out / name).unlink()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*")}
    assert embed(data.corpus, encoder, PLACEMENT, str(out)).fingerprint == embeddings.fingerprint
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*")}
    assert {name: after[name] for name in before} == before
    assert sorted(after) == embeddings.parts()


def test_other_metadata_embeds_nothing_again_and_reaches_the_index(
    beir: Path, data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    shutil.copytree(beir, tmp_path / "beir")
    file = tmp_path / "beir" / "corpus.jsonl"

    def ingested(name: str, change: dict[str, Any]) -> Artifact:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[3] |= change
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = Ingest(part_rows=1300, metadata=("brand",))
        return ingest(str(tmp_path / "beir"), settings, str(tmp_path / name)).corpus

    other = ingested("described", {"metadata": {"brand": "acme"}})
    assert other.fingerprint != data.corpus.fingerprint
    shutil.copytree(embeddings.url, tmp_path / "embeddings")
    again = embed(other, encoder, PLACEMENT, str(tmp_path / "embeddings"))
    assert again.manifest == embeddings.manifest, "the seconds it took among it"
    wanted = Retrieval(truth_queries=5)
    made = index(again, other, [], encoder, wanted, PLACEMENT, str(tmp_path / "index"))
    assert made.manifest.extra["metadata"] == {"brand": "text"}
    assert made.manifest.inputs["corpus"] == other.fingerprint
    shard = Shard.load(tmp_path / "index" / "shard-00000")
    kept = shard.kept(Filter.model_validate({"brand": "acme"}).text)
    assert shard.doc_ids(kept.rows) == other.table()["doc_id"].to_pylist()[3:4]
    written = ingested("rewritten", {"text": "another text"})
    with pytest.raises(ArtifactError, match=r"was made with inputs.documents = .*, now .* = "):
        embed(written, encoder, PLACEMENT, str(tmp_path / "embeddings"))


def test_pairs_come_from_every_pool_once(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    pools = Pools(bm25=5, dense=5, random=3)
    skip = frozenset({"q000"})
    out = str(tmp_path / "pairs")
    made = pair([data.queries], data.corpus, embeddings, encoder, pools, Lexical(), out, skip)
    rows = made.table().to_pylist()
    assert made.manifest.extra["queries"] == 39
    assert {row["source"] for row in rows} == {"bm25", "dense", "random"}
    assert "q000" not in {row["query_id"] for row in rows}
    keys = [(row["query_id"], row["doc_id"]) for row in rows]
    assert len(set(keys)) == len(keys)
    top = {row["query_id"]: row for row in rows if row["source"] == "bm25" and row["rank"] == 1}
    found = sum(row["doc_id"][1:].endswith(query_id[1:]) for query_id, row in top.items())
    assert found >= 35  # a query is most of its own document
    vectors = Encoder.load(encoder).encode([data.queries.table()["text"][1].as_py()], "query")
    best = search_exact(embeddings, vectors, 5)[0]
    of_query = {row["doc_id"] for row in rows if row["query_id"] == "q001"}
    assert {hit.doc_id for hit in best} <= of_query


@pytest.mark.parametrize("shards", [1, 3])
def test_the_shards_of_an_index_equal_the_whole(
    shards: int, data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    settings = Retrieval(shards=shards, truth_queries=20)
    out = str(tmp_path / "index")
    made = index(embeddings, data.corpus, [data.queries], encoder, settings, PLACEMENT, out)
    extra = Artifact.open(out, "index").manifest.extra
    assert extra["recall@10"] == 1.0
    assert sum(extra["shard_rows"]) == made.manifest.rows == 3000
    model = Encoder.load(encoder)
    queries = model.encode(data.queries.table()["text"].to_pylist(), "query")
    loaded = [Shard.load(tmp_path / "index" / name) for name in extra["shards"]]
    pieces = [shard.search(queries, 10) for shard in loaded]
    merged = [merge([piece[row] for piece in pieces], 10) for row in range(len(queries))]
    whole = search_exact(embeddings, queries, made.manifest.rows)
    assert merged == [hits[:10] for hits in whole]
    assert extra["metadata"] == {"number": "number"}
    some = Filter.model_validate({"number": {"lt": 300}}).text
    kept = set(data.corpus.table()["doc_id"].to_pylist()[:600:2])
    pieces = [shard.search(queries, 10, kept=shard.kept(some)) for shard in loaded]
    for row, hits in enumerate(whole):
        among = [(hit.score, hit.doc_id) for hit in hits if hit.doc_id in kept]
        assert merge([piece[row] for piece in pieces], 10) == ranked(among, 10)
    canary = extra["canary"]
    answer = merge([s.search(model.encode([canary["query"]], "query"), 1)[0] for s in loaded], 1)
    assert answer[0].doc_id == canary["doc_id"]
    assert answer[0].score == pytest.approx(canary["score"], abs=1e-5)


def test_many_shards_share_one_reading_of_all_rows(
    data: Ingested,
    encoder: str,
    embeddings: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Retrieval(shards=3, truth_queries=20)
    given = (embeddings, data.corpus, [data.queries], encoder, settings, PLACEMENT)
    direct = index(*given, str(tmp_path / "direct"))
    # As many shards of a large corpus are built, here of three and of parts of 1,300 documents.
    monkeypatch.setattr(index_module, "SCATTERED_FROM", 3)
    monkeypatch.setattr(index_module, "SCATTERED_ROWS", 1300)
    sources: list[Any] = []
    build = index_module._Run._each

    def watched(run: Any, work: Any, label: str, todo: Any, on_gpu: bool = False) -> Any:
        sources.extend(one[1] for one in todo if label == "index")
        if label == "scatter":
            parts = [(one[1], name) for one in todo for name in one[2]]
            assert sorted(parts) == sorted(
                (kind, name)
                for kind, a in (("embeddings", embeddings), ("corpus", data.corpus))
                for name in a.parts()
            )
        return build(run, work, label, todo, on_gpu)

    monkeypatch.setattr(index_module._Run, "_each", watched)
    scattered = index(*given, str(tmp_path / "scattered"))
    assert [source.scattered is not None for source in sources] == [True] * 3
    shards = [
        {name: entry for name, entry in made.manifest.files.items() if "shard-" in name}
        for made in (direct, scattered)
    ]
    assert shards[0] == shards[1]
    # Nothing of it stays, or counts as a file of the index.
    assert not Place(str(tmp_path / "scattered" / "scattered")).names()
    assert scattered.manifest.files.keys() == direct.manifest.files.keys()


def test_codes_are_trained_once_tuned_and_built_once(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    wanted = Retrieval(structure="ivf_rabitq", shards=2, nlist=16, target_recall=0.9)
    out = tmp_path / "index"

    def made() -> Artifact:
        given = [data.queries]
        return index(embeddings, data.corpus, given, encoder, wanted, PLACEMENT, str(out))

    first = made()
    extra = first.manifest.extra
    assert extra["recall@10"] >= 0.9
    assert extra["measured_on"] == "given queries"
    assert extra["structure"] == "ivf_rabitq"
    assert set(extra["search"]) == {"nprobe", "refine_factor"}
    cheapest = min(row["work"] for row in extra["tuning"] if row["recall"] >= 0.9)
    chosen = [row for row in extra["tuning"] if row["search"] == extra["search"]]
    assert [row["work"] for row in chosen] == [cheapest]
    shards = [Shard.load(out / name) for name in extra["shards"]]
    assert {shard.finder.width.nprobe for shard in shards} == {extra["search"]["nprobe"]}
    # A killed run: what is whole stays, what is missing is made, and it is the same index.
    for name in ("manifest.json", "shard-00001/built.json", "shard-00001/index.faiss"):
        (out / name).unlink()
    before = (out / "shard-00000" / "index.faiss").stat().st_mtime_ns
    assert made().fingerprint == first.fingerprint
    assert (out / "shard-00000" / "index.faiss").stat().st_mtime_ns == before


def test_only_what_faiss_does_on_a_gpu_waits_for_one(
    data: Ingested,
    encoder: str,
    embeddings: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[float] = []

    def without(placement: Placement, on_gpu: bool) -> dict[str, Any]:
        """As asked, on a machine that has none to give."""
        options = task_options(placement, on_gpu)
        asked.append(options.pop("num_gpus", 0))
        return options

    monkeypatch.setattr(index_module, "task_options", without)
    # A machine without one refuses before it comes to what is tested here.
    monkeypatch.setattr(index_module, "refuse_unmet", lambda *asked: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    wanted = Retrieval(structure="ivf_flat", nlist=16, nprobe=4, truth_queries=5)
    placement = Placement(gpus_per_actor=0.5)
    out = str(tmp_path / "index")
    made = index(embeddings, data.corpus, [], encoder, wanted, placement, out)
    assert asked == [0.5, 0.5, 0], "train, index, tune"
    assert made.manifest.device == "cpu"
    assert "FAISS saw no GPU where the index was built" in caplog.text
    same = index(embeddings, data.corpus, [], encoder, wanted, PLACEMENT, str(tmp_path / "same"))
    assert same.fingerprint == made.fingerprint
    assert asked[3:] == [0, 0, 0]


def test_a_generation_leaves_out_what_is_deleted(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    wanted = Retrieval(structure="ivf_flat", shards=2, nlist=16)
    urls = [str(tmp_path / name) for name in ("base", "next", "other")]
    base = index(embeddings, data.corpus, [data.queries], encoder, wanted, PLACEMENT, urls[0])
    canary = base.manifest.extra["canary"]["doc_id"]
    gone = frozenset([canary, "d00007"])

    def generation(settings: Retrieval, url: str) -> Artifact:
        return index(None, None, [], encoder, settings, PLACEMENT, url, base, gone)

    made = generation(Retrieval(), urls[1])
    extra = made.manifest.extra
    assert made.manifest.rows == 2998
    assert extra["changes"] == {"added": 0, "replaced": 0, "deleted": 2}
    assert made.manifest.inputs["base"] == base.fingerprint
    assert extra["structure"] == "ivf_flat"
    assert extra["recall@10"] >= 0.95
    assert extra["canary"]["query"] == base.manifest.extra["canary"]["query"]
    assert extra["canary"]["doc_id"] != canary
    trained = "trained/index.faiss"
    assert made.manifest.files[trained] == base.manifest.files[trained]
    with pytest.raises(ValueError, match="has shards 2, 3 was asked for"):
        generation(Retrieval(shards=3), urls[2])
    # It was left unsaid that the base's was taken.
    with pytest.raises(ValueError, match="has nlist 16, 32 was asked for"):
        generation(Retrieval(nlist=32), urls[2])


def test_an_id_to_delete_may_be_corrected(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    """An unknown one was found by a shard's task, and what stood there then was of that id."""
    wanted = Retrieval(structure="exact", shards=2, truth_queries=5)
    url = str(tmp_path / "base")
    base = index(embeddings, data.corpus, [], encoder, wanted, PLACEMENT, url)

    def without(*doc_ids: str, corpus: Artifact | None = None) -> Artifact:
        new = None if corpus is None else embeddings
        gone, out = frozenset(doc_ids), str(tmp_path / "next")
        return index(new, corpus, [], encoder, Retrieval(), PLACEMENT, out, base, gone)

    unknown = "'nobody' and 1 more are to be deleted and are not in the base index"
    with pytest.raises(ValueError, match=unknown):
        without("d00007", "nobody", "nowhere")
    with pytest.raises(ValueError, match="'d00007' is to be deleted and is in the corpus too"):
        without("d00007", corpus=data.corpus)
    assert not (tmp_path / "next").exists()
    assert without("d00007").manifest.rows == 2999


def test_a_flag_may_be_corrected_while_nothing_is_built(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    """The queries to measure with were saved before the settings were refused."""

    def made(nlist: int) -> Artifact:
        wanted = Retrieval(structure="ivf_flat", nlist=nlist, nprobe=4, truth_queries=5)
        url = str(tmp_path / "index")
        return index(embeddings, data.corpus, [], encoder, wanted, PLACEMENT, url)

    with pytest.raises(ValueError, match="1000 lists needs 39000 training vectors"):
        made(1000)
    assert made(16).manifest.rows == 3000


def test_metadata_that_a_new_generation_forgets_is_said(tmp_path: Path, caplog: Any) -> None:
    def made(name: str, **kinds: str) -> Artifact:
        draft = begin(str(tmp_path / name), name, config={}, inputs={})
        assert isinstance(draft, Draft)
        return draft.finish(rows=0, extra={"metadata": kinds} if kinds else {})

    base, without = made("index", price="number", brand="text"), made("corpus")
    for given in ((None, without), (base, None), (base, base), (without, base)):
        index_module._warn_of_metadata(*given)
    assert not caplog.text
    index_module._warn_of_metadata(base, without)
    assert f"no document of {without.url} has brand, price, which documents of" in caplog.text
    assert "--ingest.metadata" in caplog.text


def test_words_are_indexed_by_the_statistics_of_the_whole(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    wanted, url = Retrieval(shards=3, truth_queries=5), str(tmp_path / "index")

    def made() -> Artifact:
        given = [data.queries]
        arguments = (embeddings, data.corpus, given, encoder, wanted, PLACEMENT, url)
        return index(*arguments, lexical=Lexical(b=0.5))

    first = made()
    extra = first.manifest.extra
    assert extra["lexical"]["b"] == 0.5
    assert "shard-00002/lexical/data.csc.index.npy" in first.manifest.files
    queries = data.queries.table()["text"].to_pylist()
    rows = data.corpus.table()
    texts = [document_text(r["title"], r["text"]) for r in rows.to_pylist()]
    whole = LexicalIndex(rows["doc_id"].to_pylist(), texts, Lexical(b=0.5))
    assert _by_words(tmp_path / "index", extra, queries) == [whole.search(q, 10) for q in queries]
    # A killed run: what is whole stays, what is missing is made, and it is the same index.
    for name in ("manifest.json", "shard-00001/lexical/lexical.json"):
        (tmp_path / "index" / name).unlink()
    kept = tmp_path / "index" / "shard-00000" / "lexical" / "data.csc.index.npy"
    before = kept.stat().st_mtime_ns
    assert made().fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == before
    # A new generation has what its base has, with the statistics of what is left.
    gone = frozenset(rows["doc_id"].to_pylist()[:1000])
    later = str(tmp_path / "later")
    extra = index(
        None, None, [], encoder, Retrieval(), PLACEMENT, later, first, gone
    ).manifest.extra
    kept_rows = [row for row in rows.to_pylist() if row["doc_id"] not in gone]
    texts = [document_text(row["title"], row["text"]) for row in kept_rows]
    whole = LexicalIndex([row["doc_id"] for row in kept_rows], texts, Lexical(b=0.5))
    assert _by_words(tmp_path / "later", extra, queries) == [whole.search(q, 10) for q in queries]


def _by_words(place: Path, extra: dict[str, Any], queries: list[str]) -> list[list[Hit]]:
    pieces = []
    for name in extra["shards"]:
        shard = Shard.load(place / name)
        words = LexicalShard.load(place / name / "lexical", shard)
        pieces.append(words.rankings(queries, [10] * len(queries), shard))
    return [
        ranked([p for one in found for p in zip(one.scores, one.doc_ids, strict=True)], 10)
        for found in zip(*pieces, strict=True)
    ]


def test_an_index_of_another_encoder_is_refused(
    data: Ingested, encoder: str, embeddings: Artifact, tmp_path: Path
) -> None:
    other = str(save_tiny_encoder(tmp_path / "other", prompts={"query": "ask: "}))
    with pytest.raises(ValueError, match=r"is of encoder \w+, .* is \w+"):
        index(embeddings, data.corpus, [], other, Retrieval(), PLACEMENT, str(tmp_path / "index"))
    pools, out = Pools(bm25=0, random=0), str(tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"is of encoder \w+, .* is \w+"):
        pair([data.queries], data.corpus, embeddings, other, pools, Lexical(), out)


def test_the_embeddings_are_read_once_for_many_parts_of_queries(
    data: Ingested,
    encoder: str,
    embeddings: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries, pools, lexical = [data.queries], Pools(bm25=2, dense=5, random=1), Lexical()
    given = (queries, data.corpus, embeddings, encoder, pools, lexical)
    # What a query is encoded beside may change its last bits, so parts are the same in both.
    monkeypatch.setattr(pair_module, "PART_QUERIES", 7)
    whole = pair(*given, str(tmp_path / "whole"))
    opened, read = Place.open, []

    def counting(place: Place, name: str) -> Any:
        read.extend([name] if place.url == embeddings.url else [])
        return opened(place, name)

    monkeypatch.setattr(Place, "open", counting)
    again = pair(*given, str(tmp_path / "again"))
    assert len(again.parts()) == 6
    assert read == embeddings.parts()
    # A pass for each 14 queries, and one for those of the part that an earlier run has left out.
    monkeypatch.setattr(pair_module, "DENSE_HITS", 14 * pools.dense)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for name in ("manifest.json", "part-00001.parquet", "part-00002.parquet", "part-00004.parquet"):
        (killed / name).unlink()
    read.clear()
    rest = pair(*given, str(killed))
    assert read == embeddings.parts() * 2
    assert whole.fingerprint == again.fingerprint == rest.fingerprint


def test_a_document_stays_in_its_shard() -> None:
    counts = np.bincount([shard_of(f"d{n}", 7) for n in range(7000)])
    assert counts.min() > 850
    assert [shard_of(doc_id, 7) for doc_id in ("a", "b", "c")] == [2, 5, 1]


def test_texts_by_id(data: Ingested) -> None:
    rows = data.corpus.rows("doc_id", "title", "text")
    whole = {doc_id: document_text(title, text) for doc_id, title, text in rows}
    asked = ["d02999", "d00000", "d00000"]
    assert DocumentTexts(data.corpus).get(asked) == [whole[doc_id] for doc_id in asked]
    with pytest.raises(KeyError, match="no document 'd9'"):
        DocumentTexts(data.corpus).get(["d9"])

"""Reports: their numbers, their runs, and their page."""

import io
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ET

import ir_measures
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bixse.artifacts import Artifact, ArtifactError
from bixse.evaluation.trec import read_qrels, read_run
from bixse.models.encoder import Encoder
from bixse.models.settings import PACKAGED
from bixse.records import CORPUS, document_text
from bixse.training.gather import World as Ranks
from jobs.evaluate import judged_documents, table
from jobs.ingest import ingest
from jobs.measuring import dev_ndcg, dev_split
from jobs.recipe import Ingest
from tests.artifacts import artifact
from tests.encoders import save_tiny_cross_encoder, save_tiny_encoder, texts
from tests.jobs.evaluated import (
    DOCUMENTS,
    GIVEN,
    GRADES,
    SETTINGS,
    World,
    embeddings_artifact,
    make_world,
    qrels_artifact,
    queries_artifact,
    run,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def report(world, tmp_path_factory) -> Artifact:
    return run(world, tmp_path_factory.mktemp("report") / "report")


def numbers(report):
    return json.loads(report.place.read("report.json"))


def test_the_report_holds_what_scripts_rely_on(report):
    found = numbers(report)
    assert set(found["ndcg@10"]) == {"bm25", "base", "trained"}
    assert found["n_queries"] == 5
    assert found["recipe"] == "test"
    assert found["seconds"] == {"train": 1.5}
    for measure, intervals in found["ci95"].items():
        for system, (low, high) in intervals.items():
            assert 0 <= low <= found[measure][system] <= high <= 1
    assert set(found["differences"]) == {"trained-base", "trained-bm25", "base-bm25"}
    assert found["queries"] == {"no_gain": 1, "none_relevant": 1, "themselves": 0}
    assert found["n_documents"] == len(DOCUMENTS)
    assert report.manifest.kind == "report"
    assert report.manifest.rows == 5
    assert report.manifest.extra["ndcg@10"] == found["ndcg@10"]


def test_bm25_and_an_encoder_fused_are_a_system_with_intervals(world, report, tmp_path):
    found = run(world, tmp_path / "report", settings=SETTINGS.replace(hybrid=True))
    values = numbers(found)
    assert set(values["ndcg@10"]) == {"bm25", "base", "trained", "base+bm25", "trained+bm25"}
    assert {"base+bm25-base", "trained+bm25-trained"} <= set(values["differences"])
    low, high = values["ci95"]["ndcg@10"]["base+bm25"]
    assert low <= values["ndcg@10"]["base+bm25"] <= high
    runs = {s: read_run(found.place.read(f"runs/{s}.trec")) for s in ("bm25", "base", "base+bm25")}
    for query_id, hits in runs["base+bm25"].items():
        ranks = [
            {hit.doc_id: hit.rank for hit in runs[s].get(query_id, [])} for s in ("bm25", "base")
        ]
        for hit in hits:
            of_both = sum(1 / (60 + r[hit.doc_id]) for r in ranks if hit.doc_id in r)
            assert hit.score == pytest.approx(of_both)
    for system in ("bm25", "base", "trained"):
        assert values["ndcg@10"][system] == numbers(report)["ndcg@10"][system]


def test_an_encoder_after_feedback_is_a_system_with_intervals(world, report, tmp_path):
    settings = SETTINGS.replace(feedback=2, feedback_weight=0.4)
    found = run(world, tmp_path / "report", settings=settings)
    values = numbers(found)
    systems = {"bm25", "base", "trained", "base+feedback", "trained+feedback"}
    assert set(values["ndcg@10"]) == systems
    assert {"base+feedback-base", "trained+feedback-trained"} <= set(values["differences"])
    encoder = Encoder.load(PACKAGED)
    query = encoder.encode([GIVEN["q 1"]], "query")[0]
    before = read_run(found.place.read("runs/base.trec"))["q 1"]
    texts = [document_text("", DOCUMENTS[hit.doc_id]) for hit in before]
    vectors = encoder.encode(texts, "document")
    moved = 0.6 * query + 0.4 * vectors[:2].mean(axis=0)
    cosines = dict(
        zip([h.doc_id for h in before], vectors @ moved / np.linalg.norm(moved), strict=True)
    )
    after = read_run(found.place.read("runs/base+feedback.trec"))["q 1"]
    assert [h.score for h in after] == pytest.approx([cosines[h.doc_id] for h in after], abs=0.01)
    assert after[0].score > before[0].score + 0.05


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> World:
    """60 documents, of which the queries are the first six; `d5` is judged for itself."""
    root = tmp_path_factory.mktemp("many")
    documents = {f"d{number}": text for number, text in enumerate(texts(60, seed=1))}
    rows = [{"doc_id": d, "title": "a title", "text": text} for d, text in documents.items()]
    corpus = artifact(root / "corpus", "corpus", rows, CORPUS)
    asked = {f"d{number}": documents[f"d{number}"].upper() for number in range(6)}
    queries = queries_artifact(root / "queries", asked)
    grades = {f"d{number}": {f"d{number + 10}": 3} for number in range(6)}
    grades["d5"]["d5"] = 3
    qrels = qrels_artifact(root / "qrels", grades, "test")
    encoder = str(save_tiny_encoder(root))
    embeddings = embeddings_artifact(root / "embeddings", corpus, encoder)
    return World(corpus, queries, qrels, {"base": (encoder, embeddings)})


def runs_of(report):
    names = numbers(report)["ndcg@10"]
    return {name: read_run(report.place.read(f"runs/{name}.trec")) for name in names}


def test_what_reads_a_ranking_again_reads_as_deep_whatever_is_kept(many, tmp_path):
    reranker = str(save_tiny_cross_encoder(tmp_path / "reranker", logits=1)), 30
    settings = SETTINGS.replace(hybrid=True, feedback=20)
    more = {"reranker": reranker, "trained_on": []}
    shallow = runs_of(run(many, tmp_path / "a", settings=settings.replace(depth=10), **more))
    deep = runs_of(run(many, tmp_path / "b", settings=settings.replace(depth=50), **more))
    assert len(shallow) == 6
    for name, ranking in shallow.items():
        for query_id, hits in ranking.items():
            assert hits == deep[name][query_id][:10], name


def test_a_query_that_is_a_document_does_not_find_itself(many, tmp_path):
    settings = SETTINGS.replace(hybrid=True, feedback=5)
    report = run(many, tmp_path / "out", settings=settings, trained_on=[])
    for name, ranking in runs_of(report).items():
        for query_id, hits in ranking.items():
            found = [hit.doc_id for hit in hits]
            # Somebody said of that one what it is worth to itself.
            assert (query_id in found) == (query_id == "d5"), name
            assert [hit.rank for hit in hits] == [*range(1, len(hits) + 1)]
            if name == "base":
                assert len(hits) == 59 + (query_id == "d5")
    assert numbers(report)["queries"]["themselves"] == 5
    assert "5 are documents too" in report.place.read("report.html").decode()
    qrels = qrels_artifact(
        tmp_path / "qrels", {q: {f"d{int(q[1:]) + 10}": 3} for q in ("d0", "d1")}, "dev"
    )
    dev = dev_split(many.corpus, many.queries, qrels)
    assert dev.itself == {"d0", "d1"}
    encoder, _ = many.encoders["base"]
    measured = run(many, tmp_path / "dev", "dev", qrels=qrels, trained_on=[])
    of_evaluate = numbers(measured)["ndcg@10"]["base"]
    assert dev_ndcg(dev, Encoder.load(encoder, "cpu"), Ranks()) == pytest.approx(of_evaluate)


def test_the_encoder_finds_what_it_should(report):
    rankings = read_run(report.place.read("runs/base.trec"))
    assert rankings["q 1"][0].doc_id == "json dumps"
    assert rankings["q 3"][0].doc_id == "csv"
    assert all(len(hits) == len(DOCUMENTS) for hits in rankings.values())
    assert all(-1 <= hit.score <= 1 for hits in rankings.values() for hit in hits)


def test_exact_search_is_the_ranking_of_all_products(world, report):
    encoder = Encoder.load(PACKAGED)
    vectors = encoder.encode(list(DOCUMENTS.values()), "document").astype(np.float64)
    query = encoder.encode([GIVEN["q 4"]], "query")[0].astype(np.float64)
    scores = dict(zip(DOCUMENTS, vectors @ query, strict=True))
    hits = read_run(report.place.read("runs/base.trec"))["q 4"]
    assert [hit.doc_id for hit in hits] == sorted(scores, key=lambda d: (-scores[d], d))
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values())[::-1], abs=1e-6)


def test_rescoring_the_trec_files_gives_the_report(report):
    found = numbers(report)
    qrels = read_qrels(report.place.read("qrels.trec"))
    grades = {
        query_id: {doc_id: int(gain) for doc_id, gain in judged.items()}
        for query_id, judged in qrels.items()
    }
    assert grades == {q: g for q, g in GRADES.items() if q.startswith("q")}
    ndcg = ir_measures.nDCG @ 10
    for system, mean in found["ndcg@10"].items():
        rankings = read_run(report.place.read(f"runs/{system}.trec"))
        scored = {q: {hit.doc_id: hit.score for hit in hits} for q, hits in rankings.items()}
        theirs = ir_measures.calc_aggregate([ndcg], grades, scored)[ndcg]
        # Relevance is float32 in artefacts.
        assert mean == pytest.approx(theirs, abs=1e-7), system


def test_per_query_values_average_to_the_report(report):
    found = numbers(report)
    rows = pq.read_table(io.BytesIO(report.place.read("per_query.parquet")))
    assert rows["query_id"].to_pylist() == [q for q in GIVEN if q.startswith("q")]
    for measure in found["ci95"]:
        for system, mean in found[measure].items():
            assert np.mean(rows[f"{measure} {system}"].to_numpy()) == pytest.approx(mean)


def test_a_rerun_is_the_same_report_whatever_time_the_stages_took(world, report, tmp_path):
    again = run(world, tmp_path / "again", seconds={"train": 99.0})
    assert again.manifest.inputs == report.manifest.inputs
    assert again.manifest.config == report.manifest.config
    first, second = numbers(report), numbers(again)
    assert first.pop("seconds") != second.pop("seconds")
    assert first == second
    for name in ("runs/bm25.trec", "runs/trained.trec", "qrels.trec", "per_query.parquet"):
        assert report.place.read(name) == again.place.read(name)


def test_a_finished_report_is_found_and_other_settings_are_refused(world, report):
    assert run(world, report.url, seconds={}).fingerprint == report.fingerprint
    with pytest.raises(ArtifactError, match=r"evaluation\.bootstrap = 200, now"):
        run(world, report.url, settings=SETTINGS.replace(bootstrap=300))


def test_a_killed_report_is_finished_by_a_rerun(world, report, tmp_path):
    out = tmp_path / "report"
    shutil.copytree(report.place.path(""), out)
    for name in ("manifest.json", "report.json", "runs/trained.trec"):
        (out / name).unlink()
    assert run(world, out).fingerprint == report.fingerprint


def test_the_page_stands_alone(report):
    page = report.place.read("report.html").decode()
    assert not re.findall(r"<(script|link|img|iframe)\b|url\(|@import|https?://", page)
    root = ET.fromstring(re.sub(r"^<!doctype html>\n|<meta [^>]*>", "", page))
    text = " ".join(root.itertext())
    found = numbers(report)
    for system, mean in found["ndcg@10"].items():
        assert f"{mean:.3f}" in text
        assert system in text
    changed = [
        row
        for pair in ("trained-base", "trained-bm25")
        for row in found["changes"][pair]["best"] + found["changes"][pair]["worst"]
    ]
    assert changed
    assert all(row["text"] in text for row in changed)


def test_the_page_escapes_what_users_wrote(world, tmp_path):
    texts = GIVEN | {"q 1": "<script>alert('json')</script> & object"}
    queries = queries_artifact(tmp_path / "queries", texts)
    base = {"base": world.encoders["base"]}
    # The base finds what the query means, BM25 what it says: they differ on this query.
    report = run(world, tmp_path / "out", queries=queries, encoders=base, trained_on=[])
    page = report.place.read("report.html").decode()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&#x27;json&#x27;)&lt;/script&gt; &amp; object" in page


def test_the_table_shows_every_mean_and_interval_in_80_columns(report):
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(table(report))
    text, found = console.export_text(), numbers(report)

    def shown(value):
        return f"{value:.3f}".replace("0.", ".", 1)

    for measure in ("ndcg@10", "recall@10", "recall@100", "judged@10"):
        for system, mean in found[measure].items():
            low, high = found["ci95"][measure][system]
            assert shown(mean) in text
            assert f"[{shown(low)}, {shown(high)}]" in text
    assert "trained - base" in text


def test_a_report_on_what_chose_the_encoder_says_so(world, tmp_path):
    trained = pathlib.Path(world.encoders["trained"][0])
    qrels = qrels_artifact(tmp_path / "qrels", split="dev")
    manifest = trained / "manifest.json"
    said = []
    for number, chosen_on in enumerate((qrels, world.qrels)):
        manifest.write_text(json.dumps({"inputs": {"dev qrels": chosen_on.fingerprint}}))
        try:
            out = tmp_path / str(number)
            report = run(world, out, "dev", qrels=qrels, trained_on=[])
        finally:
            manifest.unlink()
        console = Console(record=True, width=80, file=io.StringIO())
        console.print(table(report))
        page = report.place.read("report.html").decode()
        shown = ["flatters" in text for text in (console.export_text(), page)]
        said.append([numbers(report)["chosen_on_split"], *shown])
    assert said == [[True] * 3, [False] * 3]


def test_a_report_says_how_many_grades_it_lacks(world, tmp_path):
    lines = [f'{{"_id": "{d}", "text": "{text}"}}\n' for d, text in DOCUMENTS.items()]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "tea"}\n')
    (tmp_path / "qrels").mkdir()
    grades = f"q\t{next(iter(DOCUMENTS))}\t1\nq\tdeleted\t1\nq\tgone\t1\nq\td\tx\n"
    (tmp_path / "qrels" / "test.tsv").write_text(grades)
    found = ingest(str(tmp_path), Ingest(), str(tmp_path / "out"))
    given = {"corpus": found.corpus, "queries": found.queries, "qrels": found.qrels}
    report = run(world, tmp_path / "report", **given, encoders={}, trained_on=[])
    reasons = {"unknown doc_id": 2, "the grade is not a number": 1}
    assert numbers(report)["qrels"] == {"rejected": 3, "rejected_for": reasons}
    page = report.place.read("report.html").decode()
    assert "nothing: unknown doc_id (2), the grade is not a number (1).</p>" in page
    assert "; 3 lines of the qrels were rejected" in table(report).title
    with pytest.raises(ValueError, match=r"for split dev: there are test; 3 lines .*: unknown doc"):
        judged_documents(found.qrels, "dev")


def test_bm25_alone_is_compared_with_nothing(world, tmp_path):
    report = run(world, tmp_path / "out", encoders={})
    assert set(numbers(report)["ndcg@10"]) == {"bm25"}
    assert numbers(report)["differences"] == {}
    assert table(report).row_count == 1


def test_the_page_draws_the_training_curve_that_stands_beside_the_encoder(world, tmp_path):
    encoder, _ = world.encoders["trained"]
    curve = pathlib.Path(encoder) / "training.jsonl"
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 1001)]
    curve.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        report = run(world, tmp_path / "out", encoders={"trained": world.encoders["trained"]})
    finally:
        curve.unlink()
    page = report.place.read("report.html").decode()
    assert "Training loss" in page
    assert "step 1000" in page

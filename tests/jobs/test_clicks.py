"""A log of what was shown and clicked, to an encoder that ranks without what ranks did."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bixse.artifacts import Artifact, ArtifactError
from bixse.judging.settings import Clicks
from bixse.models.encoder import load_model
from bixse.place import Place
from bixse.records import CLICKS, CORPUS, JUDGMENTS, QUERIES
from bixse.training.gather import World
from bixse.training.loop import Run, train_loop
from bixse.training.objective_settings import ClickBCE
from bixse.training.settings import Training
from jobs.clicks import _Tally, import_clicks, judge_clicks, shown_queries
from jobs.files import expanded
from jobs.formats import read_all
from jobs.recipe import Placement
from jobs.supervision import read_labels
from jobs.train import train
from jobs.verbs import main
from tests.artifacts import artifact
from tests.encoders import save_tiny_encoder, texts
from tests.jobs.conftest import write_beir


def line(
    query: str, shown: Sequence[tuple[str, int, int | None]], request_id: str = "", **more: Any
) -> str:
    """A line as the server writes it; a third number says whether it was clicked."""
    places = [
        {"doc_id": doc_id, "rank": rank, "score": 0.5} | ({} if click is None else {"click": click})
        for doc_id, rank, click in shown
    ]
    found = {"request_id": request_id, "policy": "bixse", **more}
    return json.dumps({**found, "results": [{"query": query, "shown": places}]}) + "\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    rows = [{"doc_id": f"d{n}", "title": "", "text": f"text {n}"} for n in range(6)]
    return artifact(tmp_path / "corpus", "corpus", rows, CORPUS)


@pytest.fixture
def given(tmp_path: Path) -> Artifact:
    """q0 may be trained on, q1 is one of the test split."""
    rows = [
        {"query_id": f"q{n}", "text": text, "origin": "given"}
        for n, text in enumerate(["Old shoes", "red shoes"])
    ]
    return artifact(tmp_path / "queries", "queries", rows, QUERIES)


def imported(
    tmp_path: Path,
    corpus: Artifact,
    given: Artifact,
    log: str,
    clicked: str = "",
    held_out: frozenset[str] = frozenset(),
    **settings: Any,
) -> tuple[Artifact, Artifact]:
    """Queries and clicks of a log, and of a table of clicks beside it."""
    (tmp_path / "log").mkdir(parents=True, exist_ok=True)
    (tmp_path / "log" / "shown-0.jsonl").write_text(log)
    if clicked:
        (tmp_path / "clicked.tsv").write_text(clicked)
        settings["clicked"] = (str(tmp_path / "clicked.tsv"),)
    told = Clicks(shown=(str(tmp_path / "log"),), **settings)
    queries = shown_queries(told, given, str(tmp_path / "shown-queries"))
    out = str(tmp_path / "clicks")
    return queries, import_clicks(told, [given, queries], corpus, held_out, out)


def swapped(query: str, one: str, other: str, **more: Any) -> str:
    """Ten lists of two documents in either order; rank 2 halves the odds of a click."""
    clicks = {(one, 1): 5, (one, 2): 3, (other, 1): 2, (other, 2): 1}
    lists = []
    for upper, lower in ((one, other), (other, one)):
        for n in range(10):
            shown = [(upper, 1, int(n < clicks[upper, 1])), (lower, 2, int(n < clicks[lower, 2]))]
            lists.append(line(query, shown, **more))
    return "".join(lists)


def test_a_log_becomes_queries_clicks_and_judgments(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    log = swapped("old  SHOES", "d0", "d1") + swapped("new shoes", "d2", "d3")
    queries, clicks = imported(tmp_path, corpus, given, log)
    (asked,) = queries.table().to_pylist()
    assert (asked["text"], asked["origin"]) == ("new shoes", "given")
    assert clicks.table().schema == CLICKS
    rows = clicks.table().to_pylist()
    counted = [(r["query_id"], r["doc_id"], r["rank"], r["impressions"], r["clicks"]) for r in rows]
    assert counted == [
        *(("q0", "d0", 1, 10, 5), ("q0", "d0", 2, 10, 3)),
        *(("q0", "d1", 1, 10, 2), ("q0", "d1", 2, 10, 1)),
        *((asked["query_id"], "d2", 1, 10, 5), (asked["query_id"], "d2", 2, 10, 3)),
        *((asked["query_id"], "d3", 1, 10, 2), (asked["query_id"], "d3", 2, 10, 1)),
    ]
    # Mantel and Haenszel of four documents: (35 + 35 + 18 + 18) / 20 over (15 + 15 + 8 + 8) / 20.
    theta = -np.log(106 / 46)
    np.testing.assert_allclose([row["rank_bias"] for row in rows], [0, theta] * 4, rtol=0.02)
    extra = clicks.manifest.extra
    assert (extra["lists"], extra["impressions"]) == (40, 80)
    assert extra["rank_bias"] == [0, round(rows[1]["rank_bias"], 4)]
    judged = judge_clicks(clicks, Clicks(prior_deviation=50), str(tmp_path / "judgments"))
    assert judged.table().schema == JUDGMENTS
    found = {row["doc_id"]: row["relevance"] for row in judged.table().to_pylist()}
    assert found["d0"] == pytest.approx(found["d2"]) == pytest.approx(0.502, abs=0.01)
    assert found["d1"] == pytest.approx(found["d3"]) == pytest.approx(0.210, abs=0.01)
    assert {row["origin"] for row in judged.table().to_pylist()} == {"clicks"}
    assert judged.manifest.extra["rank_bias"] == extra["rank_bias"]


def test_clicks_of_a_table_are_joined_by_request(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    both = {
        "request_id": "r2",
        "results": [
            {"query": query, "shown": [{"doc_id": "d0", "rank": 1}, {"doc_id": "d1", "rank": 2}]}
            for query in ("a", "b")
        ],
    }
    log = line("a", [("d0", 2, None), ("d1", 1, None)], "r1") + json.dumps(both) + "\n"
    table = "request_id\tdoc_id\tquery\nr1\td0\t\nr1\td5\t\nr9\td0\t\nr2\td1\tb\nr2\td1\tB \n"
    _, clicks = imported(tmp_path, corpus, given, log, table, rank_bias=(0.0, -1.0))
    found = {
        (row["query_id"].startswith("shown:"), row["doc_id"], row["rank"], row["clicks"])
        for row in clicks.table().to_pylist()
    }
    assert found == {(True, "d0", 1, 0), (True, "d0", 2, 1), (True, "d1", 1, 0),
                     (True, "d1", 2, 0), (True, "d1", 2, 1)}  # fmt: skip
    assert sum(row["clicks"] for row in clicks.table().to_pylist()) == 2
    rejected = clicks.rejected()
    assert rejected is not None
    reasons = list(zip(rejected["reason"].to_pylist(), rejected["line"].to_pylist(), strict=True))
    assert reasons == [("a click on what was not shown", 3), ("a click on what was not shown", 4)]


def test_bad_lines_unknown_documents_and_held_out_queries_are_no_clicks(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    place = {"doc_id": "d0", "rank": 1}
    bad: list[dict[str, Any]] = [
        {"results": "none"},
        {"results": [{"query": " ", "shown": []}]},
        {"query": "a", "shown": [{**place, "rank": 0}]},
        {"query": "a", "shown": [{**place, "click": 2}]},
        {"query": "a", "shown": [{**place, "doc_id": 7}]},
        {"query": "a", "shown": [place], "request_id": 7},
    ]
    log = "no JSON\n" + "".join(json.dumps({**one, "policy": "bixse"}) + "\n" for one in bad)
    log += swapped("a", "d0", "d1") + swapped("Red shoes", "d0", "d1")
    log += line("a", [("gone", 1, 1), ("d2", 30, 1)]) * 2
    log += swapped("a", "d4", "d5", policy="other")
    queries, clicks = imported(
        tmp_path, corpus, given, log, held_out=frozenset({"q1"}), policies=("bixse",)
    )
    assert (queries.manifest.rows, queries.manifest.rejected) == (1, 7)
    assert {row["doc_id"] for row in clicks.table().to_pylist()} == {"d0", "d1"}
    assert clicks.manifest.extra["held_out_lists"] == 20
    rejected = clicks.rejected()
    assert rejected is not None
    assert [(r["reason"], r["doc_id"]) for r in rejected.to_pylist()] == [
        ("unknown doc_id", "gone")
    ]


def test_what_says_nothing_of_relevance_is_refused(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    with pytest.raises(ValueError, match=r"set --judging\.clicks\.shown"):
        shown_queries(Clicks(), given, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no file at"):
        shown_queries(Clicks(shown=(str(tmp_path / "no"),)), given, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no list of documents: .* line 1: broken JSON"):
        imported(tmp_path, corpus, given, "no JSON\n")
    with pytest.raises(ValueError, match=r"holds no list of documents$"):
        imported(tmp_path, corpus, given, "")
    fixed = line("a", [("d0", 1, 1), ("d1", 2, 1)]) * 5
    with pytest.raises(ValueError, match=r"no list of documents under the policies .* named$"):
        imported(tmp_path, corpus, given, fixed, policies=("other",))
    with pytest.raises(ValueError, match="at rank 1 and at another for the same query"):
        imported(tmp_path, corpus, given, fixed)
    assert not (tmp_path / "clicks" / "manifest.json").exists()
    unread = line("b", [("d0", 1, 0), ("d1", 2, 0)]) + line("b", [("d1", 1, 0), ("d0", 2, 0)])
    with pytest.raises(ValueError, match="nobody clicked on any of 4 documents"):
        imported(tmp_path / "b", corpus, given, unread)
    tested, held_out = swapped("red shoes", "d0", "d1"), frozenset({"q1"})
    with pytest.raises(ValueError, match="nobody clicked on any of 0 documents"):
        imported(tmp_path / "d", corpus, given, tested, "", held_out)
    with pytest.raises(ValueError, match="has no column request_id"):
        imported(tmp_path / "c", corpus, given, fixed, "query\tdoc_id\na\td0\n")


def test_a_line_says_what_is_wrong_with_it(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    place = {"doc_id": "d0", "rank": 1}
    bad: dict[str, dict[str, Any]] = {
        "a request_id that is no text": {"query": "a", "shown": [place], "request_id": 7},
        "results that are no list": {"results": "none"},
        "no list of what was shown": {"query": "a"},
        "no query, or none that is text": {"query": "half \ud800", "shown": [place]},
        "a document without a doc_id that is text": {"query": "a", "shown": [{"rank": 1}]},
        "a rank that is no whole number from 1": {"query": "a", "shown": [{**place, "rank": 0}]},
        "a click that is neither true nor false": {"query": "a", "shown": [{**place, "click": 2}]},
    }
    log = "".join(json.dumps(one) + "\n" for one in bad.values())
    log += swapped("a", "d0", "d1") + line("a", [("d2\ud800", 1, 1)])
    # A click of null is no click, and results of null are those of the line itself.
    log += json.dumps({"query": "a", "shown": [{**place, "click": None}], "results": None}) + "\n"
    queries, clicks = imported(tmp_path, corpus, given, log)
    rejected = queries.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == [*bad, "a document without a doc_id that is text"]
    assert clicks.table()["impressions"].to_pylist() == [11, 10, 10, 10]


def test_a_log_may_be_parquet(tmp_path: Path, corpus: Artifact, given: Artifact) -> None:
    rows = [json.loads(one) for one in swapped("a", "d0", "d1").splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    told = Clicks(shown=(str(tmp_path / "log.parquet"),))
    queries = shown_queries(told, given, str(tmp_path / "shown-queries"))
    out = str(tmp_path / "clicks")
    clicks = import_clicks(told, [given, queries], corpus, frozenset(), out)
    assert clicks.table()["clicks"].to_pylist() == [5, 3, 2, 1]


def test_clicks_on_held_out_queries_are_not_called_unshown(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    log = line("a", [("d0", 1, None), ("d1", 2, None)], "r1")
    log += line("red shoes", [("d0", 1, None)], "r2")
    log += line("a", [("d0", 1, None), ("d1", 30, None)], "r3")
    table = "request_id\tdoc_id\nr1\td1\nr2\td0\nr3\td1\n\td0\n"
    held_out = frozenset({"q1"})
    _, clicks = imported(tmp_path, corpus, given, log, table, held_out, rank_bias=(0.0, -1.0))
    rejected = clicks.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == ["no request_id or no doc_id"]
    assert clicks.manifest.extra["deeper_impressions"] == 1


def test_a_request_that_stands_twice_is_read_once(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    """A client that tries again sends its id again, and may be shown another order."""
    log = line("a", [("d0", 1, None), ("d1", 2, None)], "r1")
    log += line("a", [("d1", 1, None), ("d0", 2, None)], "r1") + line("b", [("d1", 1, None)], "r1")
    table = "request_id\tdoc_id\nr1\td1\n"
    _, clicks = imported(tmp_path, corpus, given, log, table, rank_bias=(0.0, -1.0))
    counted = [(r["doc_id"], r["rank"], r["clicks"]) for r in clicks.table().to_pylist()]
    assert counted == [("d0", 1, 0), ("d1", 2, 1), ("d1", 1, 1)]
    rejected = clicks.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == ["a request that was read before"]
    assert rejected["line"].to_pylist() == [2]


def test_a_log_that_grows_is_refused(
    tmp_path: Path, corpus: Artifact, given: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server writes to it: between the stages, or while it is read."""
    log = tmp_path / "log.jsonl"
    log.write_text(swapped("a", "d0", "d1"))
    told = Clicks(shown=(str(log),))
    queries = [given, shown_queries(told, given, str(tmp_path / "shown-queries"))]
    log.write_text(log.read_text() + line("new", [("d0", 1, 1)]))
    with pytest.raises(ValueError, match="changed since its queries were read"):
        import_clicks(told, queries, corpus, frozenset(), str(tmp_path / "clicks"))

    def lists(*_: Any) -> Any:
        with log.open("a") as more:
            more.write(line("newer", [("d0", 1, 1)]))
        return read_all(*_)

    # That a line comes in just then cannot be arranged from outside; the reading itself is real.
    monkeypatch.setattr("jobs.shown.read_all", lists)
    with pytest.raises(ValueError, match="changed while it was read"):
        shown_queries(told, given, str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_what_shapes_the_clicks_is_what_they_are_known_by(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    log = swapped("a", "d0", "d1") + swapped("Red shoes", "d2", "d3")
    queries, clicks = imported(tmp_path, corpus, given, log, policies=("bixse", "other"))
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "log", moved)

    def again(held_out: frozenset[str] = frozenset(), **settings: Any) -> Artifact:
        told = Clicks(shown=(str(moved),)).replace(policies=("other", "bixse"), **settings)
        found = shown_queries(told, given, queries.url)
        return import_clicks(told, [given, found], corpus, held_out, clicks.url)

    # Where the log lies, the order of policies, and what no other setting has read.
    assert again(largest_weight=5.0, prior_deviation=1.0).fingerprint == clicks.fingerprint
    with pytest.raises(ArtifactError, match="skipped queries"):
        again(frozenset({"q1"}))
    for other in ({"ranks": 3}, {"rank_deviation": 1.0}, {"placement_weights": True}):
        with pytest.raises(ArtifactError):
            again(**other)


def test_impressions_are_counted_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small, so that few impressions are counted in many rounds.
    monkeypatch.setattr("jobs.clicks._WAITING", 3)
    tally, keys = _Tally(), np.random.default_rng(0).integers(0, 40, 500).tolist()
    for key in keys:
        tally.add(key, key % 3 == 0)
    found, counts = tally.counted()
    assert found.tolist() == sorted(set(keys))
    assert counts.tolist() == [
        [keys.count(key), keys.count(key) * (key % 3 == 0)] for key in found.tolist()
    ]


def test_files_of_a_directory_are_read_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (log / "shown-0.jsonl").write_text("")
    (log / "again").symlink_to(log)
    found = expanded([str(log), str(log / "shown-0.jsonl")])
    assert found == [f"file://{log}/shown-0.jsonl"]


def test_ranks_that_nothing_connects_are_rejected(
    tmp_path: Path, corpus: Artifact, given: Artifact
) -> None:
    log = swapped("a", "d0", "d1") + line("a", [("d2", 3, 1), ("d3", 4, 0)])
    _, clicks = imported(tmp_path, corpus, given, log)
    assert clicks.manifest.rows == 4
    rejected = clicks.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == [
        "nothing says what rank 3 does",
        "nothing says what rank 4 does",
    ]
    unread = swapped("a", "d0", "d1").replace('"rank": 1', '"rank": 3')
    with pytest.raises(ValueError, match=r"nobody clicked .* first: nothing says what rank 2 does"):
        imported(tmp_path / "unread", corpus, given, unread, rank_bias=(0.0,))
    _, told = imported(tmp_path / "told", corpus, given, log, rank_bias=(0.5, 0.0, -0.5), ranks=3)
    assert told.manifest.extra["rank_bias"] == [0, -0.5, -1]
    assert told.manifest.rows == 5


def test_placement_weights_say_where_they_do_nothing(
    tmp_path: Path, corpus: Artifact, given: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = line("a", [("d0", 1, 1), ("d1", 2, 1)]) * 5
    told: dict[str, Any] = {"placement_weights": True, "rank_bias": (0.0, -1.0)}
    imported(tmp_path, corpus, given, fixed, **told)
    assert "placement weights are 1" in capsys.readouterr().err
    moved = fixed + line("a", [("d1", 1, 0), ("d0", 2, 0)])
    _, clicks = imported(tmp_path / "b", corpus, given, moved, **told)
    weight = {(r["doc_id"], r["rank"]): r["weight"] for r in clicks.table().to_pylist()}
    assert weight["d0", 2] == pytest.approx(5 * weight["d0", 1])
    # Every place alike weighs 1 too, and is no list that was always shown.
    imported(tmp_path / "c", corpus, given, swapped("a", "d0", "d1"), **told)
    assert not capsys.readouterr().err


def test_an_encoder_learns_what_ranks_do_not_explain(tmp_path: Path) -> None:
    """One of two documents is clicked more often, but where it stood: the other is the better."""
    bodies = texts(16, seed=2)
    rows = [{"doc_id": f"d{n:02}", "title": "", "text": text} for n, text in enumerate(bodies)]
    corpus = artifact(tmp_path / "corpus", "corpus", rows, CORPUS)
    rows = [{"query_id": f"q{n}", "text": text} for n, text in enumerate(texts(8, seed=1))]
    given = artifact(tmp_path / "queries", "queries", rows, QUERIES)
    # The one on top has odds of 1; below, where odds are a quarter, the other has odds of .6.
    log = []
    for query, text in enumerate(texts(8, seed=1)):
        top, below = (f"d{2 * query + side:02}" for side in (query % 2, 1 - query % 2))
        for n in range(160):
            log.append(line(text, [(top, 1, int(n < 80)), (below, 2, int(n < 60))]))
        for n in range(40):
            log.append(line(text, [(below, 1, int(n < 28)), (top, 2, int(n < 8))]))
    _, clicks = imported(tmp_path, corpus, given, "".join(log))
    judged = judge_clicks(clicks, Clicks(), str(tmp_path / "judgments"))
    labels = read_labels(judged, [given], corpus, clicks=clicks, aside=tmp_path)
    settings = Training(
        objective=ClickBCE(),
        batch_size=8,
        docs_per_query=2,
        epochs=60,
        learning_rate=3e-3,
        precision="float32",
    )
    model = load_model(str(save_tiny_encoder(tmp_path / "start")), "cpu")
    trained = train_loop(
        Run(settings, labels, Place(str(tmp_path / "checkpoints")), "x"), model, World()
    )
    query_QE = model.encode(texts(8, seed=1), normalize_embeddings=True)
    cosine = query_QE @ model.encode(bodies, normalize_embeddings=True).T
    assert all(cosine[q, 2 * q + 1 - q % 2] > cosine[q, 2 * q + q % 2] for q in range(8))
    assert 0 < trained.history[-1]["excess"] < 0.5 * trained.history[0]["excess"]


def test_objective_and_clicks_must_fit(tmp_path: Path, corpus: Artifact, given: Artifact) -> None:
    _, clicks = imported(tmp_path, corpus, given, swapped("Old shoes", "d0", "d1"))
    judged = judge_clicks(clicks, Clicks(), str(tmp_path / "judgments"))
    start, out = str(save_tiny_encoder(tmp_path / "start")), str(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"set --judging\.judge clicks"):
        train(judged, [given], corpus, Training(objective=ClickBCE()), start, Placement(), out)
    assert not (tmp_path / "encoder").exists()
    with pytest.raises(ValueError, match="brings judgments and no clicks"):
        Training(objective=ClickBCE(), mix=("elsewhere",))


@pytest.mark.slow
def test_the_recipe_runs_from_a_log_to_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """People click on what half of its text is asked for; the first of the list gets more."""
    data, draw = write_beir(tmp_path / "data", documents=60, queries=40), np.random.default_rng(0)
    asked = [json.loads(one)["text"] for one in (data / "queries.jsonl").read_text().splitlines()]
    lines = []
    for query, text in enumerate(asked):
        for _ in range(30):
            places = draw.permutation([query, *draw.choice(60, 4, replace=False)])
            worth = np.where(places == query, 2.0, -2.0) - np.log(np.arange(1, 6))
            hit = draw.random(5) < 1 / (1 + np.exp(-worth))
            shown = [
                (f"d{d:05d}", k, int(c))
                for k, (d, c) in enumerate(zip(places, hit, strict=True), 1)
            ]
            lines.append(line(text, shown))
    (tmp_path / "log.jsonl").write_text("".join(lines))
    out, start = tmp_path / "out", str(save_tiny_encoder(tmp_path / "start"))
    flags = ["--data", str(data), "--out", str(out), "--start", start, "--json"]
    flags += ["--judging.clicks.shown", str(tmp_path / "log.jsonl")]
    flags += ["--training.epochs", "12", "--training.learning-rate", "2e-3"]
    main("pipeline", ["two_tower", *flags])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(summary["ndcg@10"]) == {"bm25", "base", "trained"}
    clicks = Artifact.open(f"{out}/clicks")
    assert clicks.manifest.extra["held_out_lists"] == 20 * 30
    encoder = Artifact.open(f"{out}/encoder")
    assert encoder.manifest.inputs["clicks"] == clicks.fingerprint
    curve = [json.loads(one) for one in encoder.place.read("training.jsonl").splitlines()]
    assert curve[-1]["excess"] < 0.7 * curve[0]["excess"]
    main("train", ["two_tower", *flags])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["at"] == encoder.url

"""synthesise on Ray: every drawn document accounted for, restarted at any point, no repeats."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bixse.artifacts import Artifact, ArtifactError, begin, parquet_bytes, part_name
from bixse.records import CORPUS, QUERIES, Document, Query, text_hash
from bixse.synthesis.queries import cloze, draw_order
from bixse.synthesis.settings import Cloze
from jobs.parts import row_units, rows_of
from jobs.recipe import Placement
from jobs.synthesise import ClozeWork, synthesise
from tests.encoders import texts

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = Cloze(queries=2400, seed=3)
PLACEMENT = Placement()

CHILD = """
import json, sys
from bixse.artifacts import Artifact
from bixse.synthesis.settings import Cloze
from jobs.recipe import Placement
from jobs.synthesise import synthesise
corpus, out, settings = sys.argv[1:]
synthesise(Artifact.open(corpus), Cloze(**json.loads(settings)), Placement(), out)
"""


def write(url: Path, kind: str, rows: list[Document] | list[Query], part_rows: int) -> Artifact:
    draft = begin(str(url), kind, config={}, inputs={})
    assert not isinstance(draft, Artifact)
    schema = CORPUS if kind == "corpus" else QUERIES
    for number, start in enumerate(range(0, len(rows), part_rows)):
        draft.write_part(number, rows_of(rows[start : start + part_rows], schema))
    return draft.finish()


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """3,000: invented sentences of 3 to 12 words; every tenth repeats another under a new id."""
    bodies = texts(2700, seed=5)
    bodies += [f"{text}." for text in bodies[:300]]
    return [Document(f"d{n:05d}", "", text) for n, text in enumerate(bodies)]


@pytest.fixture(scope="module")
def corpus(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write(tmp_path_factory.mktemp("data") / "corpus", "corpus", documents, 700)


@pytest.fixture(scope="module")
def whole(corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return synthesise(corpus, SETTINGS, PLACEMENT, str(tmp_path_factory.mktemp("s") / "synthetic"))


def test_each_drawn_document_is_one_query_or_one_rejection(
    documents: list[Document], whole: Artifact
) -> None:
    order = sorted((draw_order(d.doc_id, SETTINGS.seed), d.doc_id) for d in documents)
    drawn = {doc_id for _, doc_id in order[: SETTINGS.queries]}
    rows = whole.table().to_pylist()
    rejected = whole.rejected()
    assert rejected is not None
    asked = [row["seed_doc_id"] for row in rows]
    lost = rejected["doc_id"].to_pylist()
    assert sorted(asked + lost) == sorted(drawn)
    assert (whole.manifest.rows, whole.manifest.rejected) == (len(asked), len(lost))
    assert whole.manifest.extra["seeds"] == SETTINGS.queries
    assert len(whole.parts()) == 3
    by_id = {d.doc_id: d for d in documents}
    for row in rows:
        assert Query(**row) == cloze(by_id[row["seed_doc_id"]], SETTINGS)


def test_of_equal_queries_the_one_drawn_first_stays(whole: Artifact) -> None:
    rejected = whole.rejected()
    assert rejected is not None
    kept = {text_hash(row["text"]): row for row in whole.table().to_pylist()}
    assert len(kept) == whole.manifest.rows
    repeats = [r for r in rejected.to_pylist() if r["reason"].startswith("equals the query")]
    assert len(repeats) > 50
    for row in repeats:
        first = kept[text_hash(row["response"])]
        assert row["reason"] == f"equals the query {first['query_id']}"
        assert draw_order(first["seed_doc_id"], 3) < draw_order(row["doc_id"], 3)


def test_the_order_and_the_parts_of_the_corpus_change_no_query(
    documents: list[Document], whole: Artifact, tmp_path: Path
) -> None:
    other = write(tmp_path / "corpus", "corpus", documents[::-1], 3000)
    again = synthesise(other, SETTINGS, Placement(judge_actors=2), str(tmp_path / "synthetic"))
    rows = sorted(whole.table().to_pylist(), key=lambda row: row["query_id"])
    assert sorted(again.table().to_pylist(), key=lambda row: row["query_id"]) == rows


def test_no_query_equals_a_given_one(corpus: Artifact, whole: Artifact, tmp_path: Path) -> None:
    taken = whole.table().to_pylist()[:3]
    questions = [Query(f"q{n}", f"  {row['text'].upper()} ") for n, row in enumerate(taken)]
    given = write(tmp_path / "queries", "queries", questions, 10)
    made = synthesise(corpus, SETTINGS, PLACEMENT, str(tmp_path / "synthetic"), given)
    rejected = made.rejected()
    assert rejected is not None
    reasons = {row["doc_id"]: row["reason"] for row in rejected.to_pylist()}
    assert all(reasons[row["seed_doc_id"]] == "equals a given query" for row in taken)
    assert made.manifest.rows + made.manifest.rejected == SETTINGS.queries


def test_killed_between_rejections_and_rows_a_rerun_makes_the_same(
    corpus: Artifact, whole: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "synthetic"
    shutil.copytree(whole.local_directory(), out)
    (out / "manifest.json").unlink()
    # The rows of the middle part as they were before its repeats were rejected; the last is lost.
    unit = row_units(Artifact.open(f"{whole.url}-seeds"), 1000)[1]
    raw, _ = ClozeWork(SETTINGS)(unit.read())
    draft = begin(str(out), "queries", config=SETTINGS.model_dump(mode="json"),
                  inputs={"corpus": corpus.fingerprint})  # fmt: skip
    assert not isinstance(draft, Artifact)
    # Not by `write_part`, which takes the rejections of the part away with it.
    draft.place.write(part_name(1), parquet_bytes(raw))
    (out / part_name(2)).unlink()
    again = synthesise(corpus, SETTINGS, PLACEMENT, str(out))
    assert again.fingerprint == whole.fingerprint


@pytest.mark.slow
def test_killed_with_minus_nine_a_rerun_makes_the_same(
    corpus: Artifact, whole: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "synthetic"
    line = [sys.executable, "-c", CHILD, corpus.url, str(out), json.dumps(SETTINGS.model_dump())]
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    wait_until = time.monotonic() + 200
    while not any(out.glob("part-*.parquet")):
        assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < wait_until
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(60)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        Artifact.open(str(out))
    again = synthesise(corpus, SETTINGS, PLACEMENT, str(out))
    assert again.fingerprint == whole.fingerprint


def test_more_queries_than_documents_asks_each_once(tmp_path: Path) -> None:
    one = Document("d", "", "The only document says something about tea.")
    corpus = write(tmp_path / "corpus", "corpus", [one], 10)
    made = synthesise(corpus, Cloze(queries=50), PLACEMENT, str(tmp_path / "synthetic"))
    assert made.table()["query_id"].to_pylist() == ["cloze:d"]
    assert made.manifest.rejected == 0


def test_another_seed_is_refused_where_a_draw_stands(corpus: Artifact, whole: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"config\.seed = 3, now config\.seed = 4"):
        synthesise(corpus, SETTINGS.replace(seed=4), PLACEMENT, whole.url)

"""A scorer and a generator tuned by Ray Train on labels: what they learn, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact
from bixse.judging.settings import Pointwise
from bixse.records import JUDGMENTS
from bixse.synthesis.settings import Generator
from bixse.training.settings import Tuning
from jobs.ingest import Ingested, ingest
from jobs.recipe import Ingest, Placement
from jobs.tuning import Labels, read_labels, refuse_worse, tune_generator, tune_scorer, with_log
from tests.artifacts import drafted
from tests.encoders import texts

TUNING = Tuning(batch_size=8, epochs=5, learning_rate=3e-3, held_out=0.25, checkpoint_every=5)
SCORER = Pointwise(dtype="float32", max_model_len=2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    """Documents that say their grade: what a judge of few weights can learn in a minute."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "qrels").mkdir()
    asked = texts(15, seed=3)
    corpus, queries, qrels = [], [], {"train": [], "test": []}
    for number, text in enumerate(asked):
        queries.append({"_id": f"q{number}", "text": text[:30]})
        for grade in range(4):
            corpus.append({"_id": f"d{number}-{grade}", "title": "", "text": str(grade) * 6})
            split = "test" if number >= 12 else "train"
            qrels[split].append(f"q{number}\td{number}-{grade}\t{grade}\n")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(lines)
        )
    return ingest(str(folder), Ingest(), str(folder / "out"))


def labels(data: Ingested, skip: frozenset[str] = frozenset()) -> Labels:
    return read_labels(data.corpus, data.queries, data.qrels, TUNING, skip)


def test_held_out_queries_are_apart_and_test_queries_are_nowhere(data: Ingested) -> None:
    found = labels(data, skip=frozenset({"q0"}))
    known, apart = ({label.query_id for label in part} for part in (found.known, found.held_out))
    assert not known & apart
    assert known | apart == {f"q{number}" for number in range(1, 12)}
    assert len(apart) == 3
    assert {round(label.relevance * 3, 5) for label in found.known} == {0, 1, 2, 3}


def test_no_text_is_tuned_on_and_held_out_under_two_ids(tmp_path: Path) -> None:
    asked = [{"_id": f"{n}-{copy}", "text": f"text {n}"} for n in range(20) for copy in "ab"]
    documents = [{"_id": row["_id"], "text": f"document {row['_id']}"} for row in asked]
    for name, rows in (("corpus", documents), ("queries", asked)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "qrels").mkdir()
    grades = "".join(f"{row['_id']}\t{row['_id']}\t{n % 2}\n" for n, row in enumerate(asked))
    (tmp_path / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{grades}")
    found = labels(ingest(str(tmp_path), Ingest(), str(tmp_path / "out")))
    known, apart = ({label.query for label in part} for part in (found.known, found.held_out))
    assert not known & apart
    assert (len(found.known), len(found.held_out)) == (30, 10)


def test_too_few_labels_are_refused(data: Ingested) -> None:
    with pytest.raises(ValueError, match="two queries or more"):
        labels(data, skip=frozenset(f"q{number}" for number in range(1, 12)))


def test_a_graded_log_adds_pairs_for_the_generator(data: Ingested, tmp_path: Path) -> None:
    """Of the documents that the scorer gave two grades or more, with the texts that they have."""
    rows = [
        {"query_id": q, "doc_id": d, "grade_probs": probs, "relevance": 0.5, "judge": "scorer"}
        for q, d, probs in [
            ("q13", "d0-3", [0, 0, 0.2, 0.8]),
            ("q14", "d0-3", [0.9, 0.1, 0, 0]),
            ("q13", "d1-0", [1, 0, 0, 0]),
        ]
    ]
    draft = drafted(tmp_path / "scores", "judgments")
    draft.write_part(0, pa.Table.from_pylist(rows, schema=JUDGMENTS))
    scores = draft.finish(extra={"scale": {"name": "umbrela", "values": [0, 1, 2, 3]}})
    found = labels(data)
    more = with_log(found, scores, data.queries, data.corpus)
    assert (more.known, more.held_out) == (found.known, found.held_out)
    assert [(pair.query_id, pair.document, pair.relevance) for pair in more.logged] == [
        ("q14", "333333", 0.0), ("q13", "333333", 1.0)
    ]  # fmt: skip
    assert more.logged[0].query == texts(15, seed=3)[14][:30].strip()
    assert more.inputs == {**found.inputs, "log": scores.fingerprint}


@pytest.fixture(scope="module")
def scorer(data: Ingested, tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("scorer") / "scorer"
    start = SCORER.replace(model=tiny_llm)
    return tune_scorer(labels(data), start, TUNING, Placement(), str(out))


@pytest.mark.slow
def test_a_tuned_scorer_agrees_with_labels_it_has_not_seen(scorer: Artifact) -> None:
    before, after = (scorer.manifest.extra[when] for when in ("before", "after"))
    assert scorer.manifest.extra["held_out"] == 12
    assert scorer.manifest.rows == 48
    assert after["log_prob"] > before["log_prob"]
    assert after["same_grade"] > max(0.6, before["same_grade"])
    refuse_worse(scorer)


@pytest.mark.slow
def test_it_is_finished_once_and_belongs_to_its_start(
    scorer: Artifact, data: Ingested, tiny_llm: str, tiny_writer: str
) -> None:
    again = tune_scorer(
        labels(data), SCORER.replace(model=tiny_llm), TUNING, Placement(), scorer.url
    )
    assert again.fingerprint == scorer.fingerprint
    assert not Path(f"{scorer.url}-checkpoints").exists()
    with pytest.raises(ValueError, match=r"inputs\.start"):
        tune_scorer(
            labels(data), SCORER.replace(model=tiny_writer), TUNING, Placement(), scorer.url
        )


@pytest.mark.slow
def test_a_worse_scorer_is_refused(scorer: Artifact) -> None:
    manifest = scorer.manifest
    turned = {"before": manifest.extra["after"], "after": manifest.extra["before"]}
    worse = Artifact(
        scorer.place, manifest.model_copy(update={"extra": {**manifest.extra, **turned}})
    )
    with pytest.raises(ValueError, match="the grade that people gave, before"):
        refuse_worse(worse)


@pytest.mark.slow
def test_a_tuned_generator_finds_unseen_queries_likelier_and_rejects_what_does_not_fit(
    data: Ingested, tiny_llm: str, tmp_path: Path
) -> None:
    start = Generator(model=tiny_llm, dtype="float32", max_model_len=1400)
    known, out = labels(data), str(tmp_path / "generator")
    long = known.known[0]
    known.known[0] = replace(long, query=long.query * 100)
    made = tune_generator(known, None, data.corpus, start, TUNING, Placement(), out)
    extra = made.manifest.extra
    assert extra["final_loss"] < 0.8 * extra["first_loss"]
    assert extra["after"]["log_prob"] > extra["before"]["log_prob"] + 0.5
    assert (made.manifest.rows, made.manifest.rejected) == (47, 1)
    rejected = made.rejected().to_pylist()
    assert [row["doc_id"] for row in rejected] == [long.doc_id]
    assert "the model reads 1400" in rejected[0]["reason"]

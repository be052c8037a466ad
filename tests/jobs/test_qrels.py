"""Grades of people in BEIR's and TREC's files: scales, splits, and what is rejected."""

import weakref
from pathlib import Path
from typing import Any

import pytest

import jobs.incoming as incoming_module
import jobs.qrels as qrels_module
from jobs.qrels import why_rejected
from tests.jobs.ingested import DOCS, graded, jsonl, rejected, run


def test_queries_and_qrels(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    jsonl(data / "corpus.jsonl", DOCS)
    queries = [{"_id": "a", "text": "tea"}, {"_id": "b", "text": ""}, {"_id": "c", "text": "x"}]
    copies = [{"_id": "a", "text": "again"}, {"_id": "copy of c", "text": "X "}]
    jsonl(data / "queries.jsonl", [*queries, *copies])
    header = "query-id\tcorpus-id\tscore\n"
    train = (
        "a\t1\t3\na\t2\t1\nc\t3\t2\na\t9\t1\nz\t1\t1\na\t1\t2\na\t3\tbad\n"
        "a\t3\t-1\na 3\ncopy of c\t1\t2\n"
    )
    (data / "qrels" / "train.tsv").write_text(header + train)
    (data / "qrels" / "test.tsv").write_text(header + "c\t1\t0\n")
    ingested = run(data, tmp_path / "out")
    assert ingested.queries.table()["query_id"].to_pylist() == ["a", "c", "copy of c"]
    assert rejected(ingested, "queries") == [(2, "empty query"), (4, "duplicate id")]
    rows = ingested.qrels.table().select(["split", "query_id", "doc_id", "relevance"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("test", "c", "1", 0.0),
        ("train", "a", "1", 1.0),
        ("train", "a", "2", pytest.approx(1 / 3)),
    ]
    assert sorted(reason for _, reason in rejected(ingested, "qrels")) == [
        "expected 3 or 4 columns, found 2",
        "grade -1 is outside the scale",
        "judged twice",
        "the grade is not a number",
        "the query stands in split test already",
        "the query stands in split test already",
        "unknown doc_id",
        "unknown query_id",
    ]
    extra = dict(ingested.qrels.manifest.extra)
    reasons = extra.pop("rejected_for")
    assert reasons["the query stands in split test already"] == 2
    assert len(reasons) == 5
    assert extra == {"scale": [0.0, 1.0, 2.0, 3.0], "splits": {"test": 1, "train": 1}}


def test_grades_are_not_held_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    jsonl(data / "corpus.jsonl", DOCS)
    names = [f"q{n}" for n in range(700)]
    jsonl(data / "queries.jsonl", [{"_id": name, "text": name} for name in names])
    lines = [f"{name}\t{doc}\t{n % 4}\n" for n, name in enumerate(names) for doc in (1, 2, 1)]
    (data / "qrels" / "train.tsv").write_text("".join(lines))
    whole = run(data, tmp_path / "whole")
    grades: set[int] = set()
    most, held, made = [0], qrels_module._given, qrels_module._Grade

    def counted(*given: Any) -> Any:
        grade = made(*given)
        grades.add(id(grade))
        weakref.finalize(grade, grades.discard, id(grade))
        return grade

    def given(grade: Any, scale: Any) -> dict[str, Any]:
        most[0] = max(most[0], len(grades))
        return held(grade, scale)

    # What is made of each line, and where each becomes a row: to count those that live.
    monkeypatch.setattr(qrels_module, "_Grade", counted)
    monkeypatch.setattr(qrels_module, "_given", given)
    monkeypatch.setattr(incoming_module, "_HELD_ROWS", 64)
    again = run(data, tmp_path / "again")
    assert 0 < most[0] < 5
    assert again.qrels.table().equals(whole.qrels.table())
    assert (again.qrels.manifest.rows, again.qrels.manifest.rejected) == (1400, 700)


def test_one_wild_grade_spoils_no_scale(tmp_path: Path) -> None:
    data = tmp_path / "data"
    graded(data, "a\t1\t2\na\t2\tinf\na\t3\tnan\nnobody\t1\t99\n")
    ingested = run(data, tmp_path / "out")
    assert ingested.qrels.manifest.extra["scale"] == [0.0, 1.0, 2.0]
    assert ingested.qrels.manifest.rejected == 3


def test_trec_qrels_and_fractional_grades(tmp_path: Path) -> None:
    data = tmp_path / "data"
    graded(data, "a 0 1 0.25\na 0 2 1\n")
    rows = run(data, tmp_path / "out").qrels.table().to_pylist()
    assert [row["relevance"] for row in rows] == [0.25, 1.0]
    assert rows[0]["grade_probs"] == [0.75, 0.25]
    assert {row["origin"] for row in rows} == {"human"}


@pytest.mark.parametrize("header", ["", "query-id\tcorpus-id\tscore\n"])
def test_a_byte_order_mark_costs_no_grade(header: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    graded(data, f"{header}a\t1\t1\na\t2\t1\n", encoding="utf-8-sig")
    qrels = run(data, tmp_path / "out").qrels
    assert qrels.table()["doc_id"].to_pylist() == ["1", "2"]
    assert qrels.manifest.rejected == 0


def test_a_judge_without_grades_says_what_became_of_the_lines(tmp_path: Path) -> None:
    """Columns the other way round were rejected one by one, and `no given grades` was all."""
    data = tmp_path / "data"
    graded(data, "corpus-id\tquery-id\tscore\n1\ta\t1\n2\ta\t0\n", "train")
    qrels = run(data, tmp_path / "out").qrels
    assert why_rejected(qrels) == "; 2 lines of the qrels were rejected: unknown query_id (2)"

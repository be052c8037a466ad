"""Metadata of rows: what is kept, of which kind, and what is a rejected row."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bixse.artifacts import Artifact
from bixse.records import CORPUS
from jobs.ingest import ingest
from jobs.recipe import Ingest


def lines(place: Path, metadata: list[Any]) -> Path:
    path = place / "corpus.jsonl"
    rows = [
        {"_id": f"d{number}", "text": f"text {number}", "metadata": one}
        for number, one in enumerate(metadata)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus_of(data: Path, **settings: Any) -> Artifact:
    return ingest(str(data), Ingest(**settings), str(data.parent / "out")).corpus


def found(corpus: Artifact) -> dict[str, Any]:
    names = [name for name in sorted(corpus.manifest.files) if name.startswith("metadata/")]
    rows = [row for name in names for row in corpus.part(name).to_pylist()]
    return {row["doc_id"]: json.loads(row["metadata"]) for row in rows}


def test_the_metadata_object_of_json_lines_is_kept_beside_the_rows(tmp_path: Path) -> None:
    given = [
        {"brand": "acme", "price": 9.5, "new": True, "tags": ["a", "b"]},
        {},
        {"price": 3, "brand": None},
        None,
        {"tags": []},
    ]
    corpus = corpus_of(lines(tmp_path, given), part_rows=2, metadata=("all",))
    wanted = {"d0": given[0], "d2": {"price": 3}, "d4": {"tags": []}}
    assert found(corpus) == wanted
    kinds = {"brand": "text", "price": "number", "new": "boolean", "tags": "texts"}
    assert corpus.manifest.extra["metadata"] == kinds
    assert corpus.table().schema == CORPUS
    assert corpus.manifest.rows == 5


def test_a_corpus_without_metadata_is_what_it_was(tmp_path: Path) -> None:
    corpus = corpus_of(lines(tmp_path, [None, {"nested": {}}]))
    assert list(corpus.manifest.files) == ["part-00000.parquet"]
    assert "metadata" not in corpus.manifest.extra
    assert corpus.manifest.config == {"source": "auto", "part_rows": 50_000}


def test_what_cannot_be_held_is_a_rejected_row(tmp_path: Path) -> None:
    given: list[Any] = [
        {"price": 1},
        {"price": "cheap", "brand": "acme"},
        {"brand": 7},
        {"brand": {"name": "acme"}},
        {"tags": ["a", 1]},
        {"price": float("nan")},
        {"price": 2**60},
        {"not": "x"},
        ["a"],
    ]
    corpus = corpus_of(lines(tmp_path, given), metadata=("all",))
    rejected = corpus.rejected()
    assert rejected is not None
    reasons = dict(zip(rejected["doc_id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert reasons.pop("d1") == "metadata price is a string, expected a number"
    assert reasons.pop("d7") == "metadata field 'not' cannot be called so"
    assert reasons.pop("d8") == "metadata is not an object"
    assert set(reasons) == {"d3", "d4", "d5", "d6"}
    assert all("is not a string, a number" in reason for reason in reasons.values())
    # A row that was rejected has said nothing of the kind of its other fields.
    assert found(corpus) == {"d0": {"price": 1}, "d2": {"brand": 7}}


def test_named_fields_alone(tmp_path: Path) -> None:
    data = lines(tmp_path, [{"price": 1, "nested": {}}, {"nested": []}])
    corpus = corpus_of(data, metadata=("price",))
    assert found(corpus) == {"d0": {"price": 1}}
    assert corpus.manifest.config["metadata"] == ["price"]
    assert corpus.manifest.rejected == 0


def test_columns_of_a_csv(tmp_path: Path) -> None:
    data = tmp_path / "documents.csv"
    with data.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "text", "brand", "price", "new"])
        writer.writerows([
            ["a", "x", "acme", "9.5", "TRUE"],
            ["b", "y", "", "", "false"],
            ["c", "z", "7", "cheap", ""],
        ])  # fmt: skip
    corpus = corpus_of(data, metadata=("brand", "price:number", "new:boolean"))
    assert found(corpus) == {
        "a": {"brand": "acme", "price": 9.5, "new": True},
        "b": {"new": False},
    }
    rejected = corpus.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == ["metadata price is a string, expected a number"]


def test_columns_of_parquet(tmp_path: Path) -> None:
    data = tmp_path / "documents.parquet"
    rows = [{"id": "a", "text": "x", "price": 5, "tags": ["t"]}, {"id": "b", "text": "y"}]
    pq.write_table(pa.Table.from_pylist(rows), data)
    corpus = corpus_of(data, metadata=("price", "tags"))
    assert found(corpus) == {"a": {"price": 5, "tags": ["t"]}}


def test_an_object_in_a_column_of_parquet(tmp_path: Path) -> None:
    data = tmp_path / "documents.parquet"
    rows = [{"id": "a", "text": "x", "metadata": {"price": 5}, "brand": "acme", "metadatum": 1}]
    pq.write_table(pa.Table.from_pylist(rows), data)
    corpus = corpus_of(data, metadata=("price", "brand"))
    assert found(corpus) == {"a": {"price": 5, "brand": "acme"}}


@pytest.mark.parametrize(
    ("form", "names", "sentence"),
    [
        ("csv", ("colour",), "has no column colour: found id, text"),
        ("jsonl", ("colour",), "no document has 'colour', which --ingest.metadata names"),
        ("jsonl", ("price:money",), "is one of text, number, boolean, texts, not 'money'"),
    ],
)
def test_a_field_that_nobody_has(
    form: str, names: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    data = lines(tmp_path, [{"price": 1}])
    if form == "csv":
        data = tmp_path / "documents.csv"
        data.write_text("id,text\n1,x\n")
    with pytest.raises(ValueError, match=sentence):
        corpus_of(data, metadata=names)


def test_a_field_that_nobody_has_may_be_corrected(tmp_path: Path) -> None:
    """Parts that were whole by then made the corrected flag another config."""
    data, out = lines(tmp_path, [{"price": 1}] * 3), str(tmp_path / "out")
    with pytest.raises(ValueError, match="no document has 'prize'"):
        ingest(str(data), Ingest(metadata=("prize",), part_rows=1), out)
    made = ingest(str(data), Ingest(metadata=("price",), part_rows=1), out)
    assert made.corpus.manifest.rows == 3


def test_too_many_fields(tmp_path: Path) -> None:
    data = lines(tmp_path, [{f"f{n}": 1 for n in range(101)}])
    with pytest.raises(ValueError, match="more than 100 fields: name those to keep"):
        corpus_of(data, metadata=("all",))

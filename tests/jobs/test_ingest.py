"""Every format in, the same records out; every bad row a rejection with its line."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import ingest as ingest_module
from jobs.files import fingerprint
from tests.jobs.ingested import DOCS, jsonl, rejected, run, table

WRITERS: dict[str, Callable[[Path], None]] = {
    "beir": lambda d: jsonl(d / "corpus.jsonl", DOCS),
    "jsonl": lambda d: jsonl(d / "documents.jsonl", DOCS),
    "csv": lambda d: table(d / "documents.csv", DOCS, ","),
    "tsv": lambda d: table(d / "documents.tsv", DOCS, "\t"),
    "parquet": lambda d: pq.write_table(pa.Table.from_pylist(DOCS), d / "documents.parquet"),
}


@pytest.mark.parametrize("form", list(WRITERS))
def test_every_format_gives_the_same_records(form: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[form](data)
    corpus = run(data, tmp_path / "out").corpus
    wanted = [{"doc_id": d["_id"], "title": d["title"], "text": d["text"]} for d in DOCS]
    assert corpus.table().to_pylist() == wanted
    assert corpus.manifest.rejected == 0


def test_a_folder_of_text(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "a.md").write_text("# Tea\n\nLeaves.")
    (data / "deep" / "b.txt").write_text("Beans.")
    (data / "empty.txt").write_text(" \n")
    (data / "latin.txt").write_bytes(b"caf\xe9")
    ingested = run(data, tmp_path / "out")
    assert ingested.corpus.table().to_pylist() == [
        {"doc_id": "a.md", "title": "Tea", "text": "Leaves."},
        {"doc_id": "deep/b.txt", "title": "b", "text": "Beans."},
    ]
    assert rejected(ingested) == [(None, "empty text"), (None, "not UTF-8")]


def test_two_colons_in_a_name_are_no_chain_of_urls(tmp_path: Path) -> None:
    data = tmp_path / "x::y"
    data.mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "other.md").write_text("What a chain of URLs would have found.")
    (data / "std::vector.md").write_text("A row of values.")
    for number, path in enumerate((data, data / "std::vector.md")):
        corpus = run(path, tmp_path / f"out{number}").corpus
        assert corpus.table()["doc_id"].to_pylist() == ["std::vector.md"]
    with pytest.raises(ValueError, match=r"no data at .*x::z"):
        run(tmp_path / "x::z", tmp_path / "out")


def test_a_text_whose_name_is_not_utf8_is_a_rejected_row(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "tea.md").write_text("Leaves.")
    (data / os.fsdecode(b"caf\xe9.md")).write_text("Beans.")
    corpus = run(data, tmp_path / "out").corpus
    assert corpus.table()["doc_id"].to_pylist() == ["tea.md"]
    found = corpus.rejected()
    assert found is not None
    assert found.select(["source", "reason"]).to_pylist() == [
        {"source": "caf\\xe9.md", "reason": "the name of the file is not UTF-8"}
    ]


def test_rows_of_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    jsonl(folder / "corpus.jsonl", [DOCS[0], {"_id": "2"}])
    corpus = run(folder, tmp_path / "out").corpus
    assert corpus.table()["doc_id"].to_pylist() == ["1"]
    found = corpus.rejected()
    assert found is not None
    assert found["source"].to_pylist() == [f"{tmp_path}/caf\\xe9/corpus.jsonl"]
    (folder / "queries.csv").write_text('id,text\na,"tea\n')
    with pytest.raises(ValueError, match=r"/caf\\xe9/queries.csv is not CSV"):
        run(folder, tmp_path / "out2")


def test_bad_rows_are_rejected_with_their_line(tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    lines = [
        b'{"_id": "1", "text": "fine"}',
        b'{"_id": "2", "text": ',
        b'{"text": "no id"}',
        b'{"_id": "4", "text": "  "}',
        b'{"_id": "1", "text": "other"}',
        b'{"_id": "1", "text": "FINE"}',
        b'{"_id": "7", "text": 3.5}',
        b'["a", "list"]',
        b'{"_id": "9", "text": "\\ud800"}',
        b'{"_id": "10", "text": "\xff"}',
        b"",
        b'{"_id": 12, "text": "a number is a fine id"}',
    ]
    data.write_bytes(b"\n".join(lines))
    ingested = run(data, tmp_path / "out")
    assert ingested.corpus.table()["doc_id"].to_pylist() == ["1", "12"]
    assert rejected(ingested) == [
        (2, "broken JSON"),
        (3, "missing id"),
        (4, "empty text"),
        (5, "duplicate id with other text"),
        (6, "duplicate id with the same text"),
        (7, "text is not text"),
        (8, "not a JSON object"),
        (9, "text is not valid Unicode"),
        (10, "not UTF-8"),
    ]
    row = ingested.corpus.rejected().to_pylist()[0]
    assert row["source"].endswith("corpus.jsonl")
    assert row["response"] == '{"_id": "2", "text": \n'


def test_a_line_that_is_nested_too_deeply_is_a_rejected_row(tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    # Some of these can still be read, as deep as the stack is, and must be written as a rejection.
    depths = [*range(700, 1000), 200_000]
    lines = [
        '{"_id": "1", "text": "fine"}',
        *('{"text": ' + "[" * d + "]" * d + "}" for d in depths),
    ]
    data.write_text("\n".join(lines))
    ingested = run(data, tmp_path / "out")
    assert ingested.corpus.table()["doc_id"].to_pylist() == ["1"]
    found = rejected(ingested)
    assert [line for line, _ in found] == list(range(2, len(lines) + 1))
    assert found[-1] == (len(lines), "nested too deeply")
    assert {reason for _, reason in found} <= {"text is not text", "nested too deeply"}


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
)
YEAR_29349 = pa.array([10_000_000], pa.date32())


@pytest.mark.parametrize("foreign", [NOT_UTF8, YEAR_29349])
def test_a_column_that_nobody_asked_for_is_not_read(foreign: pa.Array, tmp_path: Path) -> None:
    data = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"id": ["1"], "text": ["tea"], "foreign": foreign}), data)
    assert run(data, tmp_path / "out").corpus.table()["doc_id"].to_pylist() == ["1"]
    pq.write_table(pa.table({"id": ["1"], "foreign": foreign}), data)
    with pytest.raises(ValueError, match=r"has no column text .*: found id, foreign$"):
        run(data, tmp_path / "out2")
    pq.write_table(pa.table({"foreign": foreign}), data)
    with pytest.raises(ValueError, match=r"has no column doc_id .*: found foreign$"):
        run(data, tmp_path / "out3")


@pytest.mark.parametrize("column", [NOT_UTF8, YEAR_29349])
def test_a_column_that_cannot_be_read(column: pa.Array, tmp_path: Path) -> None:
    data = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"id": ["1"], "text": ["tea"], "day": column}), data)
    with pytest.raises(ValueError, match=r"cannot read .*documents.parquet after row 0: "):
        run(data, tmp_path / "out", metadata=("day",))


@pytest.mark.parametrize("place", [0.5, 0.9999])
def test_a_damaged_parquet_file_is_named(place: float, tmp_path: Path) -> None:
    data = tmp_path / "documents.parquet"
    rows = [{"id": str(n), "text": f"{n * n} leaves"} for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), data)
    raw = bytearray(data.read_bytes())
    # A page in the middle, and the description of the columns at the end.
    middle = int(len(raw) * place) - 100
    raw[middle : middle + 80] = b"\xff" * 80
    data.write_bytes(raw)
    with pytest.raises(ValueError, match=r"cannot read .*documents.parquet") as error:
        run(data, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_python_docs_reads_no_data_of_yours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would not be read"):
        run(tmp_path, tmp_path / "out", source="python-docs")


@pytest.mark.parametrize(
    ("name", "content", "changes", "problem"),
    [
        ("corpus.jsonl", b"", {}, "no valid document"),
        ("corpus.jsonl", b"\x00\x01binary\n", {}, r"no valid document .* line 1: broken JSON"),
        ("docs.parquet", b"not parquet at all", {}, "is not a Parquet file"),
        ("docs.csv", b"name,words\na,b\n", {}, "has no column doc_id .* found name, words"),
        ("docs.csv.gz", gzip.compress(b"name,words\na,b\n"), {}, "has no column doc_id"),
        ("docs.csv", b"doc_id,text\na,\xff\n", {}, "is not UTF-8"),
        ("docs.csv", b'doc_id,text\na,"y\nb,z\n', {}, "is not CSV from line 2 on: unexpected end"),
        ("docs.xlsx", b"x", {}, "no corpus in"),
        ("docs.jsonl", b"{}", {"source": "beir"}, "is not in BEIR layout"),
        ("docs.jsonl", b"{}", {"source": "csv"}, "found none of .csv .tsv"),
    ],
)
def test_a_file_that_is_not_what_it_claims(
    name: str, content: bytes, changes: dict[str, str], problem: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        run(data, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "corpus" / "manifest.json").exists()


def test_missing_and_mixed_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data is missing"):
        run(None, tmp_path / "out")
    with pytest.raises(ValueError, match="no data at"):
        run(tmp_path / "absent", tmp_path / "out")
    jsonl(tmp_path / "a.jsonl", DOCS)
    (tmp_path / "b.csv").write_text("doc_id,text\n1,x\n")
    with pytest.raises(ValueError, match="holds jsonl and csv files: say which"):
        run(tmp_path, tmp_path / "out")


def test_changed_data_is_refused_and_unchanged_data_is_kept(tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    jsonl(data, DOCS)
    first = run(data, tmp_path / "out")
    assert run(data, tmp_path / "out").corpus.fingerprint == first.corpus.fingerprint
    jsonl(data, DOCS[:2])
    with pytest.raises(ValueError, match=r"inputs.data = .*, now inputs.data = "):
        run(data, tmp_path / "out")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_file_that_is_still_being_written_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows stood under the fingerprint of what it had been, and later runs refused the rest."""
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "corpus.jsonl", DOCS)
    jsonl(data / "queries.jsonl", [{"_id": "q1", "text": "tea"}])

    def written_meanwhile(urls: Any, root: str = "") -> str:
        found = fingerprint(urls, root)
        with open(data / name, "a") as handle:
            handle.write(json.dumps({"_id": "late", "title": "", "text": "more"}) + "\n")
        return found

    # Who writes in the middle, at a moment that no race decides.
    with monkeypatch.context() as patched:
        patched.setattr(ingest_module, "fingerprint", written_meanwhile)
        with pytest.raises(ValueError, match=f"{name} changed while it was read: run again"):
            run(data, tmp_path / "out")
    made = run(data, tmp_path / "out")
    assert made.corpus.manifest.rows + made.queries.manifest.rows == len(DOCS) + 2


def test_one_megabyte_and_many_parts(tmp_path: Path) -> None:
    rows = [{"_id": str(n), "text": "long " * 200_000 if n == 3 else f"t{n}"} for n in range(10)]
    jsonl(tmp_path / "corpus.jsonl", rows)
    corpus = run(tmp_path / "corpus.jsonl", tmp_path / "out", part_rows=4).corpus
    assert corpus.parts() == [f"part-0000{n}.parquet" for n in range(3)]
    assert corpus.table()["doc_id"].to_pylist() == [str(n) for n in range(10)]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=20)), min_size=1))
def test_rows_in_are_rows_out_and_rejections(
    tmp_path: Path, documents: list[tuple[str, str]]
) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    rows = [{"_id": "always", "text": "there"}, *({"_id": i, "text": t} for i, t in documents)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = run(folder / "corpus.jsonl", folder / "out").corpus.manifest
    assert manifest.rows + manifest.rejected == len(rows)


def test_queries_of_which_none_can_be_read_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "corpus.jsonl", DOCS)
    jsonl(data / "queries.jsonl", [{"_id": "a", "question": "tea?"}])
    with pytest.raises(
        ValueError, match=r"no valid query in .*queries.jsonl.* line 1: empty query"
    ):
        run(data, tmp_path / "out")

"""Which files of a directory are the corpus, the queries and the grades, and in what form."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.ingest import ingest
from jobs.recipe import Ingest
from tests.jobs.ingested import DOCS, jsonl, run, table


@pytest.mark.parametrize("name", ["docs.jsonl", ".docs.jsonl"])
def test_a_file_alone_brings_the_queries_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    jsonl(tmp_path / name, DOCS)
    jsonl(tmp_path / "queries.jsonl", [{"_id": "a", "text": "tea"}])
    (tmp_path / "qrels" / "test.tsv").write_text("a\t1\t1\n")
    ingested = run(tmp_path / name, tmp_path / "out")
    assert ingested.queries.manifest.rows == ingested.qrels.manifest.rows == 1


def test_a_folder_named_corpus_is_only_a_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "corpus").mkdir(parents=True)
    for name in ("corpus/a.md", "queries.md", "b.md"):
        (data / name).write_text("text")
    found = run(data, tmp_path / "out").corpus.table()["doc_id"].to_pylist()
    assert sorted(found) == ["b.md", "corpus/a.md", "queries.md"]


@pytest.mark.parametrize("form", ["text", "parquet"])
def test_what_was_made_inside_the_data_is_no_data(form: str, tmp_path: Path) -> None:
    data, linked = tmp_path / "data", tmp_path / "linked"
    data.mkdir()
    if form == "text":
        (data / "a.md").write_text("text")
    else:
        pq.write_table(pa.Table.from_pylist(DOCS), data / "documents.parquet")
    first = run(data, data / "runs" / "c")
    assert run(data, data / "runs" / "c").corpus.fingerprint == first.corpus.fingerprint
    linked.symlink_to(data)
    assert run(linked, data / "runs" / "c").corpus.fingerprint == first.corpus.fingerprint
    assert run(data, linked / "runs" / "c").corpus.fingerprint == first.corpus.fingerprint
    with pytest.raises(ValueError, match=r"^--out is the directory of --data, .*: choose another"):
        run(data, linked)


def test_what_was_made_inside_data_on_another_filesystem(tmp_path: Path) -> None:
    data = "memory://made-inside"
    fsspec.filesystem("memory").pipe({"/made-inside/a.md": b"one"})
    first = ingest(data, Ingest(), f"{data}/out").corpus
    assert first.table()["doc_id"].to_pylist() == ["a.md"]
    assert ingest(data, Ingest(), f"{data}/out").corpus.fingerprint == first.fingerprint
    with pytest.raises(
        ValueError, match=r"^--out is the directory of --data, memory://made-inside"
    ):
        ingest(data, Ingest(), f"{data}/")


def test_a_directory_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for name in ("open", "closed", ".hidden"):
        (data / name).mkdir(parents=True)
        (data / name / "a.md").write_text("text")
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith(("closed", ".hidden")):  # No mode keeps out root, who may test this.
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=f"^cannot list {data}/closed: Permission denied$"):
        run(data, tmp_path / "out")
    # A file by itself asks for the directories beside it only if they are named for grades.
    jsonl(data / "docs.jsonl", DOCS)
    assert run(data / "docs.jsonl", tmp_path / "out").corpus.manifest.rows == len(DOCS)


def test_links_to_directories_are_followed_and_lead_nowhere_twice(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "own", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.md").write_text("text")
    (data / "linked").symlink_to(elsewhere)
    (data / "own" / "up").symlink_to(data)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    found = run(data, tmp_path / "out").corpus.table()["doc_id"].to_pylist()
    assert sorted(found) == ["linked/deep/a.md", "own/a.md"]
    (data / "gone").symlink_to(tmp_path / "nowhere")
    run(data, tmp_path / "out")
    (data / "gone.md").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"cannot read .*/gone.md: No such file"):
        run(data, tmp_path / "out")


def test_data_on_another_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {"/ingest/a.md": b"one", "/ingest/deep/b.md": b"two", "/ingest/.git/c.md": b"three"}
    )
    corpus = ingest("memory://ingest", Ingest(), str(tmp_path / "out")).corpus
    assert corpus.table()["doc_id"].to_pylist() == ["a.md", "deep/b.md"]
    listed = memory.ls

    def ls(path: str, **more: Any) -> Any:
        if path.endswith("deep"):
            raise PermissionError("not yours")
        return listed(path, **more)

    monkeypatch.setattr(memory, "ls", ls)
    with pytest.raises(ValueError, match="cannot list /ingest/deep: not yours"):
        ingest("memory://ingest", Ingest(), str(tmp_path / "out2"))


def test_names_are_part_of_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    jsonl(data / "corpus.jsonl", DOCS)
    jsonl(data / "queries.jsonl", [{"_id": "a", "text": "tea"}])
    (data / "qrels" / "train.tsv").write_text("a\t1\t1\n")
    run(data, tmp_path / "out")
    (data / "qrels" / "train.tsv").rename(data / "qrels" / "test.tsv")
    with pytest.raises(ValueError, match=r"inputs.data = .*, now inputs.data = "):
        run(data, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["queries.jsonl.xz", "qrels.csv", "qrels.txt", "qrels/test.csv.gz", "qrels/train.csv"]
)
def test_queries_and_grades_that_nobody_would_read_are_refused(name: str, tmp_path: Path) -> None:
    """They were passed over, and what was missed in the end was said to be given by nobody."""
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    jsonl(data / "corpus.jsonl", DOCS)
    (data / name).write_text("a,1,1\n")
    with pytest.raises(ValueError, match=rf"{name} would not be read: .*qrels/<train"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize("name", ["scifact/queries.jsonl", "queries/part-0.jsonl", "a/Queries.tsv"])
def test_queries_are_not_read_as_documents(name: str, tmp_path: Path) -> None:
    """A dataset unpacked into a directory of its own gave a corpus that its queries stood in."""
    data = tmp_path / "data"
    (data / name).parent.mkdir(parents=True)
    jsonl(data / "documents.jsonl", DOCS)
    jsonl(data / name, [{"_id": "a", "text": "tea"}])
    with pytest.raises(ValueError, match=rf"{name} would be read as documents: --data names"):
        run(data, tmp_path / "out", source="auto" if name.endswith("jsonl") else "csv")
    assert not (tmp_path / "out").exists()


def zipped(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def test_what_is_zipped_is_read_as_what_is_not(tmp_path: Path) -> None:
    """BEIR's sets stand so on the hub."""
    found = []
    for name in ("plain", "zipped"):
        data = tmp_path / name
        (data / "qrels").mkdir(parents=True)
        jsonl(data / "corpus.jsonl", DOCS)
        table(data / "queries.tsv", [{"query_id": "q", "text": "tea?"}], "\t")
        (data / "qrels" / "test.tsv").write_text(
            f"query-id\tcorpus-id\tscore\nq\t{DOCS[0]['_id']}\t2\n"
        )
        if name == "zipped":
            for path in ("corpus.jsonl", "queries.tsv", "qrels/test.tsv"):
                zipped(data / path)
        made = run(data, tmp_path / f"out-{name}")
        found.append([one.table().to_pylist() for one in (made.corpus, made.queries, made.qrels)])
    assert found[0] == found[1]
    assert all(found[0])


def test_zipped_texts_are_called_as_they_are_without(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "Green tea.txt").write_text("Steep it.")
    zipped(data / "Green tea.txt")
    (row,) = run(data, tmp_path / "out").corpus.table().to_pylist()
    assert (row["title"], row["text"]) == ("Green tea", "Steep it.")


@pytest.mark.parametrize("damage", [lambda whole: whole[:-20], lambda whole: b"{" + whole])
def test_what_is_not_whole_gzip_is_said_to_be_so(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "corpus.jsonl", [{"_id": str(n), "text": f"text {n}"} for n in range(1000)])
    zipped(data / "corpus.jsonl")
    path = data / "corpus.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz is no gzip file, or not all of one"):
        run(data, tmp_path / "out")


def test_a_page_that_is_called_as_queries_are_is_a_document(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    (data / "queries.txt").write_text("How to ask a database.")
    (data / "qrels" / "README.md").write_text("Of the grades.")
    corpus = run(data, tmp_path / "out").corpus
    assert set(corpus.table()["doc_id"].to_pylist()) == {"queries.txt", "qrels/README.md"}

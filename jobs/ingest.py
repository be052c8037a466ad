"""Raw text and grades into records: the one place where foreign names become ours.

`--data` is a directory or a file. Beside the corpus, whatever its format, may stand
`queries.<jsonl|csv|tsv|parquet>` and `qrels/<train|dev|test>.tsv` (BEIR's layout, or TREC's four
columns). A row that cannot be read becomes a rejection with its file, line and reason; a file that
is not what it claims to be, or that nobody would read for its suffix, is an error.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bixse.artifacts import MANIFEST, Artifact, begin
from bixse.place import Place
from bixse.records import (
    CORPUS,
    QUERIES,
    Document,
    Query,
    Rejection,
    document_text,
    text_hash,
)
from jobs.files import find_files, fingerprint, unchanged
from jobs.formats import Row, check_columns, read_all, read_file, value_of
from jobs.incoming import Parts
from jobs.metadata import Reader, Rejected
from jobs.parts import progress
from jobs.qrels import write_qrels
from jobs.recipe import Ingest

DOC_ID_NAMES = ("doc_id", "_id", "id", "docid", "document_id", "corpus-id")
QUERY_ID_NAMES = ("query_id", "_id", "id", "qid", "query-id")
TITLE_NAMES = ("title",)
TEXT_NAMES = ("text", "contents", "content", "body", "passage", "query")
QUERY_NAMES = (*QUERY_ID_NAMES, *TEXT_NAMES)


@dataclass(frozen=True)
class Ingested:
    """What `--data` held; queries and qrels may have no row."""

    corpus: Artifact
    queries: Artifact
    qrels: Artifact


def ingest(data: str | None, settings: Ingest, out: str) -> Ingested:
    """Make `corpus`, `queries` and `qrels` under `out`.

    Raises ValueError in one sentence when there is no data, no valid document, a file that is not
    what its name says or that changes while it is read, or a column that is missing. Where `out`
    lies in `data` it is no data.
    """
    if settings.source == "python-docs":
        if data is not None:
            raise ValueError(
                f"--data {data} would not be read: --ingest.source is python-docs "
                "(the recipe bixse reads your own)"
            )
        return _ingest_python_docs(settings, out)
    if data is None:
        raise ValueError("--data is missing: the directory or file that holds the corpus")
    files = find_files(data, settings.source, out)
    urls = [*files.corpus, *files.queries, *files.qrels]
    places = [Place(f"{out}/{name}") for name in ("corpus", "queries", "qrels")]
    made = [place for place in places if not place.exists(MANIFEST)]
    with unchanged(urls, partial(_undo, made)):
        inputs = {"data": fingerprint(urls, files.root)}
        names = (*DOC_ID_NAMES, *TITLE_NAMES, *TEXT_NAMES, *Reader(settings.metadata).columns)
        rows = read_all(files.corpus, files.root, names)
        corpus = _write_corpus(rows, settings, inputs, out, files.described)
        rows = read_all(files.queries, files.root, QUERY_NAMES)
        queries = _write_queries(rows, inputs, out)
        qrels = write_qrels(files.qrels, corpus, queries, settings, inputs, out)
    return Ingested(corpus, queries, qrels)


def _undo(places: Sequence[Place]) -> None:
    for place in places:
        place.clear()


def _ingest_python_docs(settings: Ingest, out: str) -> Ingested:
    from jobs.recipes import python_docs

    documents = list(python_docs.documents())
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.doc_id}\0{document.title}\0{document.text}\0".encode())
    inputs = {"data": f"python-docs-{digest.hexdigest()[:24]}"}
    rows = (
        Row("python-docs", None, {"doc_id": d.doc_id, "title": d.title, "text": d.text})
        for d in documents
    )
    corpus = _write_corpus(rows, settings, inputs, out, "the documentation of this Python")
    queries_path, qrels_path = python_docs.evaluation_files()
    folder = queries_path.rpartition("/")[0]
    inputs["queries"] = fingerprint([queries_path, qrels_path], folder)
    queries = _write_queries(read_file(queries_path, QUERY_NAMES), inputs, out)
    graded = settings.replace(grade_min=0.0, grade_max=3.0)
    qrels = write_qrels([qrels_path], corpus, queries, graded, inputs, out, split="test")
    return Ingested(corpus, queries, qrels)


def _write_corpus(
    rows: Iterator[Row], settings: Ingest, inputs: dict[str, str], out: str, described: str
) -> Artifact:
    config: dict[str, Any] = {"source": settings.source, "part_rows": settings.part_rows}
    if settings.metadata:
        config["metadata"] = settings.metadata
    reader = Reader(settings.metadata)
    draft = begin(f"{out}/corpus", "corpus", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    parts = Parts(draft, CORPUS, settings.part_rows)
    seen: dict[str, str] = {}
    with progress("ingest", None) as advance:
        for row in rows:
            check_columns(row, DOC_ID_NAMES, TEXT_NAMES)
            document = _document(row, seen, reader)
            if isinstance(document, Rejection):
                parts.reject(document)
            else:
                if document.metadata:
                    parts.describe(document.doc_id, document.metadata)
                parts.keep(asdict(document))
            advance(1)
    try:
        parts.refuse_none("document", described)
        reader.check_found()
    except ValueError:
        draft.place.clear()  # Of nothing, or of a flag that is to be corrected.
        raise
    parts.close()
    extra: dict[str, Any] = {"described": described, "rejected_for": parts.rejected_for}
    if reader.kinds:
        extra["metadata"] = reader.kinds
    return draft.finish(extra=extra)


def _document(row: Row, seen: dict[str, str], reader: Reader) -> Document | Rejection:
    if row.problem:
        return row.reject(row.problem)
    try:
        doc_id = value_of(row, DOC_ID_NAMES)
        title, text = value_of(row, TITLE_NAMES) or "", value_of(row, TEXT_NAMES) or ""
    except ValueError as error:
        return row.reject(str(error))
    if not doc_id:
        return row.reject("missing id")
    if not document_text(title, text):
        return row.reject("empty text", doc_id=doc_id)
    digest = text_hash(document_text(title, text))
    if doc_id in seen:
        same = "the same" if seen[doc_id] == digest else "other"
        return row.reject(f"duplicate id with {same} text", doc_id=doc_id)
    try:
        metadata = reader.read(row)
    except Rejected as problem:
        return row.reject(str(problem), doc_id=doc_id)
    seen[doc_id] = digest
    return Document(doc_id, title, text, metadata)


def _write_queries(rows: Iterator[Row], inputs: dict[str, str], out: str) -> Artifact:
    draft = begin(f"{out}/queries", "queries", config={}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    parts = Parts(draft, QUERIES, 100_000)
    seen: set[str] = set()
    for row in rows:
        check_columns(row, QUERY_ID_NAMES, TEXT_NAMES)
        query = _query(row, seen)
        if isinstance(query, Rejection):
            parts.reject(query)
        else:
            seen.add(query.query_id)
            parts.keep(asdict(query))
    if parts.first_rejection is not None:
        parts.refuse_none("query", parts.first_rejection.source)
    parts.close()
    return draft.finish(extra={"rejected_for": parts.rejected_for})


def _query(row: Row, seen: set[str]) -> Query | Rejection:
    if row.problem:
        return row.reject(row.problem)
    try:
        query_id, text = value_of(row, QUERY_ID_NAMES), value_of(row, TEXT_NAMES)
    except ValueError as error:
        return row.reject(str(error))
    if not query_id:
        return row.reject("missing id")
    if not text:
        return row.reject("empty query", query_id=query_id)
    if query_id in seen:
        return row.reject("duplicate id", query_id=query_id)
    return Query(query_id, text)


if __name__ == "__main__":
    from jobs.verbs import program

    program("ingest")

"""Raw text and grades into records: the one place where foreign names become ours.

`--data` is a directory or a file. Beside the corpus, whatever its format, may stand
`queries.<jsonl|csv|tsv|parquet>` and `qrels/<train|dev|test>.tsv` (BEIR's layout, or TREC's four
columns). A row that cannot be read becomes a rejection with its file, line and reason; a file that
is not what it claims to be is an error.
"""

import hashlib
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin
from bixse.records import (
    CORPUS,
    QRELS,
    QUERIES,
    Document,
    Judgment,
    Metadata,
    Query,
    Rejection,
    document_text,
    split_of,
    text_hash,
)
from bixse.scale import Scale, linear
from jobs.formats import (
    Row,
    check_columns,
    find_files,
    fingerprint,
    read_all,
    read_file,
    read_grades,
    short_name,
    value_of,
)
from jobs.metadata import Reader, Rejected, write_metadata
from jobs.parts import progress, rejected_table
from jobs.recipe import Ingest

DOC_ID_NAMES = ("doc_id", "_id", "id", "docid", "document_id", "corpus-id")
QUERY_ID_NAMES = ("query_id", "_id", "id", "qid", "query-id")
TITLE_NAMES = ("title",)
TEXT_NAMES = ("text", "contents", "content", "body", "passage", "query")
QUERY_NAMES = (*QUERY_ID_NAMES, *TEXT_NAMES)

SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "test": "test"}


@dataclass(frozen=True)
class Ingested:
    """What `--data` held; queries and qrels may have no row."""

    corpus: Artifact
    queries: Artifact
    qrels: Artifact


def ingest(data: str | None, settings: Ingest, out: str) -> Ingested:
    """Make `corpus`, `queries` and `qrels` under `out`.

    Raises ValueError in one sentence when there is no data, no valid document, a file that is not
    what its name says, or a column that is missing. Where `out` lies in `data` it is no data.
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
    inputs = {"data": fingerprint([*files.corpus, *files.queries, *files.qrels], files.root)}
    names = (*DOC_ID_NAMES, *TITLE_NAMES, *TEXT_NAMES, *Reader(settings.metadata).columns)
    rows = read_all(files.corpus, files.root, names)
    corpus = _write_corpus(rows, settings, inputs, out, files.described)
    rows = read_all(files.queries, files.root, QUERY_NAMES)
    queries = _write_queries(rows, inputs, out)
    qrels = _write_qrels(files.qrels, corpus, queries, settings, inputs, out)
    return Ingested(corpus, queries, qrels)


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
    qrels = _write_qrels([qrels_path], corpus, queries, graded, inputs, out, split="test")
    return Ingested(corpus, queries, qrels)


_HELD_ROWS = 8192
"""Of a part, as dictionaries."""


class _Parts:
    """Rows and rejections on their way into parts of a draft."""

    def __init__(self, draft: Draft, schema: pa.Schema, rows: int) -> None:
        self._draft, self._schema, self._rows = draft, schema, rows
        self._kept: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._held = 0
        self._metadata: list[tuple[str, Metadata]] = []
        self._rejected: list[Rejection] = []
        self._number = 0
        self.total = 0
        self.first_rejection: Rejection | None = None

    def keep(self, row: dict[str, Any]) -> None:
        self._kept.append(row)
        self._held += 1
        self.total += 1
        if len(self._kept) == _HELD_ROWS:
            self._fold()
        self._flush_if(self._rows)

    def describe(self, doc_id: str, metadata: Metadata) -> None:
        """The metadata of the document that is kept next."""
        self._metadata.append((doc_id, metadata))

    def reject(self, rejection: Rejection) -> None:
        self.first_rejection = self.first_rejection or rejection
        self._rejected.append(rejection)
        self._flush_if(self._rows)

    def close(self) -> None:
        if self._held or self._rejected or not self._number:
            self._flush_if(0)

    def _fold(self) -> None:
        """Rows in a table are a tenth of what they are as dictionaries."""
        self._tables.append(pa.Table.from_pylist(self._kept, schema=self._schema))
        self._kept = []

    def _flush_if(self, full: int) -> None:
        if self._held >= full or len(self._rejected) >= max(full, 1):
            self._fold()
            table = pa.concat_tables(self._tables)
            write_metadata(self._draft, self._number, self._metadata)
            self._draft.write_part(self._number, table, rejected_table(self._rejected))
            self._number += 1
            self._tables, self._rejected, self._metadata = [], [], []
            self._held = 0


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
    parts = _Parts(draft, CORPUS, settings.part_rows)
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
    if not parts.total:
        why = parts.first_rejection
        reason = f": {why.source} line {why.line}: {why.reason}" if why else ""
        raise ValueError(f"no valid document in {described}{reason}")
    reader.check_found()
    parts.close()
    extra: dict[str, Any] = {"described": described}
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
    parts = _Parts(draft, QUERIES, 100_000)
    seen: set[str] = set()
    for row in rows:
        check_columns(row, QUERY_ID_NAMES, TEXT_NAMES)
        query = _query(row, seen)
        if isinstance(query, Rejection):
            parts.reject(query)
        else:
            seen.add(query.query_id)
            parts.keep(asdict(query))
    parts.close()
    return draft.finish()


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


@dataclass(frozen=True)
class _Grade:
    """A line of a qrels file."""

    row: Row
    split: str
    query_id: str
    doc_id: str
    grade: float


def _write_qrels(
    urls: Sequence[str],
    corpus: Artifact,
    queries: Artifact,
    settings: Ingest,
    inputs: dict[str, str],
    out: str,
    split: str | None = None,
) -> Artifact:
    config = {"grade_min": settings.grade_min, "grade_max": settings.grade_max}
    draft = begin(f"{out}/qrels", "qrels", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    parts = _Parts(draft, QRELS, 1_000_000)
    # Test first: a query, by its text, that stands in two splits stays with the test.
    order = ("test", "dev", "train", None)
    urls = sorted(urls, key=lambda url: (order.index(SPLITS.get(_stem(url))), url))
    known_queries = {
        row["query_id"]: text_hash(row["text"])
        for row in queries.table(["query_id", "text"]).to_pylist()
    }
    # Read twice: of the first time documents, their best grade and a number a grade are held.
    best: dict[str, float] = {}
    hashes = array("q")
    for grade in _read_all_grades(urls, split):
        if isinstance(grade, Rejection):
            parts.reject(grade)
        elif grade.query_id in known_queries:
            best[grade.doc_id] = max(grade.grade, best.get(grade.doc_id, grade.grade))
            hashes.append(hash((grade.query_id, grade.doc_id)))
    known_docs = _known(corpus, best)
    repeated = _repeated(hashes)
    scale = _scale(settings, [best[doc_id] for doc_id in known_docs])
    homes: dict[str, str] = {}
    judged: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for grade in _read_all_grades(urls, split):
        if isinstance(grade, Rejection):
            continue
        ids = {"query_id": grade.query_id, "doc_id": grade.doc_id}
        problem = None
        if grade.query_id not in known_queries:
            problem = "unknown query_id"
        elif grade.doc_id not in known_docs:
            problem = "unknown doc_id"
        elif homes.setdefault(known_queries[grade.query_id], grade.split) != grade.split:
            home = homes[known_queries[grade.query_id]]
            problem = f"the query stands in split {home} already"
        elif (grade.query_id, grade.doc_id) in seen:
            problem = "judged twice"
        elif scale is None or not scale.values[0] <= grade.grade <= scale.values[-1]:
            problem = f"grade {grade.grade:g} is outside the scale"
        if problem is not None or scale is None:
            parts.reject(grade.row.reject(problem or "", **ids))
            continue
        if hash((grade.query_id, grade.doc_id)) in repeated:
            seen.add((grade.query_id, grade.doc_id))
        judged[grade.query_id] = grade.split
        parts.keep(_given(grade, scale))
    parts.close()
    values = list(scale.values) if scale else []
    return draft.finish(extra={"scale": values, "splits": _splits(judged)})


def _given(grade: _Grade, scale: Scale) -> dict[str, Any]:
    """A row of QRELS."""
    probs = scale.grade_probs(grade.grade)
    judgment = Judgment(
        query_id=grade.query_id,
        doc_id=grade.doc_id,
        grade_probs=probs,
        relevance=scale.relevance(probs),
        judge="given",
        prompt="",
        origin="human",
    )
    return {"split": grade.split, **asdict(judgment)}


def _splits(judged: dict[str, str]) -> dict[str, int]:
    """Judged queries of each split."""
    return {split: list(judged.values()).count(split) for split in sorted(set(judged.values()))}


def _known(corpus: Artifact, doc_ids: Collection[str]) -> set[str]:
    """Those of the ids that the corpus has."""
    if not doc_ids:
        return set()
    rows = corpus.batches(["doc_id"])
    return {name for batch in rows for name in batch["doc_id"].to_pylist() if name in doc_ids}


def _repeated(hashes: "array[int]") -> frozenset[int]:
    """Those that stand more than once."""
    found, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    return frozenset(found[counts > 1].tolist())


def _scale(settings: Ingest, grades: Sequence[float]) -> Scale | None:
    """The scale of the data: from `grade_min` to `grade_max`, or to the best grade that stands."""
    if not grades:
        return None
    maximum = settings.grade_max if settings.grade_max is not None else max(grades)
    if maximum <= settings.grade_min:
        raise ValueError(
            f"the qrels hold no grade above {settings.grade_min:g}: set --ingest.grade-min "
            "and --ingest.grade-max to the ends of their scale"
        )
    return linear(settings.grade_min, maximum)


def _stem(url: str) -> str:
    return url.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _read_all_grades(urls: Sequence[str], split: str | None) -> Iterator[_Grade | Rejection]:
    for url in urls:
        yield from _read_grades(url, split)


def _read_grades(url: str, split: str | None) -> Iterator[_Grade | Rejection]:
    stem = _stem(url)
    if split is None and stem != "qrels":
        if stem not in SPLITS:
            raise ValueError(
                f"{short_name(url)} names no split: expected train.tsv, dev.tsv or test.tsv"
            )
        split = SPLITS[stem]
    for row, ids, grade in read_grades(url):
        if grade is None:
            yield row.reject(row.problem)
        else:
            yield _Grade(row, split or split_of(ids[0]), *ids, grade)


if __name__ == "__main__":
    from jobs.verbs import main

    main("ingest")

"""Texts of documents and queries by id; memory does not follow their number."""

import os
import threading
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact
from bixse.copies import copies
from bixse.records import CORPUS, document_text, documents_at

QUERY_TEXTS = pa.schema([("query_id", pa.string()), ("text", pa.string())])


class DocumentTexts:
    """What is read of documents (`records.document_text`) by `doc_id`; memory does not follow the
    size of the corpus.
    """

    def __init__(self, corpus: Artifact) -> None:
        self._mapped = _Mapped([corpus], CORPUS)

    def get(self, doc_ids: Sequence[str]) -> list[str]:
        """The texts, in the order asked for. Raises KeyError naming an unknown `doc_id`."""
        return [self.at(self.row(doc_id)) for doc_id in doc_ids]

    def at(self, row: int) -> str:
        """The text of the document that stands in this row."""
        (document,) = documents_at(self._mapped.table, [row])
        return document_text(document.title, document.text)

    def row(self, doc_id: str) -> int:
        """Where the document stands in the corpus. Raises KeyError."""
        row = self._mapped.row(doc_id)
        if row is None:
            raise KeyError(f"no document {doc_id!r} in the corpus")
        return row


class QueryTexts:
    """Texts of queries by `query_id`; memory does not follow their number."""

    def __init__(self, queries: Sequence[Artifact]) -> None:
        self._mapped = _Mapped(queries, QUERY_TEXTS)

    def get(self, query_ids: Sequence[str]) -> list[str]:
        """The texts, in the order asked for. Raises KeyError naming an unknown `query_id`."""
        return [self._text(query_id) for query_id in query_ids]

    def _text(self, query_id: str) -> str:
        row = self._mapped.row(query_id)
        if row is None:
            raise KeyError(f"no query {query_id!r} among the queries")
        return str(self._mapped.table["text"][row].as_py())


class _Mapped:
    """Rows of artefacts by id, in memory-mapped files: memory does not follow their number.

    The files are made once a node and content, in the temporary directory, and shared by all
    actors: the rows in their own order, and the order of their ids.
    """

    def __init__(self, artifacts: Sequence[Artifact], schema: pa.Schema) -> None:
        self._id = schema.names[0]
        folder = copies()
        name = "-".join(artifact.fingerprint for artifact in artifacts)
        rows, order = folder / f"{name}.arrow", folder / f"{name}.order.npy"
        if not order.exists():
            _write_ordered(artifacts, schema, rows, order)
        self.table = pa.ipc.open_file(pa.memory_map(str(rows))).read_all()
        self._ids = self.table[self._id]
        self._order = np.load(order, mmap_mode="r")

    def row(self, key: str) -> int | None:
        """Where the row with this id stands."""
        place = bisect_left(self._order, key, key=lambda row: self._ids[int(row)].as_py())
        if place < len(self._order):
            row = int(self._order[place])
            if self._ids[row].as_py() == key:
                return row
        return None


def _write_ordered(
    artifacts: Sequence[Artifact], schema: pa.Schema, rows: Path, order: Path
) -> None:
    """Stream the artefacts into one Arrow file; of all rows only the ids are held."""
    mark = f".{os.getpid()}.{threading.get_ident()}.tmp"
    aside, order_aside = Path(f"{rows}{mark}"), Path(f"{order}{mark}")
    ids: list[str] = []
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for artifact in artifacts:
            for batch in artifact.batches(schema.names, rows=4096):
                writer.write_batch(batch)
                ids += batch[schema.names[0]].to_pylist()
    with open(order_aside, "wb") as handle:
        np.save(handle, np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64))
    aside.replace(rows)
    order_aside.replace(order)

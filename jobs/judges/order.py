"""The order in which pairs are asked, so that what their prompts begin with is computed once.

Candidates come grouped by query. Prompts that put the query first share it then, and prompts that
put the passage first share it only where pairs of one document are asked together. Which of the two
saves more is counted on the pairs themselves, in characters; documents win where a small corpus is
judged for many queries. The regrouped pairs are an artefact beside the judgments
(`<judgments>-order`) until those are finished: units must be the same rows in every session.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.artifacts import Artifact, ArtifactError, UnderWay, begin, fingerprints
from bixse.place import Place
from bixse.records import PAIRS
from jobs.judges.seam import Judge
from jobs.texts import DocumentTexts, QueryTexts

BUCKET_ROWS = 1 << 18
"""Pairs that are sorted in memory at a time."""


@dataclass(frozen=True)
class Sharing:
    """Characters that prompts have from the one asked before, by what pairs are grouped by."""

    query: int
    document: int


def ordered(
    pairs: Artifact, queries: Sequence[Artifact], corpus: Artifact, judge: Judge, out: str
) -> tuple[Artifact, str]:
    """The pairs as they should be asked, and what they are grouped by: query or document."""
    if "document" not in judge.prefixes:
        return pairs, "query"
    texts = DocumentTexts(corpus)
    shared = sharing(pairs, QueryTexts(queries), texts, corpus.manifest.rows)
    if shared.document <= shared.query:
        return pairs, "query"
    return by_document(pairs, texts, corpus.manifest.rows, out), "document"


def sharing(pairs: Artifact, queries: QueryTexts, texts: DocumentTexts, documents: int) -> Sharing:
    """What each grouping saves; memory is one bit a document."""
    seen = np.zeros((documents + 7) // 8, np.uint8)
    by_query = by_document = 0
    last, length = None, 0
    for query_id, doc_id in pairs.rows("query_id", "doc_id"):
        if query_id == last:
            by_query += length
        else:
            last, length = query_id, len(queries.get([query_id])[0])
        row = texts.row(doc_id)
        if seen[row >> 3] & (1 << (row & 7)):
            by_document += len(texts.at(row))
        seen[row >> 3] |= 1 << (row & 7)
    return Sharing(by_query, by_document)


def by_document(pairs: Artifact, texts: DocumentTexts, documents: int, out: str) -> Artifact:
    """The pairs in the order of the corpus, those of one document as they came.

    Two passes through files of at most about `BUCKET_ROWS` rows: memory follows that number. What
    stands at `out` of other pairs goes: the judgments that it was made for are no longer there, or
    refuse these pairs themselves.
    """
    begun = partial(
        begin, out, "pairs", config={"by": "document"}, inputs=fingerprints(pairs=pairs)
    )
    try:
        draft = begun()
    except UnderWay:
        raise
    except ArtifactError:
        Place(out).clear()
        draft = begun()
    if isinstance(draft, Artifact):
        return draft
    buckets = max(1, -(-pairs.manifest.rows // BUCKET_ROWS))
    done = draft.parts_done()
    with TemporaryDirectory(prefix="bixse-order-") as folder:
        files = [Path(folder) / f"{number}.arrow" for number in range(buckets)]
        _scatter(pairs, texts, documents, files)
        for number, file in enumerate(files):
            if number not in done:
                draft.write_part(number, _sorted(file))
    return draft.finish()


PLACED = pa.schema([*PAIRS, ("row", pa.int64())])


def _scatter(pairs: Artifact, texts: DocumentTexts, documents: int, files: Sequence[Path]) -> None:
    """Pairs of neighbouring documents into one file each."""
    writers = [pa.ipc.new_stream(str(file), PLACED) for file in files]
    for batch in pairs.batches(PAIRS.names):
        rows = np.array([texts.row(doc_id) for doc_id in batch["doc_id"].to_pylist()], np.int64)
        placed = pa.Table.from_batches([batch]).cast(PAIRS).append_column("row", pa.array(rows))
        bucket = rows * len(files) // documents
        for number in np.unique(bucket):
            writers[number].write_table(placed.filter(pa.array(bucket == number)))
    for writer in writers:
        writer.close()


def _sorted(file: Path) -> pa.Table:
    with pa.ipc.open_stream(str(file)) as reader:
        table = reader.read_all()
    rows: npt.NDArray[np.int64] = table["row"].to_numpy()
    return table.take(np.argsort(rows, kind="stable")).select(PAIRS.names)

"""A file of preferences -> the artefact: which of two documents a pairwise judge finds better.

    python -m jobs.train pairdistill --data DIR --out DIR --judging.preferences FILE

Two layouts, told apart by the header (tab-separated): `query-id preferred-id other-id`, where the
first document won, and `query_id doc_id_a doc_id_b prob_a`. Other columns are ignored. A line that
cannot be read or names an unknown id is a rejection with its reason.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.records import PREFERENCES
from jobs.files import file_fingerprint, open_bytes, short_name
from jobs.formats import Row
from jobs.parts import rejected_table

WON = ("query-id", "preferred-id", "other-id")


def import_preferences(
    queries: Sequence[Artifact], corpus: Artifact, file: str, out: str
) -> Artifact:
    """The preferences that a file holds between documents of this corpus, for these queries.

    Raises ValueError in one sentence when the file cannot be read, its header is neither layout, or
    no line is a preference between known documents.
    """
    inputs = {"preferences": file_fingerprint(file), **fingerprints(corpus=corpus, queries=queries)}
    draft = begin(out, "preferences", config={}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    known_queries = {query_id for some in queries for query_id in some.column("query_id")}
    known_docs = set(corpus.column("doc_id"))
    kept, rejected = [], []
    for row, values in _rows(file):
        problem = row.problem
        if not problem:
            query_id, doc_id_a, doc_id_b, _ = values
            if query_id not in known_queries:
                problem = "unknown query_id"
            elif not {doc_id_a, doc_id_b} <= known_docs:
                problem = "unknown doc_id"
            elif doc_id_a == doc_id_b:
                problem = "a document is compared with itself"
        if problem:
            rejected.append(row.reject(problem))
        else:
            kept.append(dict(zip(PREFERENCES.names, values, strict=True)))
    if not kept:
        raise ValueError(f"no preference between known documents in {short_name(file)}")
    draft.write_part(0, pa.Table.from_pylist(kept, schema=PREFERENCES), rejected_table(rejected))
    return draft.finish()


def _rows(file: str) -> Iterator[tuple[Row, tuple[str, str, str, float]]]:
    """Each line, and what it holds where the line has no problem."""
    with open_bytes(file) as handle:
        first = handle.readline().decode("utf-8-sig", "replace")
        header = first.rstrip("\r\n").split("\t")
        wanted = next(
            (names for names in (WON, tuple(PREFERENCES.names)) if set(names) <= set(header)), None
        )
        if wanted is None:
            raise ValueError(
                f"{short_name(file)} has columns {', '.join(header)}: expected "
                f"{', '.join(WON)} or {', '.join(PREFERENCES.names)}"
            )
        places = [header.index(name) for name in wanted]
        for number, raw in enumerate(handle, start=2):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if not line:
                continue
            row = Row(short_name(file), number, raw=line)
            columns = line.split("\t")
            if len(columns) != len(header):
                problem = f"expected {len(header)} columns, found {len(columns)}"
                yield replace(row, problem=problem), ("", "", "", 0.0)
                continue
            query_id, doc_id_a, doc_id_b, *prob = (columns[place].strip() for place in places)
            try:
                prob_a = float(prob[0]) if prob else 1.0
            except ValueError:
                prob_a = math.nan
            if not 0 <= prob_a <= 1:
                row = replace(row, problem="prob_a is no number in [0, 1]")
            yield row, (query_id, doc_id_a, doc_id_b, prob_a)

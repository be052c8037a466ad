"""links -> judgments: each linked document as a query, for whom near documents of the graph are
relevant and far ones are not (`bixse.candidates.bands`).

    python -m jobs.train scincl --data DIR --out DIR --neighbours.links FILE

Node vectors and what is drawn are functions of the links and the seed. Memory follows the number of
linked documents.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.candidates.bands import Drawn, bands_of, triplet_sources
from bixse.candidates.graph import linked, neighbour_lists, node_vectors
from bixse.candidates.settings import Neighbours
from bixse.records import (
    JUDGMENTS,
    LINKS,
    QUERIES,
    Judgment,
    Query,
    Rejection,
    text_hash,
)
from bixse.scale import Scale, linear
from jobs.files import file_fingerprint, open_bytes, short_name
from jobs.formats import Row
from jobs.parts import progress, rejected_table, write_rows
from jobs.texts import DocumentTexts

PART_ROWS = 100_000
SCALE: Scale = linear(0, 1)


def import_links(corpus: Artifact, file: str, out: str) -> Artifact:
    """The links between two documents of the corpus that a file holds; others are rejected.

    Raises ValueError in one sentence when no file is named, it cannot be read, or no line of it is
    such a link.
    """
    if not file:
        raise ValueError("this recipe needs a graph of the documents: set --neighbours.links")
    inputs = {"links": file_fingerprint(file), **fingerprints(corpus=corpus)}
    draft = begin(out, "links", config={}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    known = set(corpus.column("doc_id"))
    kept: list[dict[str, str]] = []
    rejected: list[Rejection] = []
    for row, ends in _read_links(file):
        problem = row.problem
        if not problem and not set(ends) <= known:
            problem = "unknown doc_id"
        elif not problem and ends[0] == ends[1]:
            problem = "a document is linked with itself"
        if problem and row.line == 1:
            continue  # The header.
        if problem:
            rejected.append(row.reject(problem))
        else:
            kept.append(dict(zip(LINKS.names, ends, strict=True)))
    if not kept:
        why = f": line {rejected[0].line}: {rejected[0].reason}" if rejected else ""
        raise ValueError(f"no link between two known documents in {short_name(file)}{why}")
    draft.write_part(0, pa.Table.from_pylist(kept, schema=LINKS), rejected_table(rejected))
    return draft.finish()


def _read_links(file: str) -> Iterator[tuple[Row, tuple[str, str]]]:
    """Each line, also the header if there is one, and its first two columns where it has them."""
    with open_bytes(file) as handle:
        for number, raw in enumerate(handle, start=1):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
            if not line:
                continue
            columns = line.split("\t") if "\t" in line else next(csv.reader([line]))
            if len(columns) < 2:
                problem = f"expected 2 columns or more, found {len(columns)}"
                yield Row(short_name(file), number, problem=problem, raw=line), ("", "")
            else:
                yield (
                    Row(short_name(file), number, raw=line),
                    (columns[0].strip(), columns[1].strip()),
                )


def anchors(links: Artifact, corpus: Artifact, given: Artifact, out: str) -> Artifact:
    """A query a linked document, of its text; none that equals one of `given`, which an evaluation
    may hold."""
    inputs = fingerprints(links=links, corpus=corpus, given=given)
    draft = begin(out, "queries", config={}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    taken = set(map(text_hash, given.column("text")))
    kept: list[Query] = []
    rejected: list[Rejection] = []
    nodes = linked(_ends(links))
    for doc_id, text in zip(nodes, DocumentTexts(corpus).get(nodes), strict=True):
        query = Query(f"anchor:{doc_id}", text, "synthetic", doc_id)
        if text_hash(text) in taken:
            rejected.append(
                Rejection("equals a given query", query_id=query.query_id, doc_id=doc_id)
            )
        else:
            kept.append(query)
    write_rows(draft, kept, QUERIES, PART_ROWS, rejected)
    return draft.finish(extra={"documents": corpus.manifest.rows})


def judge_neighbours(
    links: Artifact, anchors: Artifact, corpus: Artifact, settings: Neighbours, out: str
) -> Artifact:
    """Of each anchor, documents of the positive band at relevance 1, negatives at 0.

    A copy of the anchor's text is neither, and one of a positive's is no negative: they are
    rejected. Raises ValueError when the bands overlap, hold fewer than are drawn of them, or leave
    no document for easy negatives: with few linked documents they must be wider.
    """
    inputs = fingerprints(links=links, anchors=anchors)
    config = settings.model_dump(mode="json", exclude={"links"})
    draft = begin(out, "judgments", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    judge = f"neighbours:{links.fingerprint[:12]}"
    asked = dict(anchors.rows("seed_doc_id", "query_id"))
    ends = _ends(links)
    nodes = linked(ends)
    hashes = dict(zip(nodes, map(text_hash, DocumentTexts(corpus).get(nodes)), strict=True))
    found: list[Judgment] = []
    rejected: list[Rejection] = []
    for doc_id, drawn in _drawn(ends, settings):
        if doc_id not in asked:
            continue
        query_id, copies = asked[doc_id], _copies(doc_id, drawn, hashes)
        for doc_ids, relevance in ((drawn.positives, 1.0), ((*drawn.hard, *drawn.easy), 0.0)):
            apart = [other for other in doc_ids if other not in copies]
            found += _judgments(query_id, apart, relevance, judge)
        rejected += [
            Rejection(reason, query_id=query_id, doc_id=other) for other, reason in copies.items()
        ]
    write_rows(draft, found, JUDGMENTS, PART_ROWS, rejected)
    extra = {"scale": SCALE.record, "origin": "links", "judges": [judge]}
    return draft.finish(extra=extra)


def _copies(doc_id: str, drawn: Drawn, hashes: Mapping[str, str]) -> dict[str, str]:
    """Documents drawn for an anchor whose text speaks against their side, and why."""
    near = {hashes[other] for other in drawn.positives}
    copies = {
        other: "has the text of a positive"
        for other in (*drawn.hard, *drawn.easy)
        if hashes[other] in near
    }
    for other in (*drawn.positives, *drawn.hard, *drawn.easy):
        if hashes[other] == hashes[doc_id]:
            copies[other] = "has the text of its anchor"
    return copies


def _drawn(ends: Sequence[tuple[str, str]], settings: Neighbours) -> Iterator[tuple[str, Drawn]]:
    """Each node with what it is trained on."""
    nodes = linked(ends)
    bands = bands_of(len(nodes), settings.positive, settings.hard)
    vector_NE = node_vectors(ends, nodes, settings.dimensions, settings.walk, settings.seed)
    with progress("neighbours", len(nodes)) as advance:
        for node, rows in zip(nodes, neighbour_lists(vector_NE, bands.hard[1]), strict=True):
            yield (
                node,
                triplet_sources(
                    node,
                    [nodes[row] for row in rows],
                    nodes,
                    bands,
                    positives=settings.positives,
                    hard=settings.hard_negatives,
                    easy=settings.easy_negatives,
                    seed=settings.seed,
                ),
            )
            advance(1)


def _judgments(
    query_id: str, doc_ids: Sequence[str], relevance: float, judge: str
) -> Iterator[Judgment]:
    probs = SCALE.grade_probs(relevance)
    for doc_id in doc_ids:
        yield Judgment(query_id, doc_id, probs, relevance, judge, "", "links")


def _ends(links: Artifact) -> list[tuple[str, str]]:
    return list(links.rows(*LINKS.names))

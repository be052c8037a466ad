"""written queries -> the queries that stay, every other one with its reason.

Each step reads a finished artefact of queries and writes another: rows and rejected of the result
add up to the rows that it read, and what each filter took stands in the manifest. Queries are held
in memory: as many as the settings ask for, whatever the corpus.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin, fingerprints
from bixse.models.encoder import Encoder
from bixse.records import PAIRS, QUERIES, Hit, Pair, Query, Rejection, document_text, text_hash
from bixse.retrieval.exact import refuse_other_encoder, search_exact
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from bixse.synthesis.requests import refuse_other_grades
from bixse.synthesis.settings import RoundTrip
from bixse.synthesis.sifting import (
    Filter,
    contradicted,
    disagreeing,
    histogram,
    lost,
    rank_of,
    repeated,
    sift,
    unbalanced,
)
from bixse.synthesis.writing import Comparison
from jobs.lexical import warn_of_script
from jobs.parts import part_rows, progress, rejected_table, rows_of
from jobs.texts import DocumentTexts

SEARCHED = 256
"""Queries of a round trip that are searched at a time."""


def drop_repeats(written: Artifact, given: Artifact, near_duplicate: float, out: str) -> Artifact:
    """Without queries that repeat another one, or one of `given`, which an evaluation may hold."""
    taken = list(given.column("text"))
    filters = {
        "repeated": partial(repeated, taken=taken, near_duplicate=near_duplicate),
    }
    inputs = fingerprints(written=written, given=given)
    return _sifted(written, filters, {"near_duplicate": near_duplicate}, inputs, out)


def keep_agreed(queries: Artifact, scores: Artifact, out: str) -> Artifact:
    """Queries that a scorer gives the grade they were written at (`scores`: judgments).

    Raises ValueError when the scorer's scale has not the four grades 0 to 3.
    """
    refuse_other_grades(scores.manifest.extra["scale"]["values"])
    grades = {
        query_id: max(range(4), key=grade_probs.__getitem__)
        for query_id, grade_probs in scores.rows("query_id", "grade_probs")
    }
    inputs = fingerprints(queries=queries, scores=scores)
    return _sifted(queries, {"agreement": partial(disagreeing, grades=grades)}, {}, inputs, out)


def keep_consistent(
    queries: Artifact, compared: Artifact, tolerance: float, seed: int, out: str
) -> Artifact:
    """Without queries whose order a comparison reverses; then as many of each grade."""
    verdicts = [
        (Comparison(*comparison), verdict)
        for *comparison, verdict in compared.rows(
            "doc_id", "query_id_high", "query_id_low", "verdict"
        )
    ]
    filters = {
        "contradiction": partial(contradicted, verdicts=verdicts),
        "balance": partial(unbalanced, tolerance=tolerance, seed=seed),
    }
    inputs = fingerprints(queries=queries, compared=compared)
    return _sifted(queries, filters, {"tolerance": tolerance, "seed": seed}, inputs, out)


def keep_returned(
    queries: Artifact,
    corpus: Artifact,
    embeddings: Artifact | None,
    encoder: str,
    settings: RoundTrip,
    lexical: Lexical,
    out: str,
) -> Artifact:
    """Round trip: queries that find their document among the first `settings.k` of the corpus.

    `embeddings` are the corpus under `encoder`; None for BM25. A copy of the document counts as the
    document. Parts that stand from an earlier run are not searched again.
    """
    inputs = fingerprints(queries=queries, corpus=corpus, embeddings=embeddings)
    config: dict[str, Any] = {"round_trip": settings.model_dump()}
    if embeddings is None:
        config["lexical"] = lexical.model_dump(mode="json")
    draft = begin(out, "queries", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    done, dropped = draft.parts_done(), 0
    todo = [number for number in range(len(queries.parts())) if number not in done]
    if todo:
        retriever = _Retriever(corpus, embeddings, encoder, settings.k, lexical)
    with progress("round trip", queries.manifest.rows) as advance:
        for number, name in enumerate(queries.parts()):
            part = _queries(queries.part(name))
            if number in todo:
                ranks: dict[str, int | None] = {}
                for start in range(0, len(part), SEARCHED):
                    ranks |= retriever.ranks(part[start : start + SEARCHED])
                _write(draft, number, part, lost(part, ranks, settings.k))
            dropped += len(part) - part_rows(draft, number)
            advance(len(part))
    counts = [{"filter": "round trip", "in": queries.manifest.rows, "dropped": dropped}]
    return draft.finish(extra=_extra(queries, counts))


def seed_pairs(queries: Artifact, out: str) -> Artifact:
    """Each query with the document it was written from, for a scorer to judge."""
    draft = begin(out, "pairs", config={}, inputs=fingerprints(queries=queries))
    if isinstance(draft, Artifact):
        return draft
    for number, name in enumerate(queries.parts()):
        rows = queries.part(name, ["query_id", "seed_doc_id"]).to_pylist()
        pairs = [Pair(row["query_id"], row["seed_doc_id"], "seed", 1, 0.0) for row in rows]
        draft.write_part(number, rows_of(pairs, PAIRS))
    return draft.finish()


class _Retriever:
    """BM25 or an encoder over the whole corpus, built once."""

    def __init__(
        self,
        corpus: Artifact,
        embeddings: Artifact | None,
        encoder: str,
        k: int,
        lexical: Lexical,
    ) -> None:
        self._texts, self._k, self._embeddings = DocumentTexts(corpus), k, embeddings
        if embeddings is None:
            warn_of_script(corpus, lexical)
            rows = corpus.table(["doc_id", "title", "text"]).to_pylist()
            bodies = [document_text(row["title"], row["text"]) for row in rows]
            self._lexical = LexicalIndex([row["doc_id"] for row in rows], bodies, lexical)
            return
        self._encoder = Encoder.load(encoder)
        refuse_other_encoder(embeddings, encoder, self._encoder.fingerprint)

    def ranks(self, queries: Sequence[Query]) -> dict[str, int | None]:
        """query_id -> the rank of its document among the first k, or None."""
        found = self._search([query.text for query in queries])
        doc_ids = {hit.doc_id for hits in found for hit in hits}
        doc_ids |= {query.seed_doc_id or "" for query in queries}
        once = sorted(doc_ids)
        hashes = dict(zip(once, map(text_hash, self._texts.get(once)), strict=True))
        return {
            query.query_id: rank_of(hashes[query.seed_doc_id or ""], hits, hashes)
            for query, hits in zip(queries, found, strict=True)
        }

    def _search(self, texts: Sequence[str]) -> list[list[Hit]]:
        if self._embeddings is None:
            return [self._lexical.search(text, self._k) for text in texts]
        return search_exact(self._embeddings, self._encoder.encode(texts, "query"), self._k)


def _sifted(
    queries: Artifact,
    filters: Mapping[str, Filter],
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    out: str,
) -> Artifact:
    draft = begin(out, "queries", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    parts = [_queries(queries.part(name)) for name in queries.parts()]
    sifted = sift([query for part in parts for query in part], filters)
    for number, part in enumerate(parts):
        _write(draft, number, part, sifted.dropped)
    grades = {
        "grades_before": histogram(query for part in parts for query in part),
        "grades": histogram(sifted.kept),
    }
    return draft.finish(extra={**_extra(queries, sifted.counts), **grades})


def _write(draft: Draft, number: int, part: Sequence[Query], dropped: Mapping[str, str]) -> None:
    kept = [query for query in part if query.query_id not in dropped]
    rejected = [
        Rejection(
            dropped[query.query_id], query.text, query_id=query.query_id, doc_id=query.seed_doc_id
        )
        for query in part
        if query.query_id in dropped
    ]
    draft.write_part(number, rows_of(kept, QUERIES), rejected_table(rejected))


def _extra(queries: Artifact, counts: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """What the filters took, after what those before them took; who wrote, for the labels."""
    before = queries.manifest.extra
    inherited: dict[str, Any] = {
        key: before[key] for key in ("generator", "prompt") if key in before
    }
    return {**inherited, "filters": [*before.get("filters", []), *counts]}


def _queries(table: pa.Table) -> list[Query]:
    return [Query(**row) for row in table.to_pylist()]

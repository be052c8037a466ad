"""queries, corpus -> pairs: pooled candidates of BM25, the base encoder and chance.

A query that is itself a document, as those of ArguAna, is no candidate of its own: `evaluate` does
not count that it finds itself, and training is not to learn it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.candidates.pools import pool, random_hits
from bixse.candidates.settings import Pools
from bixse.evaluation.metrics import others, themselves
from bixse.models.encoder import Encoder
from bixse.records import PAIRS, Hit, Pair, document_text, ids_hash, text_hash
from bixse.retrieval.exact import refuse_other_encoder, search_exact
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from jobs.labels import commonest_rejection
from jobs.lexical import warn_of_script
from jobs.parts import part_rows, progress, rows_of

PART_QUERIES = 1000

DENSE_HITS = 1_000_000
"""Held of the dense pool, some 200 MB: the queries of as many are compared in one pass over the
embeddings, and not those of a part in a pass of their own."""


def pair(
    queries: Sequence[Artifact],
    corpus: Artifact,
    embeddings: Artifact | None,
    encoder: str,
    pools: Pools,
    lexical: Lexical,
    out: str,
    skip_query_ids: frozenset[str] = frozenset(),
) -> Artifact:
    """Candidate pairs of every query but those of `skip_query_ids` (the evaluation's).

    `embeddings` are the corpus under `encoder`; None when `pools.dense` is 0. Raises ValueError
    when no query is left, every pool is empty, or BM25 alone is asked and finds nothing.
    """
    if pools.bm25 + pools.dense + pools.random == 0:
        raise ValueError("no candidates: candidates.bm25, .dense and .random are all 0")
    inputs = fingerprints(corpus=corpus, queries=queries, embeddings=embeddings)
    inputs["skipped queries"] = ids_hash(skip_query_ids)
    config = {"pools": pools.model_dump(), "lexical": lexical.model_dump(mode="json")}
    draft = begin(out, "pairs", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    rows = [
        row
        for artifact in queries
        for row in artifact.table(["query_id", "text", "seed_doc_id"]).to_pylist()
        if row["query_id"] not in skip_query_ids
    ]
    if not rows:
        raise ValueError(
            f"no query to train on{_why_none(queries)}: put queries of the train split beside the "
            "corpus, or choose a recipe that makes some (bixse_cloze)"
        )
    if pools.bm25:
        warn_of_script(corpus, lexical)
    asked = {row["query_id"]: row["text"] for row in rows}
    source = _Candidates(corpus, embeddings, encoder, pools, lexical, asked)
    chunks = [rows[start : start + PART_QUERIES] for start in range(0, len(rows), PART_QUERIES)]
    done = draft.parts_done()
    todo = [number for number in range(len(chunks)) if number not in done]
    together = max(1, DENSE_HITS // (PART_QUERIES * max(1, pools.dense)))
    with progress("pair", len(rows)) as advance:
        advance(sum(len(chunks[number]) for number in done))
        for start in range(0, len(todo), together):
            numbers = todo[start : start + together]
            of_parts = source.pairs([chunks[number] for number in numbers])
            for number, pairs in zip(numbers, of_parts, strict=True):
                draft.write_part(number, rows_of(pairs, PAIRS))
                advance(len(chunks[number]))
    if not any(part_rows(draft, number) for number in draft.parts_done()):
        draft.place.clear()  # Nothing made is nothing to protect: corrected flags may begin again.
        raise ValueError(
            f"no document shares a word with any of the {len(rows)} queries: set "
            "--candidates.dense or --candidates.random, or another --lexical.language"
        )
    return draft.finish(extra={"queries": len(rows)})


def _why_none(queries: Sequence[Artifact]) -> str:
    """What became of the queries, where none is left to train on."""
    held_out = sum(artifact.manifest.rows for artifact in queries)
    why = [f"{held_out} are of dev or test, or have the text of one"] if held_out else []
    why += [
        f"{artifact.manifest.rejected} were rejected, see {artifact.url}/rejected "
        f"({commonest_rejection(artifact)})"
        for artifact in queries
        if artifact.manifest.rejected
    ]
    return f", since {' and '.join(why)}" if why else ""


class _Candidates:
    """BM25, dense and random retrieval over one corpus, built once."""

    def __init__(
        self,
        corpus: Artifact,
        embeddings: Artifact | None,
        encoder: str,
        pools: Pools,
        lexical: Lexical,
        asked: Mapping[str, str],
    ) -> None:
        self._pools = pools
        documents = list(corpus.rows("doc_id", "title", "text"))
        self._doc_ids = [doc_id for doc_id, _, _ in documents]
        texts = [document_text(title, text) for _, title, text in documents]
        self._hashes = dict(zip(self._doc_ids, map(text_hash, texts), strict=True))
        self._itself = themselves(asked, {}, documents)
        self._lexical = LexicalIndex(self._doc_ids, texts, lexical) if pools.bm25 else None
        self._embeddings, self._encoder = None, None
        if pools.dense and embeddings is not None:
            self._embeddings, self._encoder = embeddings, Encoder.load(encoder)
            refuse_other_encoder(embeddings, encoder, self._encoder.fingerprint)

    def pairs(self, chunks: Sequence[Sequence[dict[str, Any]]]) -> Iterator[list[Pair]]:
        """The pairs of each chunk of queries, their dense pools found together."""
        dense = self._dense(chunks)
        for rows in chunks:
            yield [pair for row in rows for pair in self._pairs(row, next(dense, None))]

    def _dense(self, chunks: Sequence[Sequence[dict[str, Any]]]) -> Iterator[list[Hit]]:
        """The dense hits of each query, in order; nothing where there is no dense pool."""
        if self._encoder is None or self._embeddings is None:
            return iter(())
        # A chunk at a time: what a text is encoded beside may change its last bits.
        encoded = [self._encoder.encode([row["text"] for row in rows], "query") for rows in chunks]
        vectors = np.concatenate(encoded)
        return iter(search_exact(self._embeddings, vectors, self._beside(self._pools.dense)))

    def _beside(self, count: int) -> int:
        """How many to search for, to have `count` beside a query that finds itself."""
        return count + bool(self._itself)

    def _pairs(self, row: dict[str, Any], dense: Sequence[Hit] | None) -> list[Pair]:
        query_id, pools = row["query_id"], self._pools
        rankings: dict[str, Sequence[Hit]] = {}

        def add(source: str, hits: Sequence[Hit], count: int) -> None:
            rankings[source] = others(query_id, hits, self._itself)[:count]

        if pools.written_from and row["seed_doc_id"] is not None:
            rankings["seed"] = [Hit(row["seed_doc_id"], 0.0, 1)]
        if self._lexical is not None:
            add("bm25", self._lexical.search(row["text"], self._beside(pools.bm25)), pools.bm25)
        if dense is not None:
            add("dense", dense, pools.dense)
        if pools.random:
            drawn = random_hits(query_id, self._doc_ids, pools.random, pools.seed)
            add("random", drawn, pools.random)
        return pool(query_id, rankings, self._hashes)


if __name__ == "__main__":
    from jobs.verbs import program

    program("pair")

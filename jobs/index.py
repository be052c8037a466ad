"""embeddings, corpus -> index: one task a shard, which returns counts and measurements only."""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin
from bixse.models.encoder import Encoder, encoder_fingerprint, resolve
from bixse.records import Hit, document_text
from bixse.retrieval.settings import Retrieval
from jobs.parts import progress, start_ray
from jobs.recipe import Placement

RECALL_AT = 10


def index(
    embeddings: Artifact,
    corpus: Artifact,
    queries: Sequence[Artifact],
    encoder: str,
    settings: Retrieval,
    placement: Placement,
    out: str,
) -> Artifact:
    """Shards under `out`, with recall@10 against exact search and latency in the manifest.

    Recall is measured on up to `truth_queries` of `queries`, or on titles where there are none.
    Raises ValueError when the embeddings are of another encoder or lack a document.
    """
    fingerprint = encoder_fingerprint(resolve(encoder))
    made_by = embeddings.manifest.extra.get("encoder")
    if made_by != fingerprint:
        raise ValueError(f"{embeddings.url} is of encoder {made_by}, {encoder} is {fingerprint}")
    if embeddings.manifest.rows != corpus.manifest.rows:
        raise ValueError(
            f"{embeddings.manifest.rows} embeddings for {corpus.manifest.rows} documents"
        )
    inputs = {"embeddings": embeddings.fingerprint, "corpus": corpus.fingerprint}
    draft = begin(out, "index", config=settings.model_dump(mode="json"), inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    texts = _truth_queries(queries, corpus, settings.truth_queries)
    vectors = Encoder.load(encoder).encode(texts, "query")
    shards = _build(draft, embeddings, corpus, vectors, settings, placement)
    measured = _measure(shards, texts)
    extra = {
        "encoder": fingerprint,
        "dim": int(vectors.shape[1]),
        "structure": settings.structure,
        "shards": [shard["name"] for shard in shards],
        "shard_rows": [shard["rows"] for shard in shards],
        **measured,
    }
    return draft.finish(rows=sum(extra["shard_rows"]), extra=extra)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def shard_of(doc_id: str, shards: int) -> int:
    """The shard a document lives in: a hash of its id, whatever the corpus."""
    digest = hashlib.blake2b(doc_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % shards


def _truth_queries(queries: Sequence[Artifact], corpus: Artifact, count: int) -> list[str]:
    """Texts to measure with, the first by a hash of their id."""
    found = [
        (row["query_id"], row["text"])
        for artifact in queries
        for row in artifact.table(["query_id", "text"]).to_pylist()
    ]
    if not found:
        for batch in corpus.batches(["doc_id", "title", "text"], rows=count):
            rows = batch.to_pylist()
            found = [(r["doc_id"], r["title"] or document_text("", r["text"])[:200]) for r in rows]
            break
    found.sort(key=lambda row: hashlib.blake2b(row[0].encode(), digest_size=8).digest())
    return [text for _, text in found[:count]]


def _build(
    draft: Draft,
    embeddings: Artifact,
    corpus: Artifact,
    vectors_QD: np.ndarray[Any, Any],
    settings: Retrieval,
    placement: Placement,
) -> list[dict[str, Any]]:
    start_ray()
    import ray

    build = ray.remote(num_cpus=placement.cpus_per_actor, max_retries=3)(_build_shard)
    truth = ray.put(vectors_QD)
    pending = [
        build.remote(draft, embeddings, corpus, number, truth, settings)
        for number in range(settings.shards)
    ]
    shards = []
    with progress("index", settings.shards) as advance:
        while pending:
            ready, pending = ray.wait(pending)
            shards += ray.get(ready)
            advance(len(ready))
    return sorted(shards, key=lambda shard: str(shard["name"]))


def _build_shard(
    draft: Draft,
    embeddings: Artifact,
    corpus: Artifact,
    number: int,
    vectors_QD: np.ndarray[Any, Any],
    settings: Retrieval,
) -> dict[str, Any]:
    """Build, write and measure one shard. Only its own documents are held."""
    # FAISS before torch would be loaded: one OpenMP runtime a process.
    from bixse.retrieval.exact import vectors_of
    from bixse.retrieval.shard import Shard, build_shard

    def mine(table: pa.Table) -> pa.Table:
        rows = [
            row
            for row, doc_id in enumerate(table["doc_id"].to_pylist())
            if shard_of(doc_id, settings.shards) == number
        ]
        return table.take(pa.array(rows, pa.int64()))

    vectors = pa.concat_tables([mine(embeddings.part(name)) for name in embeddings.parts()])
    documents = pa.concat_tables([mine(corpus.part(name)) for name in corpus.parts()])
    vectors, documents = vectors.sort_by("doc_id"), documents.sort_by("doc_id")
    if vectors["doc_id"].to_pylist() != documents["doc_id"].to_pylist():
        raise ValueError(f"{embeddings.url} and {corpus.url} hold different documents")
    with tempfile.TemporaryDirectory() as folder:
        build_shard(Path(folder), documents, vectors_of(vectors), settings)
        draft.add_directory(Path(folder), under=f"{shard_name(number)}/")
        shard = Shard.load(Path(folder))
        found, latencies = [], []
        for row in range(len(vectors_QD)):
            started = time.perf_counter()
            found += shard.search(vectors_QD[row : row + 1], RECALL_AT)
            latencies.append((time.perf_counter() - started) * 1000)
        truth = found
        if settings.structure != "exact":
            exact = Retrieval(structure="exact")
            build_shard(Path(folder), documents, vectors_of(vectors), exact)
            truth = Shard.load(Path(folder)).search(vectors_QD, RECALL_AT)
    return {
        "name": shard_name(number),
        "rows": documents.num_rows,
        "found": found,
        "truth": truth,
        "latency_ms": float(np.median(latencies)),
    }


def _measure(shards: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, Any]:
    """Recall of the merged answer, the slowest shard's median latency, and a canary."""
    from bixse.retrieval.exact import recall
    from bixse.retrieval.merge import merge

    def merged(kind: str) -> list[list[Hit]]:
        return [
            merge(of_query, RECALL_AT) for of_query in zip(*(s[kind] for s in shards), strict=True)
        ]

    found, truth = merged("found"), merged("truth")
    best = found[0][0]
    return {
        f"recall@{RECALL_AT}": recall(found, truth),
        "latency_ms": round(max(shard["latency_ms"] for shard in shards), 3),
        "measured_queries": len(texts),
        "canary": {"query": texts[0], "doc_id": best.doc_id, "score": best.score},
    }


if __name__ == "__main__":
    from jobs.pipeline import main

    main("index")

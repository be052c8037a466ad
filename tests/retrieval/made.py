"""Corpora made up for these tests: clustered unit vectors, and artefacts that hold them."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin
from bixse.records import CORPUS, Kind, Metadata, embeddings_schema
from jobs.metadata import write_metadata


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(rows: int, dim: int, seed: int, topics: int = 40) -> np.ndarray:
    """Vectors as encoders give them: around topics, not all over the sphere."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(topics, dim))
    return unit(centres[rng.integers(topics, size=rows)] + rng.normal(size=(rows, dim)) * 0.7)


def table(doc_ids: list[str]) -> pa.Table:
    texts = [f"text of {doc_id}" for doc_id in doc_ids]
    return pa.table({"doc_id": doc_ids, "title": doc_ids, "text": texts}, schema=CORPUS)


def artefacts(
    place: Path,
    doc_ids: list[str],
    vectors: np.ndarray,
    encoder: str = "e",
    part: int = 700,
    metadata: dict[str, Metadata] | None = None,
    kinds: dict[str, Kind] | None = None,
) -> tuple[Artifact, Artifact]:
    """Embeddings and corpus of these documents, in several parts."""
    embeddings = begin(str(place / "embeddings"), "embeddings", config={}, inputs={})
    corpus = begin(str(place / "corpus"), "corpus", config={}, inputs={})
    assert isinstance(embeddings, Draft)
    assert isinstance(corpus, Draft)
    for number, start in enumerate(range(0, len(doc_ids), part)):
        ids, some = doc_ids[start : start + part], vectors[start : start + part]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(some.ravel()), some.shape[1])
        schema = embeddings_schema(some.shape[1])
        embeddings.write_part(number, pa.table([pa.array(ids), lists], schema=schema))
        corpus.write_part(number, table(ids))
        known = [(doc_id, metadata[doc_id]) for doc_id in ids if metadata and doc_id in metadata]
        write_metadata(corpus, number, known)
    extra = {"metadata": kinds} if kinds else {}
    return embeddings.finish(extra={"encoder": encoder}), corpus.finish(extra=extra)

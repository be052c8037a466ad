"""Exact search over an embeddings artefact: for candidates, for evaluation, and as the truth."""

import math
import operator
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.artifacts import Artifact
from bixse.records import Hit
from bixse.retrieval.feedback import rocchio
from bixse.retrieval.finder import Finder
from bixse.retrieval.library import faiss
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.shard import Ranking, Shard

_BLOCK_NUMBERS = 1 << 24
"""Of the vectors that are compared together, 64 MiB: parts are of a thousand documents, and to
merge what each of them finds takes longer than to find it."""

_QUERIES = 1024
"""Compared with a block at a time: memory does not follow their number, their hits aside."""

_Best = list[tuple[float, str]]
"""Score, negative, and `doc_id` of what a query has found so far, the best first."""


def refuse_other_encoder(made: Artifact, encoder: str, fingerprint: str) -> None:
    """Raises ValueError when the vectors of `made` are not of `encoder`, whose fingerprint this is,
    naming both."""
    made_by = made.manifest.extra.get("encoder")
    if made_by != fingerprint:
        raise ValueError(f"{made.url} is of encoder {made_by}, {encoder} is {fingerprint}")


def search_exact(embeddings: Artifact, vectors_QD: Vectors, k: int) -> list[list[Hit]]:
    """The best `k` documents of each query, ties by `doc_id`; reads the embeddings once.

    Some parts are in memory at a time, 64 MiB of vectors or one part.
    """
    best: list[_Best] = [[] for _ in vectors_QD]
    for block in _blocks(embeddings):
        vectors_ND = vectors_of(block)
        index = faiss.IndexFlatIP(vectors_ND.shape[1])
        index.add(vectors_ND)
        shard = Shard(Finder(index), block.select(["doc_id"]))
        for start in range(0, len(vectors_QD), _QUERIES):
            some = slice(start, start + _QUERIES)
            asked = vectors_QD[some]
            found = shard.rankings(asked, [k] * len(asked))
            best[some] = [_with(*both, k) for both in zip(best[some], found, strict=True)]
    return [
        [Hit(doc_id, -negative, rank) for rank, (negative, doc_id) in enumerate(one, start=1)]
        for one in best
    ]


def _with(best: _Best, found: Ranking, k: int) -> _Best:
    """The best `k` of both. Of a later block few are among them, and the rest is not looked at."""
    least = -best[k - 1][0] if len(best) >= k else -math.inf
    end = bisect_right(found.scores, -least, key=operator.neg)
    if not end:
        return best
    more = zip(map(operator.neg, found.scores[:end]), found.doc_ids[:end], strict=True)
    return sorted([*best, *more])[:k]


def _blocks(embeddings: Artifact) -> Iterator[pa.Table]:
    """Documents of consecutive parts, in the order of `doc_id`."""
    waiting: list[pa.Table] = []
    names = embeddings.parts()
    for name in names:
        part = embeddings.part(name, ["doc_id", "vector"])
        waiting.append(part)
        numbers = sum(map(len, waiting)) * part.schema.field("vector").type.list_size
        if numbers >= _BLOCK_NUMBERS or name == names[-1]:
            block = pa.concat_tables(waiting).sort_by("doc_id")
            waiting = []
            if len(block):
                yield block


def search_again(
    embeddings: Artifact,
    queries_QD: Vectors,
    found: Sequence[Sequence[Hit]],
    documents: int,
    weight: float,
    k: int,
) -> list[list[Hit]]:
    """The best `k` by exact search after feedback from the first `documents` hits of each query."""
    heads = [[hit.doc_id for hit in hits[:documents]] for hits in found]
    vectors = _vectors_at(embeddings, {doc_id for head in heads for doc_id in head})
    moved = [
        rocchio(query_D, np.array([vectors[doc_id] for doc_id in head], np.float32), weight)
        for query_D, head in zip(queries_QD, heads, strict=True)
    ]
    return search_exact(embeddings, np.array(moved, np.float32).reshape(queries_QD.shape), k)


def vectors_of(embeddings: pa.Table | pa.RecordBatch) -> Vectors:
    """The `vector` column as an array [rows, dim], float32."""
    column = embeddings["vector"]
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat: npt.NDArray[Any] = whole.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(-1, column.type.list_size), np.float32)


def _vectors_at(embeddings: Artifact, doc_ids: Collection[str]) -> dict[str, Vectors]:
    """The vectors of some documents; one part in memory at a time."""
    found: dict[str, Vectors] = {}
    for name in embeddings.parts():
        part = embeddings.part(name)
        ids = part["doc_id"].to_pylist()
        rows = [row for row, doc_id in enumerate(ids) if doc_id in doc_ids]
        vectors_ND = vectors_of(part.take(rows)) if rows else ()
        found |= {ids[row]: vector for row, vector in zip(rows, vectors_ND, strict=True)}
    return found

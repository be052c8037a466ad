"""Decide what an answer is worth when some shards gave none, and merge those that did.

Pure functions of plain values: the gateway asks, this module decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain
from typing import Literal

import numpy as np

from bixse.models.reranker import reranked
from bixse.retrieval.feedback import rocchio
from bixse.retrieval.fusion import FUSION_DEPTH, fuse_ranks, fuse_scores
from bixse.retrieval.merge import ranked
from serve.messages import Found, FoundInSlot, Vectors
from serve.settings import Canary, Mode

CANARY_TOLERANCE = 0.02
"""Scores of one text differ by less between bfloat16 on a GPU and float32 on a CPU."""

RERANKER = "reranker"
"""What `Missing` calls it; shards are named otherwise."""

Reason = Literal["late", "lost", "failed", "shed"]
"""late: past the deadline. lost: its replica died. failed: it raised. shed: its queue is full."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A shard, or the reranker, without an answer, and why."""

    shard: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the index an answer has seen; `fraction` counts documents."""

    fraction: float
    shards_ok: int
    shards: int
    degraded: tuple[Missing, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Rankings, one a query, what they have seen of the index, and where the time went."""

    results: list[Found]
    coverage: Coverage
    timing_ms: dict[str, float]
    mode: Mode = "dense"
    reranker: str | None = None
    """Fingerprint of the reranker that ordered the rankings; None where none did."""
    feedback: "Feedback | None" = None


@dataclass(frozen=True, slots=True)
class Way:
    """How words take part in a search; a search by vectors alone has none."""

    mode: Literal["lexical", "hybrid"]
    fusion: Literal["rrf", "weighted"] = "rrf"
    dense_weight: float = 0.5

    def depth(self, k: int) -> int:
        """Hits that each ranking is asked for."""
        return k if self.mode == "lexical" else max(k, FUSION_DEPTH)


@dataclass(frozen=True, slots=True)
class Feedback:
    """How far a query moves towards the mean of so many documents that it has found, 0 to 1."""

    documents: int
    weight: float


class Verdict(Enum):
    """What to reply: the hits, 503, or 504."""

    ANSWER = auto()
    UNAVAILABLE = auto()
    TIMEOUT = auto()


def coverage(shard_rows: Mapping[str, int], missing: Sequence[Missing]) -> Coverage:
    """The part of the index that answered. `shard_rows` holds the documents of every shard.

    Raises KeyError for a shard that the index does not have.
    """
    lost_rows = sum(shard_rows[m.shard] for m in missing)
    total = sum(shard_rows.values())
    return Coverage(
        fraction=(total - lost_rows) / total,
        shards_ok=len(shard_rows) - len(missing),
        shards=len(shard_rows),
        degraded=tuple(sorted(missing, key=lambda m: m.shard)),
    )


def verdict(seen: Coverage, *, allow_partial: bool, min_coverage: float) -> Verdict:
    """Whether hits from this part of the index are an answer.

    No shard at all is never an answer: 504 when all of them were late, else 503. Some shards are
    one when the caller allows it and they hold at least `min_coverage` of the documents.
    """
    if seen.shards_ok == 0:
        all_late = all(missing.reason == "late" for missing in seen.degraded)
        return Verdict.TIMEOUT if all_late else Verdict.UNAVAILABLE
    whole = seen.shards_ok == seen.shards
    if not whole and (not allow_partial or seen.fraction < min_coverage):
        return Verdict.UNAVAILABLE
    return Verdict.ANSWER


def canary_problem(known: Canary, answer: Answer) -> str | None:
    """Why the known document does not stand at the top, or None when it does.

    Documents within rounding of the top share it: an index built on a GPU and served on a CPU may
    order them otherwise, and is none the worse.
    """
    if not answer.results:
        return "no shard answered the canary query"
    hits = answer.results[0].hits
    mine = next((hit.score for hit in hits if hit.doc_id == known.doc_id), None)
    if mine is None or hits[0].score - mine > CANARY_TOLERANCE:
        return f"the canary query found {hits[0].doc_id}, expected {known.doc_id}"
    if abs(mine - known.score) > CANARY_TOLERANCE:
        return f"the canary's document scores {mine:.3f}, expected {known.score:.3f}"
    return None


def one_ranking(found: Sequence[FoundInSlot], k: int) -> Found:
    """The best `k` hits over all shards, with their fields when every slot gave fields."""
    scored = (zip(slot.scores, slot.doc_ids, strict=True) for slot in found)
    hits = ranked(chain.from_iterable(scored), k)
    if any(slot.documents is None for slot in found):
        return Found(hits)
    fields = {doc.doc_id: doc for slot in found for doc in slot.documents or ()}
    return Found(hits, [fields[hit.doc_id] for hit in hits])


def moved(query: Vectors, found: Sequence[FoundInSlot], feedback: Feedback) -> Vectors:
    """A query's vector after feedback from the best hits over all shards, given with vectors."""
    vectors: dict[str, Vectors] = {}
    for slot in found:
        assert slot.vectors is not None
        vectors |= zip(slot.doc_ids, slot.vectors, strict=True)
    head = [vectors[hit.doc_id] for hit in one_ranking(found, feedback.documents).hits]
    return rocchio(query, np.array(head, np.float32), feedback.weight)


def fused(dense: Found, lexical: Found, way: Way, k: int) -> Found:
    """One ranking by vectors and by words, each already that of all shards that answered."""
    if way.fusion == "rrf":
        hits = fuse_ranks([dense.hits, lexical.hits], k)
    else:
        hits = fuse_scores(dense.hits, lexical.hits, way.dense_weight, k)
    sides = (dense.hits, lexical.hits)
    if dense.documents is None or lexical.documents is None:
        return Found(hits, fused=sides)
    fields = {doc.doc_id: doc for doc in (*dense.documents, *lexical.documents)}
    return Found(hits, [fields[hit.doc_id] for hit in hits], sides)


def reordered(found: Found, scores: Sequence[float], k: int) -> Found:
    """The best `k` of one query by the scores that a reranker gave its hits, ties by `doc_id`."""
    hits = reranked(found.hits, scores)[:k]
    fields = {document.doc_id: document for document in found.documents or ()}
    documents = None if found.documents is None else [fields[hit.doc_id] for hit in hits]
    return replace(found, hits=hits, documents=documents, first_stage=found.hits)


def head(found: Found, k: int) -> Found:
    """The best `k` as they were found."""
    documents = None if found.documents is None else found.documents[:k]
    return replace(found, hits=found.hits[:k], documents=documents)

"""nDCG@10 of a generation on judgments that were kept out of training."""

import asyncio
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from bixse.artifacts import Artifact, ArtifactError
from serve.generation import HeldOut
from serve.messages import RefusedText, Wanted

if TYPE_CHECKING:
    from serve.lane import Lane

_K = 10
_WITHIN_S = 30.0
_JUDGED = ("judgments", "qrels")


def read_judged(queries: str, judgments: str) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Texts of the judged queries, and their relevance: query_id -> doc_id -> relevance.

    Of an artefact with splits (`qrels`), the rows of `train` are left out. Raises ArtifactError
    when an artefact is missing, damaged or of another kind, or no query is judged.
    """
    given = Artifact.open(judgments)
    if given.manifest.kind not in _JUDGED:
        kinds = " or ".join(_JUDGED)
        raise ArtifactError(f"expected {kinds} at {judgments}, found {given.manifest.kind}")
    table = given.table()
    judged: dict[str, dict[str, float]] = defaultdict(dict)
    for row in table.to_pylist():
        if row.get("split") != "train":
            judged[row["query_id"]][row["doc_id"]] = float(row["relevance"])
    rows = Artifact.open(queries, "queries").rows("query_id", "text")
    texts = {query_id: text for query_id, text in rows if query_id in judged}
    if not texts:
        raise ArtifactError(f"no query of {queries} is judged in {judgments}")
    return texts, dict(judged)


async def heldout_ndcg(
    lane: "Lane", queries: str, judgments: str, batch: int, depth: int
) -> HeldOut:
    """Mean nDCG@10 over the judged queries; where the generation has a reranker, of its order of
    the first `depth` hits too.

    Raises ArtifactError as `read_judged`, and when the reranker gives no scores; TimeoutError,
    Unavailable. A ranking that lacks a shard is no measurement and raises TimeoutError too.
    """
    from bixse.evaluation.metrics import ndcg

    texts, judged = await asyncio.to_thread(read_judged, queries, judgments)
    ids, found, reranked = sorted(texts), 0.0, 0.0
    reranks = lane.generation.reranker is not None
    wanted = Wanted(depth, True) if reranks else Wanted(_K, False)
    for start in range(0, len(ids), batch):
        some = ids[start : start + batch]
        try:
            answer = await lane.search([texts[i] for i in some], wanted, _deadline())
        except RefusedText as error:
            raise _unreadable(some[error.position], queries, error) from None
        if answer.coverage.degraded:
            raise TimeoutError
        for query_id, one in zip(some, answer.results, strict=True):
            found += ndcg(one.hits, judged[query_id], _K)
            if not reranks:
                continue
            alone = replace(answer, results=[one])
            try:
                # One at a time: requests of others want the reranker meanwhile.
                second = await lane.rerank([texts[query_id]], alone, _K, _deadline())
            except RefusedText as error:
                raise _unreadable(query_id, queries, error) from None
            if second.reranker is None:
                reason = second.coverage.degraded[-1].reason
                raise ArtifactError(
                    f"the reranker gave no scores for query {query_id} of {queries} ({reason})"
                )
            reranked += ndcg(second.results[0].hits, judged[query_id], _K)
    return HeldOut(found / len(ids), reranked / len(ids) if reranks else None)


def _deadline() -> float:
    return asyncio.get_running_loop().time() + _WITHIN_S


def _unreadable(query_id: str, queries: str, error: RefusedText) -> ArtifactError:
    return ArtifactError(f"query {query_id} of {queries} cannot be read: {error.reason}")

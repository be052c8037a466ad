"""nDCG@10 of a generation on judgments that were kept out of training."""

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from bixse.artifacts import Artifact, ArtifactError
from serve.messages import RefusedText, Wanted

if TYPE_CHECKING:
    from serve.lane import Lane

_K = 10
_WITHIN_S = 30.0


def read_judged(queries: str, judgments: str) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Texts of the judged queries, and their relevance: query_id -> doc_id -> relevance.

    Of an artefact with splits (`qrels`), the rows of `train` are left out. Raises ArtifactError
    when an artefact is missing or damaged, or no query is judged.
    """
    table = Artifact.open(judgments).table()
    judged: dict[str, dict[str, float]] = defaultdict(dict)
    for row in table.to_pylist():
        if row.get("split") != "train":
            judged[row["query_id"]][row["doc_id"]] = float(row["relevance"])
    rows = Artifact.open(queries, "queries").table(["query_id", "text"]).to_pylist()
    texts = {row["query_id"]: row["text"] for row in rows if row["query_id"] in judged}
    if not texts:
        raise ArtifactError(f"no query of {queries} is judged in {judgments}")
    return texts, dict(judged)


async def heldout_ndcg(lane: "Lane", queries: str, judgments: str, batch: int) -> float:
    """Mean nDCG@10 over the judged queries.

    Raises ArtifactError as `read_judged`, TimeoutError, Unavailable; a ranking that lacks a shard
    is no measurement and raises TimeoutError too.
    """
    from bixse.evaluation.metrics import ndcg

    texts, judged = await asyncio.to_thread(read_judged, queries, judgments)
    ids, total = sorted(texts), 0.0
    for start in range(0, len(ids), batch):
        some = ids[start : start + batch]
        deadline = asyncio.get_running_loop().time() + _WITHIN_S
        try:
            answer = await lane.search([texts[i] for i in some], Wanted(_K, False), deadline)
        except RefusedText as error:
            raise ArtifactError(
                f"query {some[error.position]} of {queries} cannot be encoded: {error.reason}"
            ) from None
        if answer.coverage.degraded:
            raise TimeoutError
        total += sum(
            ndcg(found.hits, judged[query_id], _K)
            for query_id, found in zip(some, answer.results, strict=True)
        )
    return total / len(ids)

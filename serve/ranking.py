"""Between the JSON of `/search` and the values of a search."""

from bixse.retrieval.filters import FilterError, check
from serve.errors import invalid
from serve.fanout import Feedback, Way
from serve.messages import Found, Wanted
from serve.schema import HitReply, SearchRequest, SideReply
from serve.settings import ServedIndex


def way_of(request: SearchRequest, index: ServedIndex) -> Way | None:
    """How words take part, None when they do not.

    Raises ApiError when they should and the index has none.
    """
    if request.mode == "dense":
        return None
    if not index.lexical:
        raise invalid(
            "this index was built without BM25 and answers mode dense only: build it again with "
            f"`python -m jobs.index … --retrieval.bm25` to search {request.mode}",
            "mode",
        )
    return Way(request.mode, request.fusion, request.dense_weight)


def feedback_of(request: SearchRequest) -> Feedback | None:
    """How far the query is to move, None when it is not."""
    asked = request.feedback
    return None if asked is None else Feedback(asked.documents, asked.weight)


def wanted_of(request: SearchRequest, index: ServedIndex) -> Wanted:
    """What is wanted for each query, by a reranker that is to read it if by nobody else.

    Raises ApiError for a filter that the index cannot answer.
    """
    depth, fields = request.rerank or request.k, request.include_text or request.rerank is not None
    if request.filter is None:
        return Wanted(depth, fields)
    try:
        check(request.filter, index.metadata)
    except FilterError as error:
        # Names of fields come from the body and may not be text that UTF-8 can hold.
        path = error.path.encode("utf-8", "replace").decode()
        raise invalid(str(error), path) from None
    return Wanted(depth, fields, filter=request.filter.text)


def hits_of(found: Found) -> list[HitReply]:
    """The hits of one query as the reply holds them."""
    hits = [HitReply(doc_id=h.doc_id, score=h.score, rank=h.rank) for h in found.hits]
    if found.documents is not None:
        for hit, document in zip(hits, found.documents, strict=True):
            hit.title, hit.text = document.title, document.text
            hit.metadata = document.metadata
    if found.fused is not None:
        dense, lexical = (
            {h.doc_id: SideReply(score=h.score, rank=h.rank) for h in side} for side in found.fused
        )
        for hit in hits:
            hit.dense, hit.lexical = dense.get(hit.doc_id), lexical.get(hit.doc_id)
    if found.first_stage is not None:
        before = {h.doc_id: SideReply(score=h.score, rank=h.rank) for h in found.first_stage}
        for hit in hits:
            hit.first_stage = before[hit.doc_id]
    return hits

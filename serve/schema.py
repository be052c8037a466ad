"""Requests and replies, as JSON."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from bixse.models.encoder import Role
from bixse.records import Kind, Metadata
from bixse.retrieval.filters import Filter, bounded
from serve.settings import MOST_TEXTS, Mode

_UNREADABLE = re.compile("[\0\ud800-\udfff]")


def readable(text: str) -> str:
    """The text, if an encoder can make something of it; raises ValueError otherwise."""
    if not text or text.isspace():
        raise ValueError("must not be empty")
    if found := _UNREADABLE.search(text):
        what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
        raise ValueError(f"must not hold {what}")
    return text


def _not_too_many(value: object) -> object:
    if isinstance(value, list) and len(value) > MOST_TEXTS:
        raise ValueError(f"must hold at most {MOST_TEXTS} texts")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_OneOrMore = str | Annotated[list[str], Field(min_length=1)]


Text = Annotated[str, AfterValidator(readable)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True), BeforeValidator(_not_too_many)]


class Strict(BaseModel):
    """A request: unknown fields and wrong types are errors.

    pydantic describes every error, of which the first alone is answered: their number is bounded
    here, by the fields, and in lists by `fail_fast`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_few_fields(cls, said: object) -> object:
        if isinstance(said, dict) and len(said) > len(cls.model_fields):
            unknown = next(name for name in said if name not in cls.model_fields)
            most = len(cls.model_fields)
            raise ValueError(f"may hold at most {most} fields, and {unknown!r} is none of them")
        return said


class FeedbackRequest(Strict):
    """Search twice: the second time with the query moved towards what the first has found."""

    documents: int = Field(default=3, ge=1, le=20, description="Of the first search, from the top")
    weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Of the mean of their vectors; the query has the rest (Rocchio 1971; on dense "
        "vectors Li et al., arXiv 2108.11044)",
    )


class SearchRequest(Strict):
    query: Text | None = Field(default=None, description="One query: the reply has `hits`")
    queries: Texts | None = Field(
        default=None,
        description="Several, instead of `query`: the reply has `results`, a ranking for each",
    )
    k: int = Field(default=10, ge=1, description="Hits of each query, at most")
    timeout_ms: int | None = Field(
        default=None,
        ge=1,
        description="When an answer is due; unset is the application's --default-timeout-ms. What "
        "shards have found by then is answered; 504 where none has",
    )
    allow_partial: bool = Field(
        default=True, description="Whether an answer may lack shards; if not it is 503 then"
    )
    min_coverage: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Least part of the documents that an answer must have seen; 503 below it",
    )
    include_text: bool = Field(
        default=True, description="Whether hits have title, text and metadata"
    )
    filter: Annotated[Filter, BeforeValidator(bounded)] | None = Field(
        default=None,
        description="Only documents whose metadata meet this are searched, by vectors and by "
        'words: {"brand": "acme", "price": {"gte": 5, "lt": 10}, "tags": {"any": ["new"]}}. Of '
        "several fields all must hold; `not` takes a filter, `or` a list of them. A field that "
        "this index does not have is 422",
    )
    mode: Mode = Field(
        default="dense",
        description="dense: by vectors. lexical: by words (BM25). hybrid: both, fused. An index "
        "built without BM25 answers dense only; `index.modes` of a reply says which it has",
    )
    fusion: Literal["rrf", "weighted"] = Field(
        default="rrf",
        description="Of hybrid. rrf: by reciprocal ranks, k = 60 (Cormack et al. 2009). weighted: "
        "by scores, each between its least possible and the best of its ranking (Bruch et al. "
        "2023). Of both rankings the first max(k, 100) take part",
    )
    dense_weight: float = Field(
        default=0.5, ge=0, le=1, description="Of weighted; words have the rest"
    )

    feedback: FeedbackRequest | None = Field(
        default=None,
        description="Of dense: pseudo-relevance feedback within the same deadline and generation. "
        "`score` is then the cosine with the moved query. A shard counts when it answered twice; "
        "the first search has half the time. `jobs.evaluate --evaluation.feedback 3` says whether "
        "it pays",
    )
    rerank: int | None = Field(
        default=None,
        ge=1,
        description="So many hits of each query, k at least, are read by the reranker of this "
        "application, and the best k by its scores are given. Shards then have half of the time "
        "that encoding leaves. When the reranker fails or misses the deadline: with allow_partial "
        "the best k as they were found, and `coverage.degraded` names `reranker`; without, 503 or "
        "504. 422 where there is no reranker",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "SearchRequest":
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        if self.mode != "hybrid" and self.model_fields_set & {"fusion", "dense_weight"}:
            raise ValueError("fusion and dense_weight are for mode hybrid")
        if self.mode != "dense" and self.feedback is not None:
            raise ValueError("feedback is for mode dense")
        if self.fusion != "weighted" and "dense_weight" in self.model_fields_set:
            raise ValueError("dense_weight is for fusion weighted")
        return self


class SideReply(BaseModel):
    """Where a hit stands in a ranking that this one was made of."""

    score: float
    rank: int


class HitReply(BaseModel):
    doc_id: str
    score: float = Field(
        description="Higher is better. dense: cosine, -1 to 1. lexical: BM25, above 0, comparable "
        "within one query only. hybrid, rrf: sum of 1 / (60 + rank), at most 2 / 61. hybrid, "
        "weighted: 0 to 1, comparable within one query only. With `first_stage`: the reranker's "
        "log-odds"
    )
    rank: int = Field(
        description="Place in this list, from 1. The higher score stands first, but where an "
        "application with --swap-share has changed two neighbours"
    )
    dense: SideReply | None = Field(
        default=None, description="Of hybrid: its cosine and rank by vectors, if among those fused"
    )
    lexical: SideReply | None = Field(
        default=None, description="Of hybrid: its BM25 score and rank, if among those fused"
    )
    first_stage: SideReply | None = Field(
        default=None, description="Of a reranked hit: its score and rank as it was found"
    )
    title: str | None = None
    text: str | None = None
    metadata: Metadata | None = Field(
        default=None, description="With the text, of documents that have any"
    )


class DegradedReply(BaseModel):
    shard: str = Field(
        description="A shard without an answer; or `reranker`, where hits stand as they were found"
    )
    reason: str = Field(description="late, lost, failed or shed")


class CoverageReply(BaseModel):
    fraction: float = Field(description="Part of the index's documents that was searched, 0 to 1")
    shards_ok: int
    shards: int
    degraded: list[DegradedReply]


class IndexReply(BaseModel):
    generation: int
    fingerprint: str
    modes: list[Mode] = Field(description="How this index can be searched")
    metadata: dict[str, Kind] | None = Field(
        default=None, description="Fields that `filter` may name here and what they hold, if any"
    )


class SearchReply(BaseModel):
    hits: list[HitReply] | None = None
    results: list[list[HitReply]] | None = None
    coverage: CoverageReply
    index: IndexReply
    encoder: str
    reranker: str | None = Field(
        default=None, description="Fingerprint of the reranker, where it has ordered the hits"
    )
    timing_ms: dict[str, float]
    request_id: str | None = Field(
        default=None, description="By which the request log knows this answer, where it is kept"
    )


class EmbeddingsRequest(Strict):
    """OpenAI's request, and `input_type` for encoders that prompt queries and documents apart."""

    input: Annotated[Texts, BeforeValidator(_as_list, json_schema_input_type=_OneOrMore)]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    input_type: Role = "query"
    dimensions: int | None = None
    user: str | None = None


class EmbeddingReply(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class UsageReply(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingReply]
    model: str
    usage: UsageReply


class RetrieveRequest(Strict):
    """The request of Search-R1's retriever (github.com/PeterGriffinJin/Search-R1).

    An answer has seen the whole index, or is 503 or 504.
    """

    queries: Texts
    topk: int | None = Field(default=None, ge=1, description="Documents a query; unset is 10")
    return_scores: bool = Field(
        default=False,
        description="Whether an element is `{document, score}`, score being cosine, or the "
        "document alone",
    )


class ChangeRequest(Strict):
    """Another index (with its encoder, unless that stays), another reranker, both, or back to the
    generation before.
    """

    index: Annotated[Text, Field(description="URL of an index artefact")] | None = None
    encoder: Annotated[Text, Field(description="Of `index`; unset is the one served")] | None = None
    reranker: Text | None = Field(
        default=None, description="Of an application that was started with one"
    )
    rollback: bool = Field(default=False, description="Whether the generation before comes back")

    @model_validator(mode="after")
    def _one_of_two(self) -> "ChangeRequest":
        if self.encoder is not None and self.index is None:
            raise ValueError("encoder goes with the index that it has made: give index too")
        if self.rollback == (self.index is not None or self.reranker is not None):
            raise ValueError(
                "give either index (and encoder), reranker, or all of them, or rollback: true"
            )
        return self


class GenerationReply(BaseModel):
    generation: int
    index: str
    fingerprint: str
    encoder: str
    reranker: str | None = Field(default=None, description="Fingerprint, where there is one")


class GenerationsReply(BaseModel):
    """What is served, and what a rollback would serve."""

    current: GenerationReply
    previous: GenerationReply | None = None


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None = None


class ErrorReply(BaseModel):
    """The one shape of every failure."""

    error: ErrorDetail

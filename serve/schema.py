"""Requests and replies, as JSON."""

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


def readable(text: str) -> str:
    """The text, if an encoder can make something of it; raises ValueError otherwise."""
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not hold half of a surrogate pair")
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(readable)]


class Strict(BaseModel):
    """A request: unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SearchRequest(Strict):
    query: Text | None = None
    queries: Annotated[list[Text], Field(min_length=1)] | None = None
    k: int = Field(default=10, ge=1)
    timeout_ms: int | None = Field(default=None, ge=1)
    allow_partial: bool = True
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    include_text: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> "SearchRequest":
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        return self


class HitReply(BaseModel):
    doc_id: str
    score: float
    rank: int
    title: str | None = None
    text: str | None = None


class DegradedReply(BaseModel):
    shard: str
    reason: str


class CoverageReply(BaseModel):
    fraction: float
    shards_ok: int
    shards: int
    degraded: list[DegradedReply]


class IndexReply(BaseModel):
    generation: int
    fingerprint: str


class SearchReply(BaseModel):
    hits: list[HitReply] | None = None
    results: list[list[HitReply]] | None = None
    coverage: CoverageReply
    index: IndexReply
    encoder: str
    timing_ms: dict[str, float]
    request_id: str | None = Field(
        default=None, description="By which the request log knows this answer, where it is kept"
    )


class EmbeddingsRequest(Strict):
    """OpenAI's request, and `input_type` for encoders that prompt queries and documents apart."""

    input: Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list)]
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
    """The request of Search-R1's retriever (github.com/PeterGriffinJin/Search-R1)."""

    queries: Annotated[list[Text], Field(min_length=1)]
    topk: int | None = Field(default=None, ge=1)
    return_scores: bool = False


class ChangeRequest(Strict):
    """Another index (with its encoder, unless that stays), or back to the generation before."""

    index: Annotated[Text, Field(description="URL of an index artefact")] | None = None
    encoder: Text | None = None
    rollback: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "ChangeRequest":
        if self.rollback == (self.index is not None) or (self.rollback and self.encoder):
            raise ValueError("give either index (and encoder) or rollback: true")
        return self


class GenerationReply(BaseModel):
    generation: int
    index: str
    fingerprint: str
    encoder: str


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

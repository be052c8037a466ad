"""Names of encoders; what a reranker begins as and reads."""

from pydantic import Field

from bixse.settings import Settings

PACKAGED = "packaged:all-MiniLM-L6-v2"
"""The encoder that a registry package carries, for machines that reach no model hub."""


class Reranking(Settings):
    """A reranker in place of an encoder is trained, and reads what others have found."""

    start: str = PACKAGED
    """What it begins as: a cross-encoder, or an encoder, whose head is drawn by `training.seed`."""
    negatives: int = Field(default=8, ge=0)
    """Unjudged documents of each query beside what people graded, as irrelevant, drawn from the
    first `depth` of BM25 and of the base encoder: grades that are only of what bears on a query
    teach no reranker what does not. Of no effect where `judging` asks a judge, who grades the
    candidates."""
    depth: int = Field(default=50, ge=1)
    """Documents that it reads of what BM25 and the base encoder find for a query."""

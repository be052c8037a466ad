"""Where candidates come from, and how many."""

from pydantic import Field

from bixse.settings import Settings


class Pools(Settings):
    """The `pair` stage: candidates of several sources, pooled."""

    bm25: int = Field(default=10, ge=0)
    """Best documents of BM25 for each query."""
    dense: int = Field(default=10, ge=0)
    """Best documents of the base encoder for each query."""
    random: int = Field(default=2, ge=0)
    """Documents drawn at random for each query: what the judge must call irrelevant."""
    written_from: bool = False
    """The document that a synthetic query was written from is a candidate too."""
    seed: int = 0
    """Of the random draw."""

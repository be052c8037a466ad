"""Where candidates come from, how many, and which of them teach."""

from typing import Literal

from pydantic import Field, field_validator

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
    """Seed of the random draw."""


class Neighbours(Settings):
    """Each linked document against neighbours in the graph of links: SciNCL, arXiv 2202.06671."""

    links: str = ""
    """A table with two columns of doc_ids a line, under a header, if any; tab-separated or CSV."""
    dimensions: int = Field(default=128, ge=2)
    """Dimensions of the node vectors (the paper: 768, for 52 million)."""
    walk: tuple[float, ...] = Field(default=(0, 0, 1, 1, 1, 1, 1, 1), min_length=1)
    """What each further step of a walk weighs in them (FastRP, arXiv 1908.11512); ours."""
    positive: tuple[float, float] = (0.0, 0.01)
    """Ranks of neighbours that positives come from, as shares of the linked documents (ours; the
    paper: ranks 20 to 25 of its training papers)."""
    hard: tuple[float, float] = (0.1, 0.15)
    """Ranks that hard negatives come from, as shares too (ours; the paper: ranks 3998 to 4000)."""
    positives: int = Field(default=5, ge=1)
    """Of each document (the paper's)."""
    hard_negatives: int = Field(default=2, ge=0)
    """Of each document (the paper's)."""
    easy_negatives: int = Field(default=3, ge=0)
    """Of each document, at random among those that are no near neighbours (the paper's)."""
    seed: int = 0
    """Seed of the node vectors and of the draw."""

    @field_validator("walk")
    @classmethod
    def _reaches(cls, walk: tuple[float, ...]) -> tuple[float, ...]:
        # Vectors of nothing have no direction: each document would be its own nearest.
        if not any(walk):
            raise ValueError("a walk needs a step whose weight is not 0")
        return walk


class Stratified(Settings):
    """Judged documents of a query that cover the range of its scores: arXiv 2604.04734."""

    documents: int = Field(default=8, ge=2)
    """Kept of each query; the best is always one of them."""
    by: Literal["score", "rank"] = "score"
    """One from each of so many bins of equal width in relevance, or of equal count."""
    seed: int = 0
    """Seed of the draw."""

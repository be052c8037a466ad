"""What is measured, and on which queries."""

from pydantic import Field

from bixse.settings import Settings


class Evaluation(Settings):
    """The `evaluate` stage: full corpus, graded."""

    depth: int = Field(default=100, ge=10)
    """Documents ranked for each query."""
    relevant_from: float = Field(default=0.5, gt=0, le=1)
    """Relevance from which a document counts as relevant for Recall and MRR. 0.5 is NIST's cut of
    the 0-3 scale (grade 2 and above) and takes every binary positive."""
    hybrid: bool = False
    """Measure each encoder fused with BM25 too, by the ranks of both, as `/search` fuses them."""
    feedback: int = Field(default=0, ge=0)
    """Measure each encoder too after feedback from so many of the documents it finds first, as
    `/search` does with `feedback`; 0 measures none."""
    feedback_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the mean of those documents in the new query vector; the query has the rest."""
    bootstrap: int = Field(default=10_000, ge=100)
    """Resamples of the queries for each interval."""
    seed: int = 0
    """Seed of the resampling."""

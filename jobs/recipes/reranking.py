"""Rerankers: a cross-encoder reads the head of what a retriever found, and no index is made."""

from bixse.candidates.settings import Pools
from bixse.models.settings import Reranking
from bixse.training.objective_settings import LCE, PairBCE
from bixse.training.settings import Training
from jobs.recipe import About, Recipe
from jobs.recipes.bixse import bixse


def lce() -> Recipe:
    """LCE, arXiv 2101.08751: each positive against negatives of its own query.

    Candidates are the head of BM25 and of the base encoder, which it will follow; no random ones.
    With the labels of a language model it is the second half of arXiv 2510.01229, whose model and
    figures are not public. One group a positive, never two positives in one.
    """
    return bixse().replace(
        name="lce",
        about=About(
            paper="LCE, arXiv 2101.08751",
            hardware="as bixse",
            cost="as bixse; every judged pair is read as one text",
        ),
        candidates=Pools(bm25=20, dense=20, random=0),
        # Groups of 8 are usual; the rate is that of our encoders.
        training=Training(objective=LCE(), batch_size=16, docs_per_query=8),
        reranking=Reranking(),
    )


def bce_reranker() -> Recipe:
    """Graded BCE on judged pairs alone: a reranker whose scores are probabilities of relevance."""
    return lce().replace(
        name="bce_reranker",
        about=About(
            paper="BCE of BiXSE, arXiv 2508.06781, without in-batch zeros",
            hardware="as bixse",
            cost="as lce",
        ),
        training=Training(objective=PairBCE(), batch_size=16, docs_per_query=8),
    )

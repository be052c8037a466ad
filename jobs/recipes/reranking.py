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
    Beside grades that people gave, some of the documents that it would read and nobody judged are
    negatives, as in the paper.
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
        # Groups of 8 are usual. The head is new: at the 2e-5 of our encoders it moves by 1 % of its
        # norm in the 36 steps that a thousand grades give.
        training=Training(objective=LCE(), batch_size=8, docs_per_query=8, learning_rate=1e-4),
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
        training=Training(objective=PairBCE(), batch_size=8, docs_per_query=8, learning_rate=1e-4),
    )

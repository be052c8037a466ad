"""The embedded default: no GPU, no model hub, no data download."""

from bixse.candidates.settings import Pools
from bixse.judging.settings import Judging
from bixse.retrieval.settings import Retrieval
from bixse.synthesis.settings import Cloze
from bixse.training.objective_settings import GradedBCE
from bixse.training.settings import Training
from jobs.recipe import About, Ingest, Recipe


def quickstart() -> Recipe:
    """The documentation of the Python that runs it, the packaged MiniLM, the features judge."""
    return Recipe(
        name="quickstart",
        about=About(
            paper="BiXSE, arXiv 2508.06781, on the embedded judge",
            hardware="laptop, 2 cores",
            cost="minutes, no label is paid for",
        ),
        ingest=Ingest(source="python-docs"),
        synthesis=Cloze(queries=400),
        candidates=Pools(bm25=4, dense=4, random=1),
        judging=Judging(judge="features"),
        # ours: two CPU cores have about two minutes for training
        training=Training(
            objective=GradedBCE(), batch_size=16, docs_per_query=4, epochs=1, document_tokens=96
        ),
        retrieval=Retrieval(shards=2),
    )

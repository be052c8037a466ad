"""What people clicked on, as supervision."""

from bixse.judging.settings import Judging
from bixse.training.objective_settings import ClickBCE
from bixse.training.settings import Training
from jobs.recipe import About, Recipe
from jobs.recipes.bixse import bixse


def two_tower() -> Recipe:
    """Two-tower click models, arXiv 2506.20501: the encoder learns what ranks do not explain.

    Differs from the paper: what each rank does is found first, from documents that the log shows at
    two ranks for the same query, and stays (the paper learns a scalar a rank beside the relevance
    tower); the batch's other documents count as irrelevant, since an index ranks what was never
    shown as well. However often a query was asked, it weighs as many as it has documents.
    `bixse --judging.judge clicks` trains on the judgments made of the clicks instead.
    """
    return bixse().replace(
        name="two_tower",
        about=About(
            paper="two-tower click models, arXiv 2506.20501",
            hardware="laptop",
            cost="training; no label is paid",
        ),
        judging=Judging(judge="clicks"),
        # Ours: documents that were shown together meet in a row.
        training=Training(objective=ClickBCE(), batch_size=16, docs_per_query=8),
    )

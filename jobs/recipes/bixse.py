"""BiXSE on your own corpus, and the three baselines it is compared with on the same rows."""

from bixse.judging.settings import Judging
from bixse.synthesis.settings import Cloze
from bixse.training.objective_settings import GradedBCE, InfoNCE
from bixse.training.settings import Training
from jobs.recipe import About, Recipe


def bixse() -> Recipe:
    """BiXSE, arXiv 2508.06781: graded BCE with in-batch zeros.

    Differs from the paper: the labels are whoever `judging.judge` names (the paper: Qwen2.5-32B on
    LightBlue's prompt), beta starts calibrated on the first batch (the paper's start is unknown),
    alpha stays at 20, known grades inside the batch replace zeros, and no grade is dropped for
    speaking against the label of a source (LightBlue's filter).
    """
    return Recipe(
        name="bixse",
        about=About(
            paper="BiXSE, arXiv 2508.06781",
            hardware="laptop with given grades; 1+ GPU with judging.judge vllm",
            cost="training, and one prefill a pair and order with vllm",
        ),
        training=Training(objective=GradedBCE()),
    )


def bixse_cloze() -> Recipe:
    """BiXSE for a corpus and nothing else: sentences cut out as queries, the embedded judge.

    The cloze queries are ours in place of the paper's; see `bixse.synthesis.queries`.
    """
    return bixse().replace(
        name="bixse_cloze",
        about=About(
            paper="BiXSE on the inverse cloze task, arXiv 1906.00300",
            hardware="laptop, or 1+ GPU with judging.judge vllm",
            cost="training; no label is paid for with features",
        ),
        synthesis=Cloze(),
        judging=Judging(judge="features"),
    )


def infonce() -> Recipe:
    """InfoNCE with every judged document as the positive: what ignoring grades costs."""
    return bixse().replace(
        name="infonce",
        about=About(paper="InfoNCE, arXiv 1807.03748", hardware="as bixse", cost="as bixse"),
        training=Training(objective=InfoNCE(positives="all")),
    )


def infonce_threshold() -> Recipe:
    """InfoNCE on the documents judged 0.5 or better: the fair binary baseline."""
    return infonce().replace(
        name="infonce_threshold", training=Training(objective=InfoNCE(positives="threshold"))
    )


def infonce_weighted() -> Recipe:
    """InfoNCE with each row weighted by its relevance: the strongest softmax baseline."""
    return infonce().replace(
        name="infonce_weighted", training=Training(objective=InfoNCE(positives="weighted"))
    )

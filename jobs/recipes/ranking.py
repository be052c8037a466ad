"""Objectives that compare a query's documents with each other, on the rows of `bixse`.

The published systems that they come from make their labels in other ways as well; each recipe says
what it leaves out.
"""

from bixse.candidates.settings import Neighbours, Pools, Stratified
from bixse.judging.settings import Judging, Preferring
from bixse.training.objective_settings import (
    Combined,
    InfoNCE,
    LambdaLoss,
    ListKL,
    MarginMSE,
    PreferenceKL,
    RankNet,
    Triplet,
    Wasserstein,
)
from bixse.training.settings import Training
from jobs.recipe import About, Recipe
from jobs.recipes.bixse import bixse


def list_kl() -> Recipe:
    """KL distillation of the judge's relevance over each query's documents and the batch."""
    return _ranking("list_kl", "DPR's form in PairDistill, arXiv 2410.01383", ListKL())


def ranknet() -> Recipe:
    """RankNet on the order of grades, the batch's other documents below all that are relevant."""
    return _ranking("ranknet", "RankNet, ICML 2005", RankNet())


def lambda_loss() -> Recipe:
    """LambdaLoss: the pairs of RankNet, weighted by nDCG."""
    return _ranking("lambda_loss", "LambdaLoss, CIKM 2018", LambdaLoss())


def margin_mse() -> Recipe:
    """MarginMSE: differences of cosine regressed on differences of relevance."""
    return _ranking("margin_mse", "MarginMSE, arXiv 2010.02666", MarginMSE())


def triplet() -> Recipe:
    """SciNCL's triplet loss, on judged documents in place of neighbours in a graph (`scincl`)."""
    return _ranking("triplet", "objective of SciNCL, arXiv 2202.06671", Triplet())


def wasserstein() -> Recipe:
    """SyCL's list-wise loss with its KL companion, on judged documents in place of written ones.

    The weights of the two are ours.
    """
    both = Combined(parts=(Wasserstein(), ListKL()), weights=(1.0, 1.0))
    return _ranking("wasserstein", "objective of SyCL, arXiv 2503.23239", both)


def pairdistill() -> Recipe:
    """PairDistill: KL over the judged list, KL over preferences (lambda 1, its DPR), in-batch CE.

    Differs from the paper: one round; the preferences are those of `judging.vllm`, asked in windows
    of the judged ranking (`preferring`), or come in a file (--judging.preferences); the pointwise
    teacher is whoever `judging.judge` names, its relevance in place of logits; in the in-batch term
    every document judged .5 or better is a positive, not the best alone, and a query's worse
    documents stay among the negatives.
    """
    sum_of_three = Combined(
        parts=(ListKL(in_batch=False), PreferenceKL(), InfoNCE(positives="threshold")),
        weights=(1.0, 1.0, 1.0),
    )
    return bixse().replace(
        name="pairdistill",
        about=About(
            paper="PairDistill, arXiv 2410.01383",
            hardware="1+ GPU; laptop with given grades and preferences",
            cost="as bixse; two prefills a compared pair, unless the preferences are yours",
        ),
        preferring=Preferring(train=True),
        # The paper's batch of 32 queries; its 64 documents a query where a query has as many. Rate
        # and steps are ours (the paper: 1e-5 and 30,000 steps for ColBERT, 3e-5 for DPR).
        training=Training(objective=sum_of_three, batch_size=32, docs_per_query=64),
    )


def stratified_kd() -> Recipe:
    """KL distillation of a cross-encoder on documents that cover its scores: arXiv 2604.04734.

    Of 100 retrieved documents 8 are kept, one from each bin of equal width (the paper's binning and
    numbers are not public). The teacher's score is its probability of relevance, and not its
    log-odds. `--judging.judge given --judging.given.file` takes a teacher's scores from a file.
    Documents that the teacher cannot read whole are rejected, unless
    `--judging.cross-encoder.document-tokens` cuts them.
    """
    return bixse().replace(
        name="stratified_kd",
        about=About(
            paper="stratified sampling for KD, arXiv 2604.04734",
            hardware="1+ GPU; laptop with given scores",
            cost="one forward pass of the teacher a pair; training on 8 pairs a query",
        ),
        candidates=Pools(bm25=0, dense=100, random=0),
        judging=Judging(judge="cross_encoder"),
        stratified=Stratified(),
        training=Training(objective=ListKL(), batch_size=16, docs_per_query=8),
    )


def scincl() -> Recipe:
    """SciNCL, arXiv 2202.06671: documents near in a graph of links against documents far in it.

    Needs the links (--neighbours.links); documents without one teach nothing. Differs from the
    paper: node vectors are FastRP's; the bands are shares of the linked documents; each positive
    meets each negative of its document, 25 triplets and not 5; distances are of unit vectors, whose
    order is that of cosine, so that it is served as any encoder of ours. A document stands in for a
    query, and is read with the query's prompt, if any. Leave out links that an evaluation counts as
    relevance.
    """
    return bixse().replace(
        name="scincl",
        about=About(
            paper="SciNCL, arXiv 2202.06671", hardware="laptop", cost="training; no label is paid"
        ),
        neighbours=Neighbours(),
        judging=Judging(judge="neighbours"),
        # The paper: 2 epochs, rate 2e-5, 32 triplets a batch, margin 1. Ours: 16 documents a batch.
        training=Training(
            objective=Triplet(in_batch=False),
            batch_size=16,
            docs_per_query=10,
            epochs=2,
            query_tokens=256,
        ),
    )


def _ranking(name: str, paper: str, objective: object) -> Recipe:
    return bixse().replace(
        name=name,
        about=About(paper=paper, hardware="as bixse", cost="as bixse"),
        # ours: a query's documents in one row, so that they meet.
        training=Training(objective=objective, batch_size=16, docs_per_query=4),
    )

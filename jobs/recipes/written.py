"""Systems whose training text a language model writes: the published ways to begin with a corpus.

None of them is the paper's own code: prompts are ours (`bixse.synthesis.prompts`), the generator is
any instruction-tuned model that vLLM runs, the encoder is the recipe's start.
"""

from bixse.candidates.settings import Pools
from bixse.judging.settings import Judging, Verification
from bixse.synthesis.settings import (
    FewShot,
    Generator,
    GradedDocuments,
    GradedQueries,
    RoundTrip,
    Styled,
)
from bixse.training.objective_settings import Combined, InfoNCE, ListKL, Wasserstein
from bixse.training.settings import Training
from jobs.recipe import About, Recipe


def promptagator() -> Recipe:
    """Promptagator, arXiv 2209.11755: few-shot queries that must find their document again.

    Differs from the paper: an open instruction-tuned generator with a chat prompt (as Promptodile)
    in place of FLAN 137B, 10,000 documents in place of a million, no pre-training on C4. Needs two
    to eight given pairs of the train split.
    """
    return Recipe(
        name="promptagator",
        about=About(
            paper="Promptagator, arXiv 2209.11755",
            hardware="1+ GPU",
            cost="a sampled query a request, 8 a document; two trainings, one more embedding",
        ),
        synthesis=FewShot(round_trip=RoundTrip(retriever="trained", k=1)),
        judging=Judging(judge="written"),
        training=Training(objective=InfoNCE(positives="all")),
    )


def promptodile() -> Recipe:
    """Promptodile, arXiv 2510.02241: Promptagator with open generators and no round trip."""
    return promptagator().replace(
        name="promptodile",
        about=About(
            paper="Promptodile, arXiv 2510.02241",
            hardware="1+ GPU",
            cost="a sampled query a request, 8 a document; training",
        ),
        synthesis=FewShot(
            round_trip=None, generator=Generator(model="microsoft/Phi-3-medium-4k-instruct")
        ),
    )


def customir() -> Recipe:
    """CustomIR, arXiv 2510.21729: queries in several styles, mined negatives verified by a judge.

    Losses, styles and thresholds of the paper are not public: the mix of styles is that of arXiv
    2505.19274, thresholds are ours. Keep an eye on a general test set (arXiv 2505.19274: such
    tuning often harms strong encoders); nothing here stops for you when it falls.
    """
    return Recipe(
        name="customir",
        about=About(
            paper="CustomIR, arXiv 2510.21729",
            hardware="1+ GPU",
            cost="5 sampled queries a document; one prefill a pair and order; training",
        ),
        synthesis=Styled(),
        candidates=Pools(bm25=0, dense=20, random=0, written_from=True),
        judging=Judging(judge="vllm"),
        verification=Verification(),
        training=Training(
            objective=InfoNCE(positives="threshold", threshold=0.5), docs_per_query=8
        ),
    )


def sycl() -> Recipe:
    """SyCL, arXiv 2503.23239: documents at four grades written for given queries.

    The paper's Wasserstein loss and a KL over each list beside it (equal weights: ours), since the
    first alone cannot tell one query's list from another's. The grades are those that the texts
    were written at; no judge has checked them. Needs given queries of the train split. Beside given
    grades (`--synthesis.with-given`) the paper sets two documents of BM25 at grade 1; we set none.
    """
    return Recipe(
        name="sycl",
        about=About(
            paper="SyCL, arXiv 2503.23239",
            hardware="1+ GPU",
            cost="four sampled passages a query, in one answer; training",
        ),
        synthesis=GradedDocuments(),
        judging=Judging(judge="written"),
        # The paper: 256 rows a step, one epoch at 1e-5, 256 tokens a side, dot products. Ours: the
        # defaults, and cosine.
        training=Training(
            objective=Combined(parts=(Wasserstein(), ListKL()), weights=(1.0, 1.0)),
            docs_per_query=4,
        ),
    )


def ssra() -> Recipe:
    """SSRA, arXiv 2509.16717: queries at every grade, kept where a scorer and a comparison agree.

    Scorer (`judging.vllm`) and generator (`synthesis.generator`) are tuned on the labels of the
    train split, the generator on a query log that the scorer has graded too, and in a second round
    on what stayed of the first, as in the paper; the encoder learns from the labels beside what was
    written. The log are given queries that nobody has graded, each with its candidates, since no
    list of what was shown is asked for. Refused when the scorer agrees less with held-out labels
    than it did. InfoNCE weighted by the grade, as in the paper. Needs labels; `--synthesis.rounds
    0` takes both models as they come, in one round.
    """
    return Recipe(
        name="ssra",
        about=About(
            paper="SSRA, arXiv 2509.16717",
            hardware="1+ GPU",
            cost="three tunings of a language model; 6 sampled queries a document, a prefill or "
            "two each and a candidate of the log, two short answers a pair of them; training",
        ),
        synthesis=GradedQueries(),
        judging=Judging(judge="written"),
        # The paper: adapters of rank 32 on Qwen3-Embedding, 512 rows a step. Ours: the defaults,
        # for a small encoder.
        training=Training(objective=InfoNCE(positives="weighted")),
    )

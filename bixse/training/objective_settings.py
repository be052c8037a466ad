"""The objectives that a recipe chooses from, and what each is told."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bixse.settings import Settings


class _Single(Settings):
    """What the trainer asks of an objective; true of all that learn nothing but the encoder."""

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is learned beside the encoder."""
        return False

    @property
    def learns_bias(self) -> bool:
        """Whether a bias, calibrated on the first batch, is learned beside the encoder."""
        return False

    @property
    def own_rate_factor(self) -> float:
        """Learning rate of scale and bias over the encoder's."""
        return 1.0

    @property
    def whole_batch(self) -> bool:
        """Whether it is no sum over rows, and must see all of a batch at once."""
        return False

    @property
    def reads_preferences(self) -> bool:
        """Whether it learns from preferences beside judgments."""
        return False

    @property
    def reads_clicks(self) -> bool:
        """Whether it learns from clicks where they were made, beside judgments."""
        return False

    @property
    def scores_pairs(self) -> bool:
        """Whether it is for a reranker, which reads query and document together."""
        return False

    @property
    def grouped_from(self) -> float | None:
        """Relevance from which a document makes a row with others of its query that have less.

        None where a row is any judged documents of a query.
        """
        return None


class GradedBCE(_Single):
    """Binary cross-entropy on relevance as probability: BiXSE, arXiv 2508.06781."""

    kind: Literal["graded_bce"] = "graded_bce"
    scale: float = Field(default=20.0, gt=0)
    """alpha, on cosine; 1 / temperature (LLM2Vec's 20, and the best of our toy)."""
    learn_scale: bool = False
    """Learn log alpha beside the encoder; else alpha stays."""
    bias_learning_rate_factor: float = Field(default=10.0, gt=0)
    """Learning rate of beta (and alpha) over the encoder's (ours)."""

    @property
    def learns_scale(self) -> bool:
        return self.learn_scale

    @property
    def learns_bias(self) -> bool:
        return True

    @property
    def own_rate_factor(self) -> float:
        return self.bias_learning_rate_factor


class InfoNCE(_Single):
    """Softmax over the documents of the batch: the baselines of BiXSE."""

    kind: Literal["infonce"] = "infonce"
    positives: Literal["all", "threshold", "weighted"] = "all"
    """all: every judged document is a positive. threshold: those at `threshold` or above.
    weighted: every one, its row weighted by its relevance."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Relevance from which a document is a positive, for `threshold`."""
    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine."""


class ListKL(_Single):
    """KL of the judge's distribution over a query's documents: distillation, arXiv 2410.01383."""

    kind: Literal["list_kl"] = "list_kl"
    in_batch: bool = True
    """The encoder's distribution is over the whole batch (DPR's form), else over the query's
    judged documents: then a query with one of them teaches nothing."""
    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine."""
    target_scale: float = Field(default=3.0, gt=0)
    """Teacher's score of relevance 1 (relevance 0 has 0); SyCL's labels run from 0 to 3."""


class RankNet(_Single):
    """Pairwise logistic loss on the order of grades: RankNet, ICML 2005."""

    kind: Literal["ranknet"] = "ranknet"
    in_batch: bool = True
    """The batch's other documents count as irrelevant, else only judged ones are compared."""
    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine."""


class LambdaLoss(_Single):
    """RankNet with each pair weighted by what it moves nDCG: LambdaLoss, CIKM 2018."""

    kind: Literal["lambda_loss"] = "lambda_loss"
    in_batch: bool = True
    """The batch's other documents count as irrelevant, else only judged ones are compared."""
    weighting: Literal["lambdarank", "ndcg_loss2", "ndcg_loss2pp"] = "ndcg_loss2pp"
    """What a pair weighs; ndcg_loss2pp is the paper's best."""
    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine."""


class MarginMSE(_Single):
    """Squared error of differences of scores: MarginMSE, arXiv 2010.02666."""

    kind: Literal["margin_mse"] = "margin_mse"
    in_batch: bool = True
    """The batch's other documents count as irrelevant, else only judged ones are compared."""
    scale: float = Field(default=20.0, gt=0)
    """What cosine is multiplied by."""
    target_scale: float = Field(default=10.0, gt=0)
    """Score of relevance 1; over `scale` it is the margin wanted in cosine (ours)."""


class Wasserstein(_Single):
    """2-Wasserstein distance of the batch's lists to its labels: SyCL, arXiv 2503.23239.

    It cannot tell one query's list from another's: combine it with `list_kl`.
    """

    kind: Literal["wasserstein"] = "wasserstein"
    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine (the paper: dot products of vectors of any length)."""
    target_scale: float = Field(default=3.0, gt=0)
    """Label of relevance 1; the paper's run from 0 to 3. Unless it is raised, in a large batch most
    of the target lies on documents of label 0: 89 % with 64 queries of four documents."""

    @property
    def whole_batch(self) -> bool:
        return True


class Triplet(_Single):
    """Margin between a positive's and a negative's distance: SciNCL, arXiv 2202.06671."""

    kind: Literal["triplet"] = "triplet"
    in_batch: bool = True
    """The batch's other documents are negatives, else only judged ones."""
    margin: float = Field(default=1.0, gt=0)
    """In Euclidean distance between unit vectors, which is 2 at most (the paper: 1, any length)."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Relevance from which a document is a positive."""

    @property
    def scale(self) -> float:
        """It reads the cosine itself."""
        return 1.0


class PreferenceKL(_Single):
    """KL of a pairwise judge's preferences: PairDistill, arXiv 2410.01383.

    Preferences whose two documents are not both in the batch wait for another epoch.
    """

    kind: Literal["preference_kl"] = "preference_kl"
    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine."""

    @property
    def reads_preferences(self) -> bool:
        return True


class ClickBCE(_Single):
    """Binary cross-entropy on clicks, a rank's part in them apart: arXiv 2506.20501.

    The encoder is the relevance tower. What a rank does is known before (`judging.clicks`), and the
    batch's other documents count as irrelevant, as in BiXSE: the paper learns both towers at once,
    and only from what was shown.
    """

    kind: Literal["click_bce"] = "click_bce"
    scale: float = Field(default=20.0, gt=0)
    """alpha, on cosine; 1 / temperature."""
    bias_learning_rate_factor: float = Field(default=10.0, gt=0)
    """Learning rate of beta over the encoder's (ours)."""

    @property
    def learns_bias(self) -> bool:
        return True

    @property
    def own_rate_factor(self) -> float:
        return self.bias_learning_rate_factor

    @property
    def reads_clicks(self) -> bool:
        return True


class _OfPairs(_Single):
    """What is true of all objectives of a reranker."""

    @property
    def scores_pairs(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        """They read the score itself."""
        return 1.0


class LCE(_OfPairs):
    """For rerankers: softmax over a positive and negatives of its own query, arXiv 2101.08751.

    A row is a positive with `docs_per_query - 1` negatives, drawn anew every epoch from what was
    judged, which is the head of the retrievers that the pairs came from.
    """

    kind: Literal["lce"] = "lce"
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Relevance from which a document is a positive. No positive is another's negative."""
    temperature: float = Field(default=1.0, gt=0)
    """What scores are divided by."""

    @property
    def grouped_from(self) -> float | None:
        return self.threshold


class PairBCE(_OfPairs):
    """For rerankers: binary cross-entropy on the relevance of judged pairs, as probability.

    The loss of BiXSE, arXiv 2508.06781, on judged cells alone: a reranker has no others to count.
    """

    kind: Literal["pair_bce"] = "pair_bce"


_Singles = (
    GradedBCE
    | InfoNCE
    | ListKL
    | RankNet
    | LambdaLoss
    | MarginMSE
    | Wasserstein
    | Triplet
    | PreferenceKL
    | ClickBCE
    | LCE
    | PairBCE
)
Single = Annotated[_Singles, Field(discriminator="kind")]


class Combined(Settings):
    """A weighted sum of objectives over the same batch."""

    kind: Literal["combined"] = "combined"
    parts: tuple[Single, ...] = Field(min_length=1)
    """The objectives; one of them at most may learn a bias."""
    weights: tuple[Annotated[float, Field(gt=0)], ...]
    """What each is multiplied by."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.parts)} objectives with {len(self.weights)} weights")
        if sum(part.learns_bias for part in self.parts) > 1:
            raise ValueError("two objectives with a bias: there is one bias to learn")
        if len({part.scores_pairs for part in self.parts}) > 1:
            raise ValueError("objectives of an encoder and of a reranker: there is one model")
        return self

    @property
    def _main(self) -> Single:
        """The part that learns scale and bias, or the first."""
        return next((part for part in self.parts if part.learns_bias), self.parts[0])

    @property
    def scale(self) -> float:
        return self._main.scale

    @property
    def learns_scale(self) -> bool:
        return self._main.learns_scale

    @property
    def learns_bias(self) -> bool:
        return self._main.learns_bias

    @property
    def own_rate_factor(self) -> float:
        return self._main.own_rate_factor

    @property
    def whole_batch(self) -> bool:
        return any(part.whole_batch for part in self.parts)

    @property
    def reads_preferences(self) -> bool:
        return any(part.reads_preferences for part in self.parts)

    @property
    def reads_clicks(self) -> bool:
        return any(part.reads_clicks for part in self.parts)

    @property
    def scores_pairs(self) -> bool:
        return self._main.scores_pairs

    @property
    def grouped_from(self) -> float | None:
        return next((part.grouped_from for part in self.parts if part.grouped_from), None)


Objective = Annotated[_Singles | Combined, Field(discriminator="kind")]

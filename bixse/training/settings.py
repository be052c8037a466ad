"""Objectives and the optimiser."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bixse.settings import Precision, Settings


class Scored(Settings):
    """What every single objective has: it reads scale * cosine."""

    scale: float = Field(default=20.0, gt=0)
    """1 / temperature, on cosine."""

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


class GradedBCE(Scored):
    """Binary cross-entropy on relevance as probability: BiXSE, arXiv 2508.06781."""

    kind: Literal["graded_bce"] = "graded_bce"
    scale: float = Field(default=20.0, gt=0)
    """alpha, on cosine; 1 / temperature (LLM2Vec's 20, and the best of our toy, methods 1.3)."""
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


class InfoNCE(Scored):
    """Softmax over the documents of the batch: the baselines of BiXSE."""

    kind: Literal["infonce"] = "infonce"
    positives: Literal["all", "threshold", "weighted"] = "all"
    """all: every judged document is a positive. threshold: those at `threshold` or above.
    weighted: every one, its row weighted by its relevance."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Relevance from which a document is a positive, for `threshold`."""


Single = Annotated[GradedBCE | InfoNCE, Field(discriminator="kind")]


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


Objective = Annotated[GradedBCE | InfoNCE | Combined, Field(discriminator="kind")]


class Training(Settings):
    """The `train` stage."""

    objective: Objective = GradedBCE()
    batch_size: int = Field(default=64, ge=2)
    """Rows (a query with its documents) a step, over all workers."""
    docs_per_query: int = Field(default=1, ge=1)
    """Judged documents a row holds; the paper has one."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the judgments."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps, if sooner."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak of the encoder's rate (ours: full fine-tuning of a small encoder)."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises; then it falls linearly to 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW; never on alpha, beta, biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global norm to which gradients are clipped."""
    query_tokens: int = Field(default=64, ge=4)
    """Longest query; the rest is cut."""
    document_tokens: int = Field(default=256, ge=4)
    """Longest document; the rest is cut."""
    precision: Precision = "auto"
    """Of matrix products: auto is bfloat16 where the device has instructions for it."""
    seed: int = 0
    """Of the row order. Dropout is off."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: what an interruption can cost."""

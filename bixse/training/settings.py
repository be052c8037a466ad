"""How encoders, rerankers and language models are trained; of objectives, `objective_settings`."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from bixse.settings import Precision, Settings
from bixse.training.objective_settings import GradedBCE, Objective


class LoRA(Settings):
    """Train low-rank adapters of the linear layers, and not all weights: LoRA, arXiv 2106.09685."""

    rank: int | None = Field(default=None, ge=1)
    """Of the adapters (LLM2Vec: 16, with a `training.learning_rate` of 2e-4, ten times that of all
    weights). Unset: all weights are trained."""
    scaling: float = Field(default=2.0, gt=0)
    """What the adapters' product is multiplied by: `lora_alpha` over rank (LLM2Vec's code)."""
    target_modules: tuple[str, ...] = ()
    """Last parts of the names of the linear layers that have one, as `query value`. Unset: all of
    the transformer's, without a head."""

    @model_validator(mode="after")
    def _has_rank(self) -> Self:
        if self.target_modules and self.rank is None:
            raise ValueError("training.lora.target_modules have adapters: set training.lora.rank")
        return self


class Training(Settings):
    """The `train` stage. How BiXSE itself was trained is not public: numbers without a source are
    ours."""

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
    """Longest query, its prompt included; the rest is cut."""
    document_tokens: int = Field(default=256, ge=4)
    """Longest document, its prompt included; the rest is cut. More than 256 is refused where the
    model reads less. A reranker reads both in `query_tokens` more, beside what its chat template
    adds, cuts the longer of the two first (of a chat its end, which is the document's), and is
    saved to read no more from then on."""
    mix: tuple[str, ...] = ()
    """The `--out` (directories or URLs) of other runs, whose judgments are trained on beside this
    run's own: each batch is of one run, each run has its rows' share of the batches and a bias of
    its own. Evaluation stays with this run's queries."""
    pair_head: Literal["pooled", "first_token"] = "pooled"
    """What the score of a pair is made of where a reranker begins as an encoder. pooled: its
    vector, pooled as the encoder pools. first_token: transformers' own head, which learns more
    slowly, for a judge that vLLM is to serve (`judging.cross_encoder`)."""
    lora: LoRA = LoRA()
    sharded: bool = False
    """Spread weights, gradients and moments over the training workers (FSDP2), for a model that is
    too large for one of them. Out of memory then ends the run: set `micro_batch_tokens`."""
    dimensions: tuple[PositiveInt, ...] = ()
    """Leading dimensions that must rank by themselves too (Matryoshka, arXiv 2205.13147): vectors
    may then be cut to so many. None trains whole vectors only."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Encode no more tokens at a time, twice (GradCache, arXiv 2101.06983): memory stops following
    the batch size, for about a third more time. Unset: once, all together, until memory is out."""
    precision: Precision = "auto"
    """Of matrix products: auto is bfloat16 where the device has instructions for it."""
    compiled: bool | None = None
    """Compile the encoder's layers (torch.compile), which takes up to a minute. Unset: on a GPU,
    from 200 steps. Results differ by rounding."""
    seed: int = 0
    """Seed of the row order, and of weights that the start lacks. Dropout is off."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: what an interruption can cost."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the dev split (nDCG@10, over the whole corpus), with one before
    the first step and one after the last: the encoder of the best is kept. Unset: none, and the
    last is kept."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a better one. Unset: never."""

    @model_validator(mode="after")
    def _has_negatives(self) -> Self:
        if self.objective.grouped_from is not None and self.docs_per_query < 2:
            raise ValueError("docs_per_query counts the positive: 2 or more for this objective")
        return self

    @model_validator(mode="after")
    def _mixes_judgments(self) -> Self:
        read = {
            "preferences": self.objective.reads_preferences,
            "clicks": self.objective.reads_clicks,
        }
        for noun, needed in read.items():
            if self.mix and needed:
                raise ValueError(
                    f"training.mix brings judgments and no {noun}, which this objective learns "
                    "from: leave it out, or take another recipe"
                )
        return self

    @model_validator(mode="after")
    def _has_vectors(self) -> Self:
        if self.dimensions and self.objective.scores_pairs:
            raise ValueError("a reranker makes no vectors: leave out training.dimensions")
        if self.evaluate_every is not None and self.objective.scores_pairs:
            raise ValueError("a reranker ranks no corpus: leave out training.evaluate_every")
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("training.patience counts evaluations: set training.evaluate_every")
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError("training.dimensions name a number twice")
        return self


class Tuning(Settings):
    """How the language models of a recipe are tuned on graded pairs (SSRA, arXiv 2509.16717, whose
    own numbers are not public: all ours)."""

    batch_size: int = Field(default=32, ge=2)
    """Rows (a prompt with its answer) a step, over all workers."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps, if sooner."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak of the rate; all weights are tuned."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises; then it falls linearly to 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW; never on biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global norm to which gradients are clipped."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens (or one row) that each worker reads at a time: what memory follows."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the labelled train queries that no model is tuned on: they say whether tuning
    helped."""
    precision: Precision = "auto"
    """Of matrix products: auto is bfloat16 where the device has instructions for it."""
    seed: int = 0
    """Seed of the row order and of the choice of held-out queries."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: what an interruption can cost."""


class Gated(Settings):
    """Train the encoder, without labels, on what the context that it chooses is worth to a language
    model: Revela, arXiv 2506.16552. Numbers without a source are ours."""

    language_model: str | None = None
    """The causal language model, a directory or hub id, that reads the chunks. It is trained too,
    and not kept (the paper: Llama-3.2-1B)."""
    revision: str | None = None
    """Of a hub id the commit or branch; unset, what it is now."""
    chunk_tokens: int = Field(default=157, ge=8)
    """Longest chunk, in tokens of the language model (the paper's code). The encoder cuts what is
    longer than it reads."""
    group_size: int = Field(default=16, ge=2)
    """Chunks that are read together, each attending to the others (the paper's code)."""
    temperature: float = Field(default=0.03, gt=0)
    """Of the softmax over cosines. At the paper's 1e-4 all weight goes to one chunk, and an encoder
    that tells texts apart already gets next to no gradient: that is for one whose cosines hardly
    differ yet. `attended` in training.jsonl is 1 where it is too low."""
    batch_size: int = Field(default=32, ge=2)
    """Groups a step, over all workers (the paper's code: 32)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the groups."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps, if sooner."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak of the rate of both models, for all weights (the paper's code: 1e-4, for adapters)."""
    warmup_ratio: float = Field(default=0.01, ge=0, lt=1)
    """Share of the steps over which the rate rises; then it falls linearly to 0 (the paper's code:
    100 of some 10,000)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW; never on biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm to which the gradients of both models together are clipped."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Train low-rank adapters of so many dimensions, on all linear layers of both models, and not
    all weights (the paper's code: 256, with a rate of 1e-4)."""
    lora_scaling: float = Field(default=0.25, gt=0)
    """What the adapters' product is multiplied by: `lora_alpha` over rank (the paper's code)."""
    precision: Precision = "auto"
    """Of matrix products: auto is bfloat16 where the device has instructions for it. Cosines and
    their softmax are in float32 always."""
    seed: int = 0
    """Seed of the order of documents, of groups, and of adapters. Dropout is off."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: what an interruption can cost."""

    @property
    def lora(self) -> LoRA:
        return LoRA(rank=self.lora_rank, scaling=self.lora_scaling)

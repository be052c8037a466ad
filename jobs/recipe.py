"""What a recipe is: one frozen value that says everything about a run but where and on what."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from bixse.candidates.settings import Neighbours, Pools, Stratified
from bixse.evaluation.settings import Evaluation
from bixse.judging.settings import Audit, Judging, Preferring, Verification
from bixse.models.settings import PACKAGED, Reranking
from bixse.retrieval.settings import Lexical, Retrieval
from bixse.settings import Settings
from bixse.synthesis.settings import Synthesis
from bixse.training.settings import Gated, Training, Tuning


class About(Settings):
    """What `--list` shows of a recipe."""

    paper: str
    hardware: str
    cost: str


class Ingest(Settings):
    """How foreign files are read."""

    source: Literal["auto", "beir", "jsonl", "parquet", "csv", "text", "python-docs"] = "auto"
    """Layout of `--data`; auto looks at it and says what it found."""
    grade_min: float = 0.0
    """The grade that means irrelevant."""
    grade_max: float | None = None
    """The best grade of the scale; unset takes the highest that stands in the qrels."""
    part_rows: int = Field(default=50_000, ge=1)
    """Documents a Parquet part."""
    metadata: tuple[str, ...] = ()
    """Fields that filters of `/search` may name, as `brand price:number`: of the `metadata` object
    of JSON lines, or columns; `all` takes every field of that object. A kind (text, number,
    boolean, texts) is needed for CSV, where all is text. Without a name nothing is taken."""


class Placement(Settings):
    """Where the work runs; changes how long a run takes, never what it makes."""

    gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs of each encoding or judging actor, of each training worker and of each task that trains
    or builds an index; 0 runs on CPUs."""
    cpus_per_actor: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for each actor."""
    judge_actors: int = Field(default=1, ge=1)
    """Engines (or embedded judges) that grade side by side."""
    embed_actors: int = Field(default=1, ge=1)
    """Encoders that embed side by side."""
    train_workers: int = Field(default=1, ge=1)
    """Ranks of the data-parallel trainer."""
    encode_tokens: PositiveInt | None = None
    """Tokens encoded at a time, padding included; unset takes what suits the device."""
    train_retries: int = Field(default=2, ge=0)
    """Failures of a training worker that are answered by resuming from the last checkpoint."""

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """What an actor runs on. One that reserves no GPU runs on the CPU, whatever it can see."""
        return "cuda" if self.gpus_per_actor else "cpu"


class Recipe(Settings):
    """A published system, or one of ours, as values of the stages. A stage that is None is none."""

    name: str
    about: About
    start: str = PACKAGED
    """The base encoder: a directory, a hub id, or the packaged one."""
    ingest: Ingest = Ingest()
    synthesis: Synthesis | None = Field(default=None, discriminator="kind")
    tuning: Tuning = Tuning()
    """How a recipe that tunes its language models does so."""
    candidates: Pools = Pools()
    neighbours: Neighbours | None = None
    """Train documents on their neighbours in a graph."""
    lexical: Lexical = Lexical()
    judging: Judging = Judging()
    verification: Verification | None = None
    """Train on verified judgments alone."""
    stratified: Stratified | None = None
    """Train on a sample of the judgments."""
    audit: Audit = Audit()
    preferring: Preferring = Preferring()
    training: Training = Training()
    gated: Gated | None = None
    """Train the encoder on the corpus alone, beside a language model, and not on judgments."""
    truncate: PositiveInt | None = None
    """Cut the vectors of the trained encoder to so many leading dimensions: a smaller index, and
    little lost where `training.dimensions` names the number. Unset keeps them whole."""
    reranking: Reranking | None = None
    """Train a reranker, and not an encoder."""
    retrieval: Retrieval = Retrieval()
    evaluation: Evaluation = Evaluation()
    placement: Placement = Placement()

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.training.objective.scores_pairs != (self.reranking is not None):
            raise ValueError("a reranker needs both: an objective of pairs, and `reranking`")
        return self

    @model_validator(mode="after")
    def _one_training(self) -> Self:
        if self.gated is not None and self.training != Training():
            raise ValueError(
                "this recipe trains as `gated` says, and has no use for a flag of `training`: "
                "--gated has its own"
            )
        return self

    @model_validator(mode="after")
    def _one_graph(self) -> Self:
        if (self.judging.judge == "neighbours") != (self.neighbours is not None):
            raise ValueError(
                "judging.judge neighbours is of recipes with a graph, and theirs alone"
            )
        return self

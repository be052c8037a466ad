"""Which texts are made, from what, and which of them stay."""

from typing import Literal

from pydantic import Field, field_validator

from bixse.settings import Settings

StyleName = Literal["question", "claim", "title", "keywords", "request"]
TaskName = Literal["search", "question", "claim", "counterargument", "related"]


class Cloze(Settings):
    """Queries cut out of documents: the inverse cloze task, Lee et al. 2019, arXiv 1906.00300."""

    kind: Literal["cloze"] = "cloze"
    queries: int = Field(default=2000, ge=1)
    """Queries to make, drawn over the corpus by a hash of `doc_id`."""
    min_words: int = Field(default=4, ge=1)
    """Shortest sentence that can stand as a query."""
    max_words: int = Field(default=24, ge=1)
    """Longer sentences are cut to this."""
    seed: int = 0
    """Seed of the draw."""


class Generator(Settings):
    """A language model in vLLM that writes; every answer is held to a JSON schema."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """Hub id or directory of a causal language model."""
    revision: str | None = None
    """Commit of the hub model."""
    temperature: float = Field(default=0.7, ge=0)
    """Sampling temperature (Promptagator's); 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer; one that is cut off is asked for again, then rejected."""
    attempts: int = Field(default=2, ge=1)
    """Times a text is asked for before its request is rejected; each with a seed of its own."""
    document_tokens: int = Field(default=512, ge=0)
    """Cut documents to this many tokens before they are shown; 0 cuts none."""
    max_model_len: int = Field(default=4096, ge=64)
    """Longest prompt in tokens, the answer included; a longer one is rejected."""
    unit_requests: int = Field(default=512, ge=1)
    """Texts written and stored at a time: what an interruption can cost."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU that the engine takes."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights and activations."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one engine spans."""


class RoundTrip(Settings):
    """Keep a query only if its document comes back: Promptagator, arXiv 2209.11755."""

    retriever: Literal["bm25", "base", "trained"] = "trained"
    """bm25; base: the encoder that training starts with; trained: one trained on all queries that
    were written, from which the final training goes on (the paper's)."""
    k: int = Field(default=1, ge=1)
    """The document, or a copy of it, must stand among the first k of the whole corpus."""


class FewShot(Settings):
    """Queries written to the pattern of a few given pairs: Promptagator, arXiv 2209.11755."""

    kind: Literal["few_shot"] = "few_shot"
    task: TaskName = "search"
    """What makes a document relevant to a query here; see `bixse.synthesis.prompts.TASKS`."""
    examples: int = Field(default=8, ge=0, le=16)
    """Best given pairs shown (train split, one a query and document); the paper has at most 8.
    Their documents are cut to what leaves room for the one that is asked about."""
    documents: int = Field(default=10_000, ge=1)
    """Documents asked, drawn over the corpus by a hash of `doc_id`."""
    queries_per_document: int = Field(default=8, ge=1)
    """Sampled for each document (the paper's 8)."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Two queries of one document that share this much of their words (Jaccard) are one."""
    round_trip: RoundTrip | None = RoundTrip()
    generator: Generator = Generator()
    seed: int = 0
    """Seed of the draw, the examples and the sampling."""


class Styled(Settings):
    """Queries in several styles, grounded in a passage: CustomIR, arXiv 2510.21729."""

    kind: Literal["styled"] = "styled"
    styles: tuple[StyleName, ...] = ("question", "claim", "title", "keywords", "request")
    """Each document is asked in each of them (the mix of arXiv 2505.19274)."""
    documents: int = Field(default=10_000, ge=1)
    """Documents asked, drawn over the corpus by a hash of `doc_id`."""
    queries_per_style: int = Field(default=1, ge=1)
    """Sampled for each document and style."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Two queries of one document that share this much of their words (Jaccard) are one."""
    generator: Generator = Generator()
    seed: int = 0
    """Seed of the draw and the sampling."""

    @field_validator("styles")
    @classmethod
    def _apart(cls, styles: tuple[StyleName, ...]) -> tuple[StyleName, ...]:
        # A style twice would be the same requests twice, which repeat each other and are dropped.
        if not styles or len(set(styles)) < len(styles):
            raise ValueError(
                f"one or more styles are needed, each once (queries_per_style asks for several), "
                f"found {', '.join(styles) or 'none'}"
            )
        return styles


class GradedQueries(Settings):
    """Queries of every grade for a passage, sifted by a scorer: SSRA, arXiv 2509.16717."""

    kind: Literal["graded_queries"] = "graded_queries"
    examples: int = Field(default=2, ge=0, le=8)
    """Given pairs of each grade shown (train split), where there are any; a tuned generator is
    shown none."""
    documents: int = Field(default=10_000, ge=1)
    """Documents asked, drawn over the corpus by a hash of `doc_id`."""
    queries_per_grade: tuple[int, int, int, int] = (1, 2, 2, 1)
    """Sampled for each document at grade 0, 1, 2, 3; the middle ones are rare and often miss."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Two queries of one document that share this much of their words (Jaccard) are one."""
    tolerance: float = Field(default=0.1, ge=0)
    """After balancing no grade has more than (1 + this) times the rows of the rarest."""
    rounds: Literal[0, 1, 2] = 2
    """0: scorer and generator as they come. 1: both tuned on the labels. 2: and the generator once
    more, on what stayed of its first round too."""
    first_documents: int = Field(default=1000, ge=1)
    """Documents asked in the first round of two (ours)."""
    log_queries: int = Field(default=1000, ge=0)
    """Given queries that nobody has graded, drawn by a hash of `query_id`, whose candidates the
    tuned scorer grades first, for the generator to learn from (how many: ours); 0 reads no log."""
    with_given: bool = True
    """Train on the given grades of the train split beside the written queries (the paper does)."""
    generator: Generator = Generator()
    seed: int = 0
    """Seed of the draw, the examples, the sampling and the balancing."""


class GradedDocuments(Settings):
    """Documents of every grade for a given query: SyCL, arXiv 2503.23239."""

    kind: Literal["graded_documents"] = "graded_documents"
    queries: int = Field(default=10_000, ge=1)
    """Given queries written for, drawn by a hash of `query_id`; none that is held out."""
    with_given: bool = False
    """Train on the given grades of the train split beside the written documents (the paper: better
    than either alone)."""
    generator: Generator = Generator(max_tokens=1536)
    seed: int = 0
    """Seed of the draw, of length and difficulty, and of the sampling."""


AsksDocuments = FewShot | Styled | GradedQueries
"""Kinds that write queries for documents."""

Synthesis = Cloze | FewShot | Styled | GradedQueries | GradedDocuments

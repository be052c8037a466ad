"""Who judges, and how."""

import json
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from bixse.settings import Settings


class Pointwise(Settings):
    """A language model in vLLM that grades one pair at a time."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """Hub id or directory of a causal language model."""
    revision: str | None = None
    """Commit of the hub model; part of the judge's fingerprint."""
    prompt: Literal["umbrela", "lightblue"] = "umbrela"
    """Prompt and scale: UMBRELA's 0-3 or LightBlue's 1-5."""
    orders: Literal[1, 2] = 2
    """Presentation orders, averaged: query first, and passage first."""
    max_model_len: int = Field(default=4096, ge=64)
    """Longest prompt in tokens, the answer included; a longer one is rejected."""
    document_tokens: int = Field(default=0, ge=0)
    """Cut documents to this many tokens of the judge before they are judged; 0 cuts none."""
    min_grade_mass: float = Field(default=0.5, gt=0, le=1)
    """Reject an answer whose grade tokens together got less probability (ours)."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU that the engine takes."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights and activations."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one engine spans."""


class Given(Settings):
    """Grades that somebody else's judge has given: a file of qrels, read as judgments."""

    file: str = ""
    """BEIR's three columns or TREC's four: query, document, grade."""
    judge: str = ""
    """Who graded; empty takes the file's name without its suffix."""
    origin: Literal["llm", "human", "clicks"] = "llm"
    """What the grades come from."""
    grade_min: float = 0.0
    """The grade that means irrelevant."""
    grade_max: float | None = None
    """The best grade of the scale; unset takes the highest that stands in the file."""


class Clicks(Settings):
    """What people were shown, and clicked: a two-tower click model, arXiv 2506.20501."""

    shown: tuple[str, ...] = ()
    """Files, or directories of them, of JSON lines (or Parquet rows) that say what was shown, as
    `--request-log` of the server writes them; a document that was clicked may say `"click": true`.
    Nobody may write to them meanwhile."""
    clicked: tuple[str, ...] = ()
    """Tables of clicks with the columns request_id and doc_id and, where a request asked several
    queries, query. Unset: clicks stand in `shown`. Of lists for one query with one request_id only
    the first is read then."""
    policies: tuple[str, ...] = ()
    """Read what was shown under these policies only (`--policy` of the server). Unset: all."""
    ranks: int = Field(default=20, ge=1, le=1000)
    """Deepest rank that is read."""
    rank_bias: tuple[float, ...] = ()
    """What each rank adds to the log-odds of a click, where an experiment has told. Unset: found in
    the log, from documents that were shown at two ranks for the same query."""
    rank_deviation: float = Field(default=0.35, ge=0.001)
    """How far what a rank does lies from a power of the rank, -eta log k (ours): few clicks far
    down a list leave it near that."""
    prior_deviation: float = Field(default=2.0, gt=0)
    """How far the log-odds of documents lie apart before anybody clicks: of few impressions the
    relevance stays near that of all (ours: 1.5 to 2 erred least in simulated logs)."""
    placement_weights: bool = False
    """Train on each place of a document as if it had been chosen at random: the paper's weights,
    for models too simple for what people click on. They cost variance."""
    largest_weight: float = Field(default=10.0, ge=1)
    """Most that an impression may weigh beside one that was always placed so."""


class ChatEndpoint(Settings):
    """A chat-completions endpoint of OpenAI's shape that grades one pair at a time.

    What it reads is sent to whoever runs it, so there is no default address.
    """

    base_url: str = ""
    """Address up to and including /v1."""
    model: str = ""
    """The name that the endpoint knows the model by."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable, on every worker, that holds the key; empty sends none."""
    prompt: Literal["umbrela", "lightblue"] = "umbrela"
    """Prompt and scale: UMBRELA's 0-3 or LightBlue's 1-5."""
    orders: Literal[1, 2] = 2
    """Presentation orders, averaged: query first, and passage first."""
    top_logprobs: int = Field(default=20, ge=2)
    """Likeliest tokens to ask for; one answer of one token a request."""
    votes: int = Field(default=0, ge=0)
    """Sample this many answers at temperature 1 in place of log-probabilities; 0 samples none."""
    min_grade_mass: float = Field(default=0.5, gt=0, le=1)
    """Reject an answer whose grade tokens (or readable votes) together got less (ours)."""
    extra: str = "{}"
    """JSON object laid over every request; null takes a field out."""
    concurrency: int = Field(default=32, ge=1)
    """Requests that each actor has in flight."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest that one request may take, from connecting to the last byte."""
    give_up_after_s: float = Field(default=600.0, ge=0)
    """Repeat a request for this long after a timeout, a failed connection, 408, 409, 425, 429 or
    5xx, then reject its pair, or stop where the endpoint answers nothing else either; at once where
    Retry-After says later. Once the endpoint has answered nothing for this long, its other requests
    are tried once; 0 repeats none."""
    max_retries: int = Field(default=6, ge=0)
    """Repetitions after a reply that came, and cannot be read; then its pair is rejected."""
    max_wait_s: float = Field(default=120.0, gt=0)
    """Longest wait before a repetition, where Retry-After names none that is longer."""
    price_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    """What is charged for so many, in your currency; cached ones count in full."""
    price_per_million_output_tokens: float | None = Field(default=None, ge=0)
    """What is charged for so many that the model answers with."""

    @property
    def token_prices(self) -> tuple[float, float] | None:
        """Of a prompt token and of an output token; None where neither price is known."""
        prompt, output = self.price_per_million_prompt_tokens, self.price_per_million_output_tokens
        if not prompt and not output:
            return None
        return (prompt or 0.0) / 1e6, (output or 0.0) / 1e6

    @property
    def extra_body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.extra)
        return found

    @field_validator("base_url")
    @classmethod
    def _address(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError(f"an http or https address is needed, found {url!r}")
        if parts.username or parts.query or parts.fragment:
            raise ValueError("no user, query or fragment in the address: the key has its variable")
        return url.rstrip("/")

    @field_validator("extra")
    @classmethod
    def _object(cls, extra: str) -> str:
        try:
            found = json.loads(extra)
        except ValueError as error:
            raise ValueError(f"extra is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError("extra must be a JSON object")
        if reserved := {"messages", "model", "n", "stream"} & set(found):
            raise ValueError(f"extra may not set {sorted(reserved)[0]}")
        return json.dumps(found, sort_keys=True)

    @field_validator("api_key_env")
    @classmethod
    def _variable(cls, name: str) -> str:
        # A key pasted here would be written into every manifest.
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", name):
            raise ValueError("the name of an environment variable is needed, in capitals")
        return name


class CrossEncoder(Settings):
    """A sequence-classification model in vLLM that reads query and passage together."""

    model: str = "cross-encoder/ms-marco-MiniLM-L6-v2"
    """Hub id or directory."""
    revision: str | None = None
    """Commit of the hub model; part of the judge's fingerprint."""
    slope: float = Field(default=1.0, gt=0)
    """Slope of the map from one logit to log-odds, fitted on human grades; 1: the bare sigmoid."""
    intercept: float = 0.0
    """Intercept of the same map."""
    max_model_len: int = Field(default=512, ge=8)
    """Longest pair in tokens; a longer one is rejected."""
    document_tokens: int = Field(default=0, ge=0)
    """Cut documents to this many tokens of the model before they are judged; 0 cuts none."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU that the engine takes."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights and activations."""


class Verification(Settings):
    """Which judgments of written queries training may rely on: CustomIR, arXiv 2510.21729."""

    positive: float = Field(default=0.5, ge=0, le=1)
    """Relevance from which a document answers (ours). A query that its own does not is dropped."""
    negative: float = Field(default=0.2, ge=0, le=1)
    """Relevance below which it does not answer (ours); in between it is dropped."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """A negative that shares this much of its words (Jaccard) with a positive is dropped."""


class Cascade(Settings):
    """A cheap judge on every pair, a strong one where it was most in doubt."""

    cheap: Literal["features", "vllm", "openai", "cross_encoder"] = "features"
    """Who judges every pair."""
    strong: Literal["features", "vllm", "openai", "cross_encoder"] = "vllm"
    """Who judges the most doubtful pairs again, and is believed."""
    by: Literal["entropy", "disagreement"] = "entropy"
    """Doubt: entropy of the distribution over the grades, or change between presentation orders."""
    share: float = Field(default=0.2, gt=0, le=1)
    """Share of the pairs that the strong judge sees (ours)."""
    max_pairs: int | None = Field(default=None, ge=0)
    """The most pairs that the strong judge sees, whatever the share."""

    @model_validator(mode="after")
    def _two(self) -> "Cascade":
        if self.cheap == self.strong:
            raise ValueError(f"a cascade needs two judges, found {self.cheap} twice")
        return self


class Judging(Settings):
    """The `judge` stage: one seam, several judges."""

    judge: Literal[
        "human",
        "features",
        "vllm",
        "given",
        "openai",
        "cross_encoder",
        "written",
        "neighbours",
        "clicks",
        "cascade",
    ] = "human"
    """human: the qrels of the train split. features: the embedded model. vllm: a language model.
    given: the grades of a file. openai: a chat-completions endpoint. cross_encoder: a classifier of
    pairs in vLLM. written: the grade that a text was written at. neighbours: bands of a graph.
    clicks: what people clicked on, the rank's part taken out."""
    unit_pairs: int = Field(default=512, ge=1)
    """Pairs judged and written at a time: what an interruption can cost."""
    store: str | None = None
    """Label store (directory or fsspec URL) that jobs may share: a pair of texts that this judge
    has graded before is not paid for again. Unset: `labels` under --out."""
    max_pairs: int | None = Field(default=None, ge=0)
    """Stop once this many pairs have been asked for these judgments, known ones aside."""
    max_cost: float | None = Field(default=None, ge=0)
    """Stop before the workers (price_per_gpu_hour), or of an endpoint the tokens that it counts
    (its own prices), have cost this much: all judges of a run."""
    price_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU for an hour (of one worker, where there are no GPUs), in your currency."""
    vllm: Pointwise = Pointwise()
    given: Given = Given()
    clicks: Clicks = Clicks()
    preferences: str | None = None
    """A tab-separated file that says which of two documents is preferred, for objectives
    that read it: a header and columns query-id, preferred-id, other-id, or query_id, doc_id_a,
    doc_id_b, prob_a."""
    openai: ChatEndpoint = ChatEndpoint()
    cross_encoder: CrossEncoder = CrossEncoder()
    cascade: Cascade = Cascade()
    """With judge cascade: one judge on every pair, another where it was in doubt."""
    calibration: str | None = None
    """Read the judgments through the map of this artefact (`jobs.audit` fits one); they stay as
    they are."""

    @model_validator(mode="after")
    def _priced(self) -> "Judging":
        if self.max_cost is None:
            return self
        both = {self.cascade.cheap, self.cascade.strong}
        asked = both if self.judge == "cascade" else {self.judge}
        if "openai" in asked and self.openai.token_prices is None:
            raise ValueError(
                "judging.max_cost needs judging.openai.price_per_million_prompt_tokens, "
                "or of output tokens"
            )
        if asked != {"openai"} and not self.price_per_gpu_hour:
            raise ValueError("judging.max_cost needs judging.price_per_gpu_hour")
        return self

    @property
    def token_prices(self) -> tuple[float, float] | None:
        """Of the judge that is asked, where it is paid by the token (`ChatEndpoint`)."""
        return self.openai.token_prices if self.judge == "openai" else None

    @model_validator(mode="after")
    def _in_both_orders(self) -> "Judging":
        # Here, before the cheap judge has been paid for every pair.
        orders = {"vllm": self.vllm.orders, "openai": self.openai.orders}
        cheap = self.cascade.cheap
        by_order = self.judge == "cascade" and self.cascade.by == "disagreement"
        if by_order and orders.get(cheap, 1) == 1:
            raise ValueError(
                "cascade.by disagreement needs a cheap judge that is asked in both orders, "
                f"{cheap} is asked once"
            )
        return self


class Audit(Settings):
    """The `audit` verb: what labels are worth, before training spends on them."""

    judgments: str | None = None
    """Audit the judgments of this artefact in place of those that the recipe makes."""
    rejudged: str | None = None
    """A second artefact of judgments: how many grades differ on the pairs that both hold."""
    fit: Literal["none", "isotonic", "temperature"] = "none"
    """Fit a calibration map on the human grades of `fit_split` (isotonic: of 100 judged pairs at
    the least); it stands at OUT/calibration."""
    fit_split: Literal["train", "dev", "test"] = "train"
    """The split whose human grades a map is fitted on."""
    bins: int = Field(default=10, ge=1)
    """Bins of the calibration error and of the reliability curve."""
    bootstrap: int = Field(default=1000, ge=20)
    """Resamples of the queries for each interval."""
    seed: int = 0
    """Seed of the resampling."""
    near: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of shingles from which two queries are near-duplicates (ours)."""
    shingle: int = Field(default=5, ge=1)
    """Characters of a shingle."""
    examples: int = Field(default=10, ge=0)
    """Rows of each kind that the report names."""


class Preferring(Settings):
    """The `prefer` stage: which judged documents of a query are compared, by `judging.vllm`."""

    train: bool = False
    """Train on what it prefers, where no file of preferences is given."""
    window: int = Field(default=5, ge=1)
    """Ranks that two documents may be apart (PairDistill's code: 5)."""
    pairs_per_query: int = Field(default=100, ge=1)
    """Pairs sampled from the windows of a query (PairDistill's code: 100)."""
    seed: int = 0
    """Seed of the sample."""
    unit_pairs: int = Field(default=512, ge=1)
    """Pairs compared and written at a time: what an interruption can cost."""


def config(settings: Judging) -> dict[str, object]:
    """What shapes the judgments: a setting of a judge that was not asked changes nothing."""
    shaping: dict[str, object] = {"judge": settings.judge}
    if settings.judge == "vllm":
        # The weights are an input, by their own identity; where they run shapes nothing.
        elsewhere = {"model", "revision", "gpu_memory_utilization", "tensor_parallel"}
        shaping["vllm"] = settings.vllm.model_dump(mode="json", exclude=elsewhere)
    if settings.judge == "given":
        shaping["given"] = settings.given.model_dump(mode="json", exclude={"file"})
    if settings.judge == "openai":
        patience = {"api_key_env", "concurrency", "timeout_s"}
        patience |= {"give_up_after_s", "max_retries", "max_wait_s"}
        patience |= {"price_per_million_prompt_tokens", "price_per_million_output_tokens"}
        shaping["openai"] = settings.openai.model_dump(mode="json", exclude=patience)
    if settings.judge == "cross_encoder":
        elsewhere = {"model", "revision", "gpu_memory_utilization"}
        shaping["cross_encoder"] = settings.cross_encoder.model_dump(mode="json", exclude=elsewhere)
    return shaping

"""Who judges, and how."""

from typing import Literal

from pydantic import Field

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


class Judging(Settings):
    """The `judge` stage: one seam, three judges."""

    judge: Literal["human", "features", "vllm", "given"] = "human"
    """human: the qrels of the train split. features: the embedded model. vllm: a language model.
    given: the grades of a file."""
    unit_pairs: int = Field(default=512, ge=1)
    """Pairs judged and written at a time: what an interruption can cost."""
    vllm: Pointwise = Pointwise()
    given: Given = Given()
    preferences: str | None = None
    """A file that says which of two documents is preferred for a query, for objectives that read
    it: columns query-id, preferred-id, other-id, or query_id, doc_id_a, doc_id_b, prob_a."""
    calibration: str | None = None
    """Read the judgments through the map of this artefact (`jobs.audit` fits one); they stay as
    they are."""


def config(settings: Judging) -> dict[str, object]:
    """What shapes the judgments: a setting of a judge that was not asked changes nothing."""
    shaping: dict[str, object] = {"judge": settings.judge}
    if settings.judge == "vllm":
        # The weights are an input, by their own identity; where they run shapes nothing.
        elsewhere = {"model", "revision", "gpu_memory_utilization", "tensor_parallel"}
        shaping["vllm"] = settings.vllm.model_dump(mode="json", exclude=elsewhere)
    if settings.judge == "given":
        shaping["given"] = settings.given.model_dump(mode="json", exclude={"file"})
    return shaping

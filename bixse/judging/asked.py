"""What every judge of single pairs is: pairs with their texts in, a verdict for each out.

A judge is built once in a worker process and called by several of its threads, a batch of pairs at
a time. It knows nothing of files, units or stores: who calls it reads the texts, answers from the
label store what it can, and writes (`jobs.judge`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bixse.records import Judgment, Rejection

Verdict = Judgment | Rejection


@dataclass(frozen=True, slots=True)
class Asked:
    """A pair as a judge reads it."""

    query_id: str
    doc_id: str
    query: str
    passage: str
    """Title, space, text (`records.document_text`)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What answers took, counted where they were computed."""

    requests: int = 0
    prompt_tokens: int = 0
    """As the engine read them; those found in its prefix cache included."""
    cached_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    """Time that an engine of ours was at work on them."""
    flops: float = 0.0
    """Operations that prompts took, those found in the cache aside, where both this and the next
    are known."""
    peak_flops: float = 0.0
    """Operations that the hardware could have done in these seconds."""

    def cost(self, prices: tuple[float, float]) -> float:
        """Of its tokens, at the prices of a prompt token and of an output token."""
        return self.prompt_tokens * prices[0] + self.output_tokens * prices[1]

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.peak_flops + other.peak_flops,
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """One verdict for each pair asked, in their order, and what they took together."""

    verdicts: Sequence[Verdict]
    usage: Usage = Usage()
    unreadable: Sequence[str] = ()
    """Why, of each pair whose answer was no grade; pairs that were never asked are not among them.
    """


class Refused(ValueError):
    """An error for the user to see, raised after some pairs have been answered and paid for.

    `verdicts` are those answers, by the row of their pair among those that were asked.
    """

    def __init__(self, sentence: str, verdicts: Mapping[int, Verdict], usage: Usage) -> None:
        super().__init__(sentence)
        self.verdicts = dict(verdicts)
        self.usage = usage


class PairJudge(Protocol):
    """Safe to call from several threads at a time.

    A pair that gets no readable answer is a `Rejection`, never a grade. Raises ValueError for an
    error that the user must see (no such model, an answer to nothing), `Refused` where some pairs
    were answered before it; OSError for a failure that may not come again.
    """

    def __call__(self, asked: Sequence[Asked]) -> Answers: ...


@dataclass(frozen=True, slots=True)
class Cost:
    """What asking one pair will take, counted without asking; a judge knows some of it."""

    prompt_tokens: int = 0
    shared_tokens: int = 0
    """How many of them are a prefix shared with the prompt asked just before."""
    output_tokens: int = 0
    requests: int = 0
    characters: int = 0
    """Characters of all messages sent."""
    fits: bool = True
    """False: the pair will be rejected unasked, and takes nothing."""


class Planner(Protocol):
    """A judge's arithmetic: the cost of each pair, in their order, if all are asked together."""

    def __call__(self, asked: Sequence[Asked]) -> Sequence[Cost]: ...

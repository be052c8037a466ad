"""A chat-completions endpoint as a judge: what is asked, and what its choices are worth.

OpenAI's shape, which most servers and hosted models speak. The distribution over the scale comes
from the first token's `top_logprobs` where the endpoint offers them, else from sampled votes:

    p_k = sum exp(l) over the top tokens that read as label k / sum over all labels
    p_k = votes that are exactly label k / votes that are a label of the scale

The denominator (for votes: their share of all votes) is the grade mass, as in `pointwise`. Whatever
breaks the shape, is no log-probability, or leaves too much open, is `Unreadable` and says why. A
choice is a parsed JSON value that a stranger has sent: nothing in it is taken for granted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bixse.judging.asked import Usage
from bixse.judging.pointwise import disagreement
from bixse.judging.prompts import ORDERS, Order, Prompt
from bixse.judging.settings import ChatEndpoint
from bixse.records import Judgment, Rejection

UNSEEN = 0.05
"""The most probability, beside that of the labels seen, that unseen labels may have (ours)."""

VOTE_TOKENS = 4
"""Room to say more than a grade, so that "3 of 10" is not cut to a vote for 3."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A distribution over the scale's labels and the mass that it was renormalised from."""

    probs: tuple[float, ...]
    mass: float


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why there is no answer, and what was received."""

    reason: str
    response: str = ""


def request(
    settings: ChatEndpoint, prompt: Prompt, query: str, passage: str, order: Order
) -> dict[str, Any]:
    """The body of the request for one pair in one order; `n` is left to whoever sends it."""
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": prompt.messages(query, passage, order),
    }
    if settings.votes:
        body |= {"temperature": 1.0, "max_tokens": VOTE_TOKENS}
    else:
        body |= {"temperature": 0.0, "max_tokens": 1}
        body |= {"logprobs": True, "top_logprobs": settings.top_logprobs}
    body |= settings.extra_body
    return {name: value for name, value in body.items() if value is not None}


def read(
    choices: Sequence[Any], settings: ChatEndpoint, labels: Sequence[str]
) -> Answer | Unreadable:
    """What the choices of one request say: one with log-probabilities, or `settings.votes`."""
    if settings.votes:
        return read_votes(choices, labels)
    return read_logprobs(choices[0], labels, settings.top_logprobs)


def read_logprobs(choice: Any, labels: Sequence[str], top: int) -> Answer | Unreadable:
    """The answer of a choice that holds one token with its `top` most likely ones."""
    if _refused(choice):
        return Unreadable("the endpoint declined to answer")
    tokens = _at(choice, "logprobs", "content")
    if not isinstance(tokens, list) or not tokens:
        return Unreadable("no logprobs: where an endpoint offers none, sample votes")
    if len(tokens) != 1:
        return Unreadable(f"{len(tokens)} tokens where one was asked for")
    found = _at(tokens[0], "top_logprobs")
    if not isinstance(found, list) or len(found) < top:
        count = len(found) if isinstance(found, list) else "no"
        return Unreadable(f"{count} top_logprobs where {top} were asked for")
    probs: dict[str, float] = {}
    total = 0.0
    for entry in found:
        token, logprob = _at(entry, "token"), _at(entry, "logprob")
        # bool is an int to Python, and a probability of 1 allows for rounding.
        number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if not isinstance(token, str) or not number or not logprob <= 1e-6:
            return Unreadable("a top token without a log-probability")
        if token in probs and token.strip() in labels:
            return Unreadable("a grade stands twice among the top tokens")
        probs[token] = math.exp(max(logprob, -1e4))
        total += probs[token]
    if total > 1 + 1e-3:
        return Unreadable(f"the top tokens have probability {total:.3g} together")
    seen = [sum(p for token, p in probs.items() if token.strip() == label) for label in labels]
    mass = min(1.0, sum(seen))
    if not mass:
        return Unreadable("no grade is among the top tokens")
    present = {token.strip() for token in probs}
    missing = sum(label not in present for label in labels)
    open_ = missing * min(min(probs.values()), max(0.0, 1 - total))
    if open_ > UNSEEN * mass:
        return Unreadable(f"{missing} grades are not among the top tokens and may have {open_:.2g}")
    return Answer(tuple(p / sum(seen) for p in seen), mass)


def read_votes(choices: Sequence[Any], labels: Sequence[str]) -> Answer | Unreadable:
    """The shares of sampled answers; each counts if it is one label, whole, and nothing else."""
    counts = [0] * len(labels)
    for choice in choices:
        content = _at(choice, "message", "content")
        whole = _at(choice, "finish_reason") == "stop" and not _refused(choice)
        if whole and isinstance(content, str) and content.strip() in labels:
            counts[labels.index(content.strip())] += 1
    readable = sum(counts)
    if not readable:
        return Unreadable(f"none of {len(choices)} votes is a grade")
    return Answer(tuple(count / readable for count in counts), readable / len(choices))


def verdict(
    query_id: str,
    doc_id: str,
    by_order: Sequence[Answer | Unreadable],
    prompt: Prompt,
    judge: str,
    min_grade_mass: float,
) -> Judgment | Rejection:
    """The mean over the orders; a rejection as soon as one of them is unreadable."""
    answers: list[Answer] = []
    for order, answer in zip(ORDERS, by_order, strict=False):
        if isinstance(answer, Answer) and answer.mass < min_grade_mass:
            shown = f"{dict(zip(prompt.scale.labels, answer.probs, strict=True))}"
            answer = Unreadable(
                f"grade mass {answer.mass:.3g} is below {min_grade_mass:g}", response=shown
            )
        if isinstance(answer, Unreadable):
            return Rejection(
                reason=f"{answer.reason}, {order}",
                response=answer.response,
                query_id=query_id,
                doc_id=doc_id,
            )
        answers.append(answer)
    columns = zip(*(answer.probs for answer in answers), strict=True)
    probs = tuple(sum(column) / len(answers) for column in columns)
    return Judgment(
        query_id=query_id,
        doc_id=doc_id,
        grade_probs=probs,
        relevance=prompt.scale.relevance(probs),
        judge=judge,
        prompt=prompt.hash,
        origin="llm",
        disagreement=disagreement([answer.probs for answer in answers]),
    )


def choices_of(reply: Any, most: int) -> list[Any]:
    """The choices of a reply. Raises ValueError when it is no reply to this request."""
    choices = _at(reply, "choices")
    if not isinstance(choices, list):
        raise ValueError("the reply has no choices")
    if not 1 <= len(choices) <= most:
        raise ValueError(f"the reply has {len(choices)} choices where {most} were asked for")
    return choices


def usage_of(reply: Any) -> Usage:
    """One request and the tokens that its reply counts; none where it counts none."""
    cached = _at(reply, "usage", "prompt_tokens_details", "cached_tokens")
    prompt, output = _at(reply, "usage", "prompt_tokens"), _at(reply, "usage", "completion_tokens")
    counts = [n if type(n) is int and 0 <= n < 2**31 else 0 for n in (prompt, cached, output)]
    return Usage(1, *counts)


def _refused(choice: Any) -> bool:
    reason = _at(choice, "finish_reason")
    return bool(_at(choice, "message", "refusal")) or reason == "content_filter"


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value

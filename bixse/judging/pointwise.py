"""One pair, one grade: log-probabilities of the grade tokens -> Judgment or Rejection.

For each presentation order the engine gives the log-probabilities, under the whole vocabulary, of
the tokens that are the scale's labels. Their sum is the grade mass: little of it means that the
model was about to say something else, and what is left of the distribution says nothing. So

    p_k = exp(l_k) / sum_j exp(l_j)   for each order, if sum_j exp(l_j) >= min_grade_mass
    p   = mean of p over the orders,  relevance = expected grade, mapped to [0, 1] (bixse.scale)

which is LightBlue's reading of five digits (lightblue-tech/lb-reranker), generalised to a scale.
"""

import json
import math
from collections.abc import Iterable, Sequence

from bixse.judging.prompts import ORDERS, Prompt
from bixse.records import Judgment, Rejection

Logprobs = Sequence[float | None]
"""Of each label of the scale, in its order; None where the engine gave none."""

BROKEN = 32
"""Answers without one grade among them, from which the judge is taken for broken (ours)."""


def judgment(
    query_id: str,
    doc_id: str,
    logprobs_by_order: Sequence[Logprobs],
    prompt: Prompt,
    judge: str,
    min_grade_mass: float,
) -> Judgment | Rejection:
    """What the answers of the first `len(logprobs_by_order)` orders say of the pair.

    A rejection holds the raw numbers: nothing is graded on the order that was readable.
    """
    answers = []
    for order, logprobs in zip(ORDERS, logprobs_by_order, strict=False):
        found = [value for value in logprobs if value is not None and math.isfinite(value)]
        if len(found) != len(prompt.scale.labels):
            reason = f"no finite log-probability for every grade, {order}"
            return _rejection(query_id, doc_id, reason, logprobs_by_order, prompt)
        mass = sum(math.exp(value) for value in found)
        if mass < min_grade_mass:
            reason = f"grade mass {mass:.3g} is below {min_grade_mass:g}, {order}"
            return _rejection(query_id, doc_id, reason, logprobs_by_order, prompt)
        answers.append([math.exp(value) / mass for value in found])
    probs = tuple(sum(column) / len(answers) for column in zip(*answers, strict=True))
    return Judgment(
        query_id=query_id,
        doc_id=doc_id,
        grade_probs=probs,
        relevance=prompt.scale.relevance(probs),
        judge=judge,
        prompt=prompt.hash,
        origin="llm",
        disagreement=disagreement(answers),
    )


def disagreement(answers: Sequence[Sequence[float]]) -> float | None:
    """The largest change of one grade's probability between presentation orders.

    `answers` is a distribution an order; of fewer than two there is none to compare.
    """
    if len(answers) < 2:
        return None
    spread: list[float] = [max(column) - min(column) for column in zip(*answers, strict=True)]
    return max(spread)


def unreadable(verdicts: Iterable[Judgment | Rejection]) -> list[str]:
    """Why, of each answer that was no grade."""
    return [verdict.reason for verdict in verdicts if isinstance(verdict, Rejection)]


def refuse_unreadable(reasons: Sequence[str], wanted: str = "a grade") -> None:
    """Raises ValueError for many answers that were not what was wanted, where no other answer was:
    a broken judge, not hard pairs."""
    if len(reasons) >= BROKEN:
        raise ValueError(
            f"none of {len(reasons)} answers was {wanted} ({reasons[0]}): the judge "
            "does not answer or does not follow the prompt; choose another model"
        )


def too_long(query_id: str, doc_id: str, tokens: int, limit: int) -> Rejection:
    """The rejection of a pair whose prompt does not fit; it is never cut silently."""
    reason = f"the prompt has {tokens} tokens, the judge reads {limit}"
    return Rejection(reason=reason, query_id=query_id, doc_id=doc_id)


def _rejection(
    query_id: str, doc_id: str, reason: str, logprobs_by_order: Sequence[Logprobs], prompt: Prompt
) -> Rejection:
    raw = {
        order: dict(zip(prompt.scale.labels, logprobs, strict=False))
        for order, logprobs in zip(ORDERS, logprobs_by_order, strict=False)
    }
    return Rejection(reason=reason, response=json.dumps(raw), query_id=query_id, doc_id=doc_id)

"""Which cheap judgments a strong judge should see again, under a budget.

The less sure a judge is, the more a second opinion may change, and a label's entropy says so for
nothing. Everything is a function of the stored distribution: choosing costs no call.
"""

import heapq
import math
from collections.abc import Iterable, Sequence

from bixse.judging.settings import Cascade


def entropy(grade_probs: Sequence[float]) -> float:
    """Entropy of a distribution over K grades, divided by its maximum, log K: in [0, 1]."""
    nats = -sum(p * math.log(p) for p in grade_probs if p > 0)
    return min(1.0, max(0.0, nats / math.log(len(grade_probs))))


def doubt(cascade: Cascade, grade_probs: Sequence[float], disagreement: float | None) -> float:
    """How unsure a judge was of a pair, in [0, 1].

    Raises ValueError when disagreement is asked for and the judge was asked in one order.
    """
    if cascade.by == "entropy":
        return entropy(grade_probs)
    if disagreement is None:
        raise ValueError(
            f"--judging.cascade.by disagreement needs a cheap judge that is asked in both orders, "
            f"{cascade.cheap} is asked once"
        )
    return disagreement


def budget(cascade: Cascade, pairs: int) -> int:
    """How many of `pairs` the strong judge may see: the share, rounded down, or the cap."""
    share = math.floor(cascade.share * pairs + 1e-9)
    return share if cascade.max_pairs is None else min(share, cascade.max_pairs)


def most_doubtful(
    doubts: Iterable[tuple[str, str, float]], limit: int
) -> list[tuple[str, str, float]]:
    """The `limit` pairs (query_id, doc_id, doubt) of most doubt, the greatest first.

    Equal doubt goes by `query_id`, then `doc_id`. Memory follows `limit`, not the pairs.
    """
    return heapq.nsmallest(limit, doubts, key=lambda row: (-row[2], row[0], row[1]))

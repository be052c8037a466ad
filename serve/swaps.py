"""Two neighbours of a list change places now and then, so that a log of clicks tells what a rank
does from what a document is worth (`bixse.judging.clicks`; arXiv 2506.20501, finding 1).

The least that connects the ranks: people see the same documents, one of them a place too high. Off
unless `--swap-share` says so.
"""

import random
from dataclasses import replace

from serve.fanout import Answer
from serve.messages import Found

_DEEPEST = 20
"""Below this rank few people click, and `judging.clicks.ranks` reads none by default."""


class Swaps:
    """Draws which lists are changed, and where."""

    def __init__(self, share: float) -> None:
        self._share, self._draw = share, random.Random()

    def of(self, answer: Answer) -> tuple[Answer, list[int | None]]:
        """The answer as it is shown, and of each list the rank that changed with the next, or none
        where it did not."""
        ranks = [self._rank(len(found.hits)) for found in answer.results]
        if not any(ranks):
            return answer, ranks
        shown = [
            found if rank is None else swapped(found, rank)
            for found, rank in zip(answer.results, ranks, strict=True)
        ]
        return replace(answer, results=shown), ranks

    def _rank(self, hits: int) -> int | None:
        if hits < 2 or self._draw.random() >= self._share:
            return None
        return self._draw.randint(1, min(hits, _DEEPEST) - 1)


def swapped(found: Found, rank: int) -> Found:
    """The documents at `rank`, which counts from 1, and the next in each other's place."""
    order = list(range(len(found.hits)))
    order[rank - 1 : rank + 1] = [rank, rank - 1]
    hits = [found.hits[at]._replace(rank=place) for place, at in enumerate(order, start=1)]
    documents = found.documents
    return replace(
        found,
        hits=hits,
        documents=None if documents is None else [documents[at] for at in order],
    )

"""What stands behind the routes: an engine, and the generation that a request is pinned to."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from bixse.models.encoder import Role
from serve.fanout import Answer, Feedback, Way
from serve.generation import Generation
from serve.ledger import Outcome
from serve.messages import Encoded, Wanted


class Session(Protocol):
    """One generation, for one request. Deadlines are times of the running loop.

    All methods raise TimeoutError, RefusedText for a text that cannot be encoded, and Unavailable.
    """

    generation: Generation

    async def search(
        self,
        queries: Sequence[str],
        wanted: Wanted,
        deadline: float,
        feedback: Feedback | None = None,
        reranked: bool = False,
    ) -> Answer:
        """Rankings of all queries, over the shards that answered; after feedback where given.

        To be `reranked`, in half of the time: the reranker is asked after this.
        """

    async def search_words(
        self,
        queries: Sequence[str],
        wanted: Wanted,
        way: Way,
        deadline: float,
        reranked: bool = False,
    ) -> Answer:
        """As `search`, by words or by words and vectors; the index must have `lexical`."""

    async def rerank(
        self, queries: Sequence[str], answer: Answer, k: int, deadline: float
    ) -> Answer:
        """As `serve.reranking.Reranking.rerank`; only of a generation that has a reranker."""

    async def embed(self, texts: Sequence[str], role: Role, deadline: float) -> list[Encoded]:
        """Vectors of all texts."""


class Engine(Protocol):
    """What answers."""

    def pinned(self) -> AbstractContextManager[Session]:
        """The generation that is current now, kept while a request uses it."""

    async def change(self, index: str | None, encoder: str | None, reranker: str | None) -> Outcome:
        """Load, verify, gate and turn to another generation, or refuse and keep this one.

        What is None stays.
        """

    async def roll_back(self) -> Outcome:
        """Turn to the generation before the current one."""

    async def generations(self) -> Outcome:
        """What is served."""

    async def canary(self) -> str | None:
        """Why the canary query did not give its known answer, or None when it did."""

"""What the deployments tell the gateway, and how they fail."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bixse.records import Document, Hit

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted for one query."""

    k: int
    with_fields: bool
    """Whether title, text and metadata come along."""
    with_vectors: bool = False
    filter: str | None = None
    """Canonical text of the filter, which the index can answer; None searches all documents."""


@dataclass(frozen=True, slots=True)
class FoundInSlot:
    """What one slot of shards found for one query, best first, with fields where asked for.

    Lists and no hits: of what all slots find, few survive.
    """

    doc_ids: list[str]
    scores: list[float]
    documents: list[Document] | None = None
    vectors: Vectors | None = None
    """[hits, dim], as stored, where asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for one query: hits in order, and their fields where asked for."""

    hits: list[Hit]
    documents: list[Document] | None = None
    fused: tuple[list[Hit], list[Hit]] | None = None
    """By vectors and by words, where `hits` are made of both."""
    first_stage: list[Hit] | None = None
    """What was found, where a reranker has ordered `hits` anew."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A unit vector [dim], and how many tokens of the text the model has read."""

    vector: Vectors
    tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A text that the encoder cannot encode."""

    reason: str


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Vectors [texts, dim]; the row of a text in `refused` (position -> reason) is void."""

    vectors: Vectors
    tokens: list[int]
    refused: dict[int, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Encoded | Refused]:
        rows = zip(self.vectors, self.tokens, strict=True)
        for position, (vector, tokens) in enumerate(rows):
            reason = self.refused.get(position)
            yield Encoded(vector, tokens) if reason is None else Refused(reason)


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Log-odds [pairs] of a reranker; that of a pair in `refused` (position -> reason) is void."""

    scores: npt.NDArray[np.float32]
    refused: dict[int, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[float | Refused]:
        for position, score in enumerate(self.scores.tolist()):
            reason = self.refused.get(position)
            yield score if reason is None else Refused(reason)


class RefusedText(ValueError):
    """One of a request's texts cannot be encoded; the others are not to blame."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason


class Unavailable(Exception):
    """What answers is gone for now: asking again later is right."""


class NotHeld(Exception):
    """A replica was asked for a generation that it has not loaded, or has dropped."""


class Failed(Exception):
    """A replica raised something that is neither Ray's nor expected."""

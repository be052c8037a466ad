"""Judged pairs become a batch: queries, documents, and what is known of every cell between them.

A batch is a set of judged pairs. Its rows are their distinct queries, its columns their distinct
documents, so that a document that two queries share is encoded once and no cell counts twice
(methods 1.6, 2). A cell that was judged anywhere has its grade as target; a cell that may well be
relevant but was never judged is masked; every other cell has target 0.

Shapes: Q queries and D documents of the batch, P its judged pairs ("own" cells), L tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from bixse.training.groups import Floats, Ints, Labels

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

Bools = npt.NDArray[np.bool_]
Role = Literal["query", "document", "pair"]
"""A pair is a query and a document that a reranker reads together."""

# What a chunk costs beside its tokens, in tokens: weights rounded and gradients added up on a CPU
# (measured on MiniLM), kernels started on a GPU (an estimate: there one chunk is best until it is
# large).
_CHUNK_COST = {"cpu": 128, "cuda": 8192}


@dataclass(frozen=True)
class Batch:
    """A global batch, the same on every rank: of its cells those that are not plain zeros.

    The whole Q x D matrices exist only where somebody asks for them.
    """

    query_Q: Ints
    document_D: Ints
    row_K: Ints
    """The known cells, judged in this batch's pairs or elsewhere, in the order of their row."""
    column_K: Ints
    relevance_K: Floats
    """In [0, 1]."""
    own_K: Bools
    """Judged by a pair of this batch."""
    row_M: Ints
    """The masked cells: perhaps relevant, never judged."""
    column_M: Ints
    row_R: Ints
    """Preferences between two documents of the batch, in the order of their row."""
    a_R: Ints
    b_R: Ints
    prob_a_R: Floats

    @property
    def target_QD(self) -> Floats:
        """Relevance in [0, 1]; 0 where nothing is known."""
        target_QD = np.zeros(self._shape, np.float32)
        target_QD[self.row_K, self.column_K] = self.relevance_K
        return target_QD

    @property
    def weight_QD(self) -> Floats:
        """1, or 0 where the cell is masked."""
        weight_QD = np.ones(self._shape, np.float32)
        weight_QD[self.row_M, self.column_M] = 0
        return weight_QD

    @property
    def known_QD(self) -> Bools:
        known_QD = np.zeros(self._shape, np.bool_)
        known_QD[self.row_K, self.column_K] = True
        return known_QD

    @property
    def own_QD(self) -> Bools:
        own_QD = np.zeros(self._shape, np.bool_)
        own_QD[self.row_K, self.column_K] = self.own_K
        return own_QD

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.query_Q), len(self.document_D)


def batch_of(labels: Labels, pairs: Ints) -> Batch:
    """The batch of some pairs; a function of the set of them, not of their order."""
    query_Q = np.unique(labels.query_of(pairs))
    document_D = np.unique(labels.document_P[pairs])
    row, judged = _spans(labels.pairs_from_Q1, query_Q)
    column, here = _columns(document_D, labels.document_P[judged])
    masked = [
        (row, column)
        for row, query in enumerate(query_Q.tolist())
        for column in np.flatnonzero(np.isin(document_D, labels.suspects.get(query, ()))).tolist()
    ]
    row_M, column_M = np.asarray(masked, np.int64).reshape(-1, 2).T
    row_R = a_R = b_R = np.zeros(0, np.int64)
    prob_a_R = np.zeros(0, np.float32)
    if labels.preferences is not None:
        row_R, known = _spans(labels.preferences.from_Q1, query_Q)
        a_R, a_here = _columns(document_D, labels.preferences.a_R[known])
        b_R, b_here = _columns(document_D, labels.preferences.b_R[known])
        both = a_here & b_here
        row_R, a_R, b_R = row_R[both], a_R[both], b_R[both]
        prob_a_R = labels.preferences.prob_a_R[known][both]
    return Batch(
        query_Q,
        document_D,
        row[here],
        column[here],
        labels.relevance_P[judged][here],
        np.isin(judged[here], pairs),
        row_M,
        column_M,
        row_R,
        a_R,
        b_R,
        prob_a_R,
    )


def _spans(from_Q1: Ints, query_Q: Ints) -> tuple[Ints, Ints]:
    """What each query has between its two bounds: the query's row in the batch, and its number."""
    size_Q = from_Q1[query_Q + 1] - from_Q1[query_Q]
    row = np.repeat(np.arange(len(query_Q)), size_Q)
    before_Q = np.cumsum(size_Q) - size_Q
    return row, np.arange(len(row)) + (from_Q1[query_Q] - before_Q)[row]


def _columns(document_D: Ints, documents: Ints) -> tuple[Ints, Bools]:
    """The columns of some documents, and which of them have one."""
    column: Ints = np.minimum(np.searchsorted(document_D, documents), len(document_D) - 1)
    return column, document_D[column] == documents


@dataclass(frozen=True)
class Side:
    """Texts of one role, tokenised in chunks of like length."""

    role: Role
    chunks: Sequence[dict[str, Any]]
    """Features of sentence-transformers: `input_ids` [chunk, L], `attention_mask`, ..."""
    place: torch.Tensor
    """Where in the concatenated chunks each text stands."""
    count: int
    """Texts that count: 0 on a rank without any, which then encodes one and uses none."""

    @property
    def widest(self) -> int:
        """Tokens of its largest chunk that can be halved, padding included; 0 if none can."""
        return max((_tokens(c) for c in self.chunks if _texts(c) > 1), default=0)

    def within(self, tokens: int) -> "Side":
        """The same texts in the same order, larger chunks halved until they are within `tokens`."""
        chunks = [part for chunk in self.chunks for part in _halves(chunk, tokens)]
        return replace(self, chunks=chunks)


def _texts(chunk: Mapping[str, Any]) -> int:
    """Texts that it can be cut between: 1 of a bag of words, which has no row a text."""
    return len(chunk["attention_mask"]) if "attention_mask" in chunk else 1


def _tokens(chunk: Mapping[str, Any]) -> int:
    return int(chunk["attention_mask"].numel()) if "attention_mask" in chunk else 0


def _halves(chunk: dict[str, Any], tokens: int) -> Iterator[dict[str, Any]]:
    texts = _texts(chunk)
    if texts == 1 or _tokens(chunk) <= tokens:
        yield chunk
        return
    for rows in (slice(texts // 2), slice(texts // 2, texts)):
        yield from _halves(_trimmed(_rows(chunk, rows, texts)), tokens)


def _rows(features: Mapping[str, Any], rows: "slice | torch.Tensor", texts: int) -> dict[str, Any]:
    """Some texts of features; what is not one value a text stays as it is."""

    def of(value: Any) -> Any:
        split = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == texts
        return value[rows] if split else value

    return {name: of(value) for name, value in features.items()}


def cut(lengths: Ints, cost: int, most: int | None = None) -> list[slice]:
    """Texts of falling length into chunks, such that padded tokens plus `cost` a chunk are fewest.

    No chunk of two texts or more has more than `most` tokens, padding included. Exact, by dynamic
    programming over where the last chunk starts.
    """
    texts = len(lengths)
    least = np.zeros(texts + 1, np.int64)
    start_of = np.zeros(texts + 1, np.int64)
    for end in range(1, texts + 1):
        starts = np.arange(end)
        tokens = lengths[:end] * (end - starts)
        if most is not None:
            allowed = (tokens <= most) | (starts == end - 1)
            starts, tokens = starts[allowed], tokens[allowed]
        total = least[starts] + tokens + cost
        best = int(total.argmin())
        least[end], start_of[end] = total[best], starts[best]
    chunks: list[slice] = []
    end = texts
    while end:
        chunks.append(slice(int(start_of[end]), end))
        end = int(start_of[end])
    return chunks[::-1]


def prompt_of(model: "BaseModel", role: Role) -> str | None:
    """The prompt that `encode_query`, `encode_document` or, of a pair, `predict` of
    sentence-transformers puts first.
    """
    names = {"query": ("query",), "document": ("document", "passage", "corpus"), "pair": ()}
    found = (name for name in (*names[role], model.default_prompt_name) if name in model.prompts)
    name = next(found, None)
    return None if name is None else str(model.prompts[name])


def tokenise(
    model: "BaseModel",
    texts: Sequence[str] | Sequence[tuple[str, str]],
    role: Role,
    max_tokens: int,
    count: int,
    most: int | None = None,
) -> Side:
    """One or more texts as `Encoder.encode` (pairs: `Reranker.score`) would read them, cut at
    `max_tokens`.

    The model's own limit holds where it is lower. Of the texts the first `count` are used. Chunks
    hold at most `most` tokens, padding included, or one text.
    """
    own = model.max_seq_length
    limit = max_tokens if own is None else min(max_tokens, own)
    features = model.preprocess(
        list(texts), prompt=prompt_of(model, role), task=role, max_length=limit
    )
    mask = features.get("attention_mask")
    if mask is None:
        # A bag of words has no padding to save.
        return Side(role, [_moved(features, model.device)], torch.arange(len(texts)), count)
    length = mask.sum(dim=1)
    order = torch.argsort(length, descending=True, stable=True)
    falling = length[order].numpy()
    chunks = []
    for part in cut(falling, _CHUNK_COST.get(model.device.type, 0), most):
        chunk = _rows(features, order[part], len(texts))
        chunks.append(_moved(_trimmed(chunk), model.device))
    place = torch.empty(len(texts), dtype=torch.int64)
    place[order] = torch.arange(len(texts))
    return Side(role, chunks, place.to(model.device), count)


def _trimmed(chunk: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that are padding in every text, on either side."""
    width = chunk["attention_mask"].shape[1]
    used = chunk["attention_mask"].any(dim=0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1)

    def of(value: Any) -> Any:
        split = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == width
        return value[:, columns] if split else value

    return {name: of(value) for name, value in chunk.items()}


def _moved(features: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in features.items()
    }
